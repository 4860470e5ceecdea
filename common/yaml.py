"""YAML in, frozen models out. The only place that reads YAML.

`${NAME}` and `${NAME:-default}` are taken from the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from common.errors import describe, instead
from common.types import BadInput

# The safe ones, from libyaml where it is there: eight times as fast, for thousands of simulated sites' files.
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

_DUMPER = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper

_INVALID = (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, AttributeError, LookupError)
"""Errors of reading a text as YAML: PyYAML lets errors of dates, numbers and unhashable keys through."""

FILL_IN = "FILL_IN"
"""Stands in a file that was written for a person to complete, where only that person knows the value."""

MAX_VALUES = 200_000
MAX_DEPTH = 64
_MOST_TEXT = 1 << 20

Model = TypeVar("Model", bound=BaseModel)

_FILES = {
    "run file": {"solver", "aggregation"},
    "site file": {"registry", "state_dir"},
    "simulation file": {"run", "partition"},
}
"""The owners' files by their models' titles, and keys that tell them apart."""

_SPLIT = "; `headwater simulate sites FILE FOLDER` writes its run and sites as files"
_HINTS = {
    ("run file", "simulation file"): _SPLIT,
    ("site file", "simulation file"): _SPLIT,
    ("simulation file", "run file"): ", which is the `run` section of one",
}


def load(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """A validated model from a YAML file.

    Args:
        model: RunConfig, SiteConfig or SimulationConfig.
        path: the file.
        overrides: "key.path=value" strings; the value is YAML; one that starts with "./" or "../" is a path relative
            to the working directory.

    Raises:
        BadInput: in one sentence what is wrong and where.
    """
    values = read_yaml(path, overrides)
    _refuse_another_file(model, values, path)
    _refuse_marks(values, path)
    try:
        return _parse(model, values, {"base": path.resolve().parent, "is_file": True})
    except BadInput as error:
        raise BadInput(f"{error} (in {path})") from error


def find_marks(text: str) -> list[int]:
    """Returns the numbers, from 1, of a file's lines that are still to be filled in."""
    return [number for number, line in enumerate(text.splitlines(), start=1) if FILL_IN in line.split("#")[0]]


def _refuse_marks(values: Mapping[str, Any], path: Path) -> None:
    """Raise BadInput where a value is still to be filled in: all of the file's lines at once."""
    if FILL_IN not in repr(values):
        return
    lines = find_marks(path.read_text(encoding="utf-8"))
    where = f" in line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))}" if lines else " in --set"
    raise BadInput(f"{path}: expected every {FILL_IN} to be replaced, got some{where}")


def _refuse_another_file(model: type[BaseModel], values: Mapping[str, Any], path: Path) -> None:
    """Raise BadInput where the file is plainly one of another owner: its unknown keys would explain nothing."""
    expected = model.model_config.get("title")
    found = [name for name, keys in _FILES.items() if keys <= set(values)]
    if expected in _FILES and len(found) == 1 and found[0] != expected:
        raise BadInput(f"{path}: expected a {expected}, got a {found[0]}{_HINTS.get((expected, found[0]), '')}")


def parse(model: type[Model], values: Mapping[str, Any], *, base: Path) -> Model:
    """Returns a validated model from plain values.

    Args:
        model: class of the model.
        values: plain values.
        base: folder that relative paths are relative to.

    Raises:
        BadInput: in one sentence what is wrong and where.
    """
    return _parse(model, values, {"base": base})


def _parse(model: type[Model], values: Mapping[str, Any], context: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(values, context=dict(context))
    except ValidationError as error:
        raise BadInput(describe(error, model)) from error


def parse_text(model: type[Model], content: bytes, where: str) -> Model:
    """Returns a validated model from YAML that a stranger wrote: no environment variable is filled in.

    Args:
        model: class of the model.
        content: the YAML text.
        where: name of the text, for messages.

    Raises:
        BadInput: in one sentence what is wrong; `where` names the text.
    """
    try:
        values = yaml.load(content.decode(), Loader=_LOADER)
    except _INVALID as error:
        raise BadInput(f"{where}: expected valid YAML, got {type(error).__name__}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{where}: expected keys and values, got {type(values).__name__}")
    _check_size(values, where)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInput(describe(error, model, where)) from error


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML mapping with environment variables filled in and overrides applied."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: expected a readable YAML file{instead(error)}") from error
    try:
        values = yaml.load(text, Loader=_LOADER)
    except _INVALID as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        fault = "a syntax error" if isinstance(error, yaml.YAMLError) else "a date, number or nesting that is none"
        raise BadInput(f"{path}: expected valid YAML, got {fault}{where}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected keys and values, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    _check_size(values, str(path))
    filled = _fill(values, "")
    assert isinstance(filled, dict)
    return filled


def read_names(text: str) -> list[str]:
    """Returns `names` of another program's YAML text, a list or numbers from 0 -> name; empty where it has none."""
    try:
        values = yaml.safe_load(text) if len(text) <= _MOST_TEXT else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    names = values.get("names") if isinstance(values, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        return []
    return [str(name) for name in names]


def _check_size(values: Mapping[str, Any], where: str) -> None:
    """Refuses what is nested deeply or, through its aliases, has very many values: reading it would never end."""
    count, waiting = 0, [(1, iter(values.values()))]
    while waiting:
        depth, inner = waiting[-1]
        for value in inner:
            count += 1
            if count > MAX_VALUES or depth > MAX_DEPTH:
                raise BadInput(
                    f"{where}: expected at most {MAX_VALUES:,} values, nested at most {MAX_DEPTH} deep, got more"
                )
            if isinstance(value, dict | list | set | tuple):
                waiting.append((depth + 1, iter(value.values() if isinstance(value, dict) else value)))
                break
        else:
            waiting.pop()


def as_override(key: str, value: Any) -> str:
    """The "key.path=value" string that sets a key to a plain value."""
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def format_yaml(values: Mapping[str, Any]) -> str:
    """Returns plain values as YAML text, keys in their order."""
    text: str = yaml.dump(dict(values), Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    return text


def write_yaml(path: Path, model: BaseModel) -> None:
    """Write a model as YAML, readable by `load`."""
    values = model.model_dump(mode="json")  # None too: a written null may be required (`crop: null`).
    path.write_text(format_yaml(values), encoding="utf-8")


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise BadInput(f"--set {override}: expected key.path=value")
    try:
        value = yaml.load(text, Loader=_LOADER)
    except _INVALID as error:
        raise BadInput(f"--set {key}: expected a YAML value, got {text!r}") from error
    if isinstance(value, str) and value.startswith(("./", "../")):
        value = str(Path(value).resolve())
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise BadInput(f"--set {key}: {parent} is a value, not a group of keys")
        target = inner
    target[last] = value


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _fill(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _fill(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, key) for inner in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise BadInput(f"{key}: environment variable {match[1]} is not set")
        return found

    return _VARIABLE.sub(lookup, value)
