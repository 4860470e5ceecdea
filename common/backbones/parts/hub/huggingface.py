"""Reads a Hugging Face model's folder at the coordinator: settings, tokenizer and weights, never code.

Invariants: no file is unpickled (weights come from safetensors) and no file of a model is imported
(`trust_remote_code` stays off); what is returned names no path, so that it can travel.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from huggingface_hub.errors import StrictDataclassError
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, PretrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from common.errors import instead
from common.types import BadInput

# They describe where a file came from, what it was saved as, or a classifier: nothing that shapes features.
_UNUSED = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "problem_type",
        "processor_class",
        "torch_dtype",
        "transformers_version",
        "transformers.js_config",
    }
)


_CODE = ("attn_implementation", "experts_implementation", "quantization_config", "auto_map", "checkpoint_path")
"""Beginnings of keys by which a configuration asks for other code than its architecture's own, or for a file."""

_MOST = (("labels", 1 << 17), ("layers", 1 << 12), ("depth", 1 << 12), ("blocks", 1 << 12))
"""Parts of the names of counts, and the largest of each."""

_ELSEWHERE = re.compile("(hf[-_]hub|local[-_]dir):")
"""Beginning of a name by which timm takes a part of a model from the Hub or from a folder."""


@dataclass(frozen=True)
class Location:
    """The place of a model: a folder, or a name on the Hub with its revision.

    Attributes:
        name: folder or name.
        revision: commit, tag or branch of a name; None for a folder.
        local_files_only: whether nothing may be downloaded.
    """

    name: Path | str
    revision: str | None
    local_files_only: bool

    def file(self, name: str) -> Path | None:
        """Returns one of its files, None where it has none of that name. Raises BadInput where there is no model."""
        if isinstance(self.name, Path):
            if not self.name.is_dir():
                raise BadInput(f"folder: expected a folder with a model, found none at {self.name}")
            path = self.name / name
            return path if path.is_file() else None
        try:
            found = cached_file(
                self.name,
                name,
                revision=self.revision,
                local_files_only=self.local_files_only,
                _raise_exceptions_for_missing_entries=False,
            )
        except (OSError, ValueError) as error:
            raise BadInput(
                f"model: expected {self.name!r} in the cache or on the Hub, got {type(error).__name__}; download it, "
                "or name its `folder`"
            ) from error
        return None if found is None else Path(found)

    def settings(self, *names: str) -> dict[str, Any] | None:
        """Returns the first JSON file of these names, without keys that shape no features; None where there is none."""
        for name in names:
            path = self.file(name)
            if path is not None:
                values = _read_json(path)
                if not isinstance(values, dict):
                    raise BadInput(f"folder: expected keys and values in {path}")
                return {name: value for name, value in values.items() if name not in _UNUSED}
        return None

    def list_settings(self, name: str) -> list[dict[str, Any]] | None:
        """Returns a JSON file that is a list of keys and values; None where there is none. Raises BadInput."""
        path = self.file(name)
        if path is None:
            return None
        values = _read_json(path)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise BadInput(f"folder: expected a list of keys and values in {path}")
        return values


def read_config(values: dict[str, Any]) -> PretrainedConfig:
    """Returns the configuration of a model that transformers itself knows.

    A site gets it from the coordinator: whatever names other code, such as a kernel on the Hub, is left out.

    Raises:
        BadInput: the model is another, a value is none of its, or a part of it would be fetched from elsewhere.
    """
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise BadInput(f"config.json: expected a model_type that transformers knows, got {kind!r}")
    _check_counts(values)
    try:
        config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(_leave_out_code(values))
    except StrictDataclassError as error:
        raise BadInput(f"config.json: expected values that a {kind} can have{instead(error)}") from error
    return config


def _check_counts(value: Any, most: int | None = None) -> None:
    """Refuses counts for which Python makes a list before any layer is built, however large."""
    if isinstance(value, dict):
        for key, inner in value.items():
            own = next((limit for part, limit in _MOST if isinstance(key, str) and part in key), None)
            _check_counts(inner, own or most)
    elif isinstance(value, list):
        for inner in value:
            _check_counts(inner, most)
    elif most is not None and isinstance(value, int | float) and value > most:
        raise BadInput(f"config.json: expected numbers of layers and labels of at most {most:,}, got a larger one")


def _leave_out_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _leave_out_code(inner) for key, inner in value.items() if not _is_code(key)}
    if isinstance(value, list):
        return [_leave_out_code(inner) for inner in value]
    if isinstance(value, str) and _ELSEWHERE.match(value):
        raise BadInput("config.json: expected a model whose parts are its own, got one that is fetched from elsewhere")
    return value


def _is_code(key: object) -> bool:
    return isinstance(key, str) and key.lstrip("_").startswith(_CODE)


def read_tokenizer(location: Location) -> bytes:
    """Returns the tokenizer as the tokenizers library's own JSON, without padding and truncation.

    Where tokenizer_config.json alone says that a token ends each text, the tokenizer adds it from then on: the features
    of a last position are that token's.

    Raises:
        BadInput: there is none, or it lacks that token.
    """
    path = location.file("tokenizer.json")
    try:
        tokenizer = (
            _convert_tokenizer(location) if path is None else tokenizers.Tokenizer.from_buffer(path.read_bytes())
        )
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"folder: expected a tokenizer.json, or files that convert to one{instead(error)}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _add_end_token(tokenizer, location)
    text: str = tokenizer.to_str()
    return text.encode()


def _add_end_token(tokenizer: tokenizers.Tokenizer, location: Location) -> None:
    settings = location.settings("tokenizer_config.json") or {}
    if settings.get("add_eos_token") is not True:
        return
    token = settings.get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    number = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if number is None:
        raise BadInput("folder: expected an eos_token of the tokenizer beside add_eos_token in tokenizer_config.json")
    plain, own = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    if own[-1:] == [number]:
        return
    before = next(place for place in range(len(own)) if own[place : place + len(plain)] == plain)
    added = [*own[:before], *own[before + len(plain) :], number]
    names = [tokenizer.id_to_token(each) for each in added]
    first = [*names[:before], "$A", *names[before:]]
    second = [f"{each}:1" for each in [*names[:before], "$B", *names[before:]]]
    tokenizer.post_processor = TemplateProcessing(
        single=first, pair=[*first, *second], special_tokens=sorted(set(zip(names, added, strict=True)))
    )


def load_model(location: Location, config: PretrainedConfig, opened_by: Any = AutoModel) -> tuple[Any, set[str]]:
    """Returns the model with its weights in float32, and the names of parameters that the weights lack.

    Args:
        location: the model.
        config: its configuration.
        opened_by: class of transformers that builds it; by default without the layers of any use.

    Raises:
        BadInput: no safetensors weights, or weights of another architecture.
    """
    try:
        with silence():
            model, info = opened_by.from_pretrained(
                str(location.name),
                config=config,
                revision=location.revision or "main",
                local_files_only=location.local_files_only,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"folder: expected weights as safetensors that fit the model's config.json{instead(error)}; "
            "pickled weights are not read: convert them with `save_pretrained`"
        ) from error
    return model.float(), set(info["missing_keys"])


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppresses progress bars and remarks about unused weights."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _convert_tokenizer(location: Location) -> tokenizers.Tokenizer:
    with silence():
        slow = AutoTokenizer.from_pretrained(
            str(location.name),
            revision=location.revision or "main",
            local_files_only=location.local_files_only,
            trust_remote_code=False,
        )
    return tokenizers.Tokenizer.from_buffer(slow.backend_tokenizer.to_str().encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"folder: expected a readable JSON file {path}{instead(error)}") from error
