"""One clear sentence for a wrong setting: key path, what was expected, what was got, the nearest valid name."""

from __future__ import annotations

import difflib
import errno
import types
import typing
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_MAX_CLAUSE = 600
"""Most characters about one key: what was written may be of any length."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (nearest: 'x')` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


def plain(text: str, limit: int = 400) -> str:
    """A stranger's text as one short line of printable characters, for a terminal or a log."""
    shown = "".join(char if char.isprintable() else "?" for char in text[: limit + 1])
    return shown if len(text) <= limit else f"{shown[:limit]}..."


def instead(error: BaseException) -> str:
    """The end of a sentence that named a file and what was expected of it: what was found there."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ", but there is no such file"
    if isinstance(error, PermissionError):
        return ", but this user may not open it"
    if isinstance(error, IsADirectoryError):
        return ", but it is a folder"
    return f", got {type(error).__name__}"


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and try again",
    errno.EDQUOT: "this user's quota of the disk is used up; free some space and try again",
    errno.EFBIG: "the file may not grow any further; raise this user's limit (ulimit -f) and try again",
    errno.EROFS: "the file system is read-only; make it writable or name another folder",
    errno.EACCES: "this user may not open it; check owner and mode of the file and of its folders",
    errno.EPERM: "this user may not do that; check owner and mode of the file and of its folders",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of the path is a file and no folder",
    errno.EISDIR: "it is a folder and no file",
    errno.EEXIST: "something of that name is there already",
    errno.ELOOP: "it is a link that leads to itself",
    errno.EIO: "the disk cannot be read or written; have it checked",
    errno.EMFILE: "too many files are open; raise this user's limit (ulimit -n)",
}


def explain_os_error(error: OSError) -> str:
    """Returns in one sentence which file the operating system refused, why, and what to do."""
    reason = _REASONS.get(error.errno or 0, error.strerror or plain(str(error), 200) or type(error).__name__)
    name = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
    return f"{plain(str(name))}: {reason}" if name else reason


def list_some(words: Sequence[str], most: int = 8) -> str:
    """Returns a list of names, cut after so many: a message on hundreds of sites is read too."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


_OPTIONS = ("function-", "literal[", "dict[", "list[", "constrained-")
"""Beginnings of the names that pydantic gives to validators and to the options of a union."""


_EXPECTED = {
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "dataclass_type": "keys and values",
    "dict_type": "keys and values",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
}
"""Type of a pydantic error -> what a user should have written."""


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Returns a pydantic validation's errors as one sentence: up to three, else the first and the number of the others.

    Args:
        error: the failed validation.
        model: the model that was validated.
        prefix: keys in front of every key named.
    """
    # Of a union's options, a group of keys was meant where one was written: the word beside it explains nothing.
    errors = [item for item in error.errors() if item["type"] != "literal_error" or not isinstance(item["input"], dict)]
    errors = errors or list(error.errors())
    # An unknown key usually explains the missing one beside it: say it first.
    errors = sorted(errors, key=lambda item: item["type"] != "extra_forbidden")
    absent = [item for item in errors if item["type"] == "missing"]
    said: dict[str, str] = {}
    for item in errors:
        key = _key(item, model, prefix)
        if item["type"] == "missing":
            # All at once: who writes a file from nothing would be told one key a try.
            keys = ", ".join(_key(other, model, prefix) for other in absent)
            said.setdefault("missing", f"{keys}: expected a value, got nothing; write it explicitly")
        elif not any(key == other or key.startswith(f"{other}.") for other in said):
            # The options of a union are several errors of one key; one of them says what is wrong.
            said[key] = _sentence(item, model, prefix)
    first, *others = (plain(text, _MAX_CLAUSE) for text in said.values())
    return "; ".join([first, *others]) if len(others) <= 2 else f"{first} (and {len(others)} more)"


def _sentence(item: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    path, key, got = _path(item, model), _key(item, model, prefix), item.get("input")
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        hint = nearest(path[-1], known) or (f"; known keys: {', '.join(sorted(known))}" if known else "")
        return f"{key}: unknown key{hint}"
    if item["type"] in {"literal_error", "enum"}:
        expected = str(item.get("ctx", {}).get("expected", "another value"))
        hint = nearest(str(got), [word.strip(" '") for word in expected.replace(" or ", ",").split(",")])
        return f"{key}: expected {expected}, got {_short(got)}{hint}"
    if item["type"] in _EXPECTED:
        expected = _EXPECTED[item["type"]].format(**item.get("ctx", {}))
        keys = sorted(_fields_at(model, path)) if expected == "keys and values" else []
        return f"{key}: expected {expected}{f' ({list_some(keys)})' if keys else ''}, got {_short(got)}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if item["type"] == "value_error" and not path and not prefix:
        return message  # What several keys of a file say together: it begins with one of them.
    shown = "" if item["type"] == "value_error" else f", got {_short(got)}"
    return f"{key}: {message}{shown}"


def _path(item: ErrorDetails, model: object) -> list[str]:
    """Key path; pydantic names validators and the options of a union inside it, a user wrote neither."""
    path = []
    for part in map(str, item["loc"]):
        if part.startswith(_OPTIONS) or part in {option.__name__ for option in _models_in(model)}:
            continue
        path.append(part)
        model = _step(model, part)
    return path


def _key(item: ErrorDetails, model: object, prefix: str) -> str:
    # Keys are as strange as values: an offer from the network may be of any length and hold a terminal's codes.
    return plain(".".join(([prefix] if prefix else []) + _path(item, model)), 120) or "the file"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields_at(model: object, path: list[str]) -> set[str]:
    """Keys of the model that sits at a key path, as far as annotations tell."""
    for part in path:
        model = _step(model, part)
    return {field.alias or name for item in _models_in(model) for name, field in item.model_fields.items()}


def _step(annotation: object, part: str) -> object:
    for model in _models_in(annotation):
        for name, field in model.model_fields.items():
            if part == (field.alias or name):
                return field.annotation
    for candidate in _flatten(annotation):
        arguments = typing.get_args(candidate)
        if arguments:
            return arguments[-1]
    return None


def _models_in(annotation: object) -> list[type[BaseModel]]:
    return [item for item in _flatten(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]


def _flatten(annotation: object) -> list[object]:
    origin = typing.get_origin(annotation)
    if origin is typing.Union or origin is types.UnionType:
        return [flat for option in typing.get_args(annotation) for flat in _flatten(option)]
    if origin is typing.Annotated:
        return _flatten(typing.get_args(annotation)[0])
    return [annotation]
