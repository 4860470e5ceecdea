"""Frozen pre-trained encoders. One file is one kind; see `Kind` for what it must provide.

A coordinator calls `open_pretrained` to load weights; a site receives them by digest and calls `from_blob`, which
builds the same architecture, loads strictly and verifies. Both end in a `Backbone`: frozen and in eval mode for ever.

# Shapes: B examples, D features.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from common.backbones.parts.fast import FastEncoder, Precision
from common.backbones.parts.kind import Architecture, Example, Kind, Pretrained
from common.backbones.parts.projection import ProjectionLayer, projection_state
from common.backbones.parts.weights import digest_of, load_strict
from common.plugins import Spec, resolve
from common.types import BackboneBlob, BadInput, DigestMismatch

__all__ = [
    "Architecture",
    "Backbone",
    "Example",
    "FrozenEncoder",
    "Kind",
    "Precision",
    "Pretrained",
    "ProjectionLayer",
    "Untrained",
    "check_blob",
    "from_blob",
    "open_pretrained",
    "open_random",
    "open_untrained",
]

MAX_WEIGHT_BYTES = 8 << 30
MAX_SPEC_CHARS = 1 << 20


@final
class FrozenEncoder(nn.Module):
    """Encoder, scale, projection: no parameter takes a gradient, and eval mode never ends."""

    scale: Tensor

    def __init__(self, encoder: nn.Module, projection: ProjectionLayer) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("scale", torch.ones(()))
        self.projection = projection
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode, whatever is asked: BatchNorm statistics of a frozen backbone never move."""
        del mode
        super().train(False)
        return self

    def forward(self, items_B: Tensor) -> Tensor:
        """features_BD in float32."""
        features_BD: Tensor = self.projection(self.encoder(items_B).to(torch.float32) * self.scale)
        return features_BD


@final
@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen backbone, ready to encode.

    Attributes:
        kind: its resolved settings.
        spec: JSON text of them, canonical: the same settings are the same text.
        digest: 64 hex digits over `spec` and every weight.
        feature_dim: number of features per item.
        prepare: makes an input of an item.
        device: where it encodes.
        precision: of the encoder's inside; the site's choice, not in the digest.
        trunk: where it is a backbone's frozen part, the entry of the heads that its features still have to pass
            (`common.model.trunks`).
    """

    kind: Kind
    spec: str
    digest: str
    feature_dim: int
    prepare: Callable[[Any], Tensor] = dataclasses.field(repr=False)
    module: FrozenEncoder = dataclasses.field(repr=False)
    device: torch.device
    precision: Precision = "float32"
    trunk: str | None = None

    @cached_property
    def _encoder(self) -> FastEncoder:
        return FastEncoder(self.module, self.precision, self.device)

    @property
    def error(self) -> float | None:
        """How far features are from those of float32, relative, seen on the first items; None before any."""
        return self._encoder.error

    def public_spec(self) -> dict[str, Any]:
        """The resolved settings as plain values; they hold no path."""
        values: dict[str, Any] = json.loads(self.spec)
        return values

    def preprocess(self, item: Any) -> Tensor:
        """One source item as one input. Raises BadRecord."""
        return self.prepare(item)

    def encode(self, items_B: Tensor | Sequence[Tensor]) -> Tensor:
        """features_BD of preprocessed items, float32, on the CPU; heads can be trained on them."""
        batch = items_B if isinstance(items_B, Tensor) else torch.stack(list(items_B))
        # Again before every use: `train()` on an inner module would not pass through FrozenEncoder.train.
        self.module.train(False)
        with torch.inference_mode():
            features_BD = self._encoder(batch.to(self.device, non_blocking=True))
        # Cloned outside: autograd refuses inference tensors, and heads train on these.
        return features_BD.cpu().clone()

    def blob(self) -> BackboneBlob:
        """The backbone as it travels."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}
        return BackboneBlob(spec=self.spec, weights=save(state), digest=self.digest)

    def to(self, device: torch.device) -> Backbone:
        """The same backbone on a device; this one stays where it is."""
        if device == self.device:
            return self
        return dataclasses.replace(self, module=copy.deepcopy(self.module).to(device), device=device)

    def at(self, precision: Precision) -> Backbone:
        """The same backbone, computing inside in this precision."""
        return dataclasses.replace(self, precision=precision)


@dataclass(frozen=True)
class Untrained:
    """An encoder to pre-train: not frozen, in train mode, freshly initialised.

    Attributes:
        kind: its settings.
        module: batch of preprocessed items -> raw features; its state is what `Kind.pretrained` reads.
        feature_dim: number of raw features.
        weights_path: the file that `open_pretrained` will read.
    """

    kind: Kind
    module: nn.Module
    feature_dim: int
    weights_path: Path | None

    def preprocess(self, item: Any) -> Tensor:
        """One source item as one input. Raises BadRecord."""
        return self.kind.preprocess(item)


def open_pretrained(spec: Spec | Mapping[str, Any], key: str) -> Backbone:
    """The backbone a run asks for, with its weights. Torch's generators are left as they were.

    Raises:
        BadInput: unknown kind or setting; weights missing, misfit, or not plain tensors; a projection they do
            not allow.
    """
    kind: Kind = resolve("common.backbones", spec, key)
    with torch.random.fork_rng(devices=[]):
        return _assemble(kind, kind.pretrained, key)


def open_random(spec: Spec | Mapping[str, Any], key: str, seed: int) -> Backbone:
    """The same architecture and preprocessing with random weights, reproducible from `seed`.

    Raises:
        BadInput: the kind has no weights that could be random; an unknown kind or setting.
    """
    kind: Kind = resolve("common.backbones", spec, key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _assemble(kind, kind.random, key)


def open_untrained(spec: Spec | Mapping[str, Any], key: str, seed: int) -> Untrained:
    """The architecture a run asks for, trainable, its initial weights reproducible from `seed`."""
    kind: Kind = resolve("common.backbones", spec, key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = kind.architecture()
    return Untrained(kind, encoder.module, encoder.feature_dim, kind.weights_file())


def from_blob(blob: BackboneBlob, max_weight_bytes: int = MAX_WEIGHT_BYTES) -> Backbone:
    """The backbone that was sent, verified against its digest. Nothing in it is executed or unpickled.

    Args:
        blob: settings, weights and digest as received.
        max_weight_bytes: larger weights are refused unread.

    Raises:
        DigestMismatch: settings or weights are not the ones the digest names.
        BadInput: malformed or oversized; settings that are not resolved; weights that do not fit the architecture.
    """
    state = check_blob(blob, max_weight_bytes)
    values = json.loads(blob.spec)
    if not isinstance(values, dict):
        raise BadInput("backbone: expected settings with keys")
    kind: Kind = resolve("common.backbones", values, "backbone")
    if _canonical(kind.resolved()) != blob.spec:
        raise BadInput("backbone: expected resolved settings without any location of weights")
    with torch.random.fork_rng(devices=[]):
        return _frozen(kind, kind.architecture(), state, "backbone: the received weights")


def check_blob(blob: BackboneBlob, max_weight_bytes: int = MAX_WEIGHT_BYTES) -> dict[str, Tensor]:
    """The weights that were sent, once they and the settings are known to be those the digest names.

    Nothing is built before: settings that nobody vouches for could ask for any amount of memory.

    Raises:
        DigestMismatch: they are not.
        BadInput: malformed or oversized.
    """
    if len(blob.weights) > max_weight_bytes or len(blob.spec) > MAX_SPEC_CHARS:
        raise BadInput(f"backbone: expected at most {max_weight_bytes} bytes of weights, got {len(blob.weights)}")
    try:
        state = load(blob.weights)
        json.loads(blob.spec)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise BadInput("backbone: expected JSON settings and safetensors weights, got something else") from error
    if digest_of(blob.spec, state.items()) != blob.digest:
        raise DigestMismatch("backbone: the received settings and weights are not the ones that were agreed on")
    return state


def _assemble(kind: Kind, weights: Callable[[], Pretrained], key: str) -> Backbone:
    try:
        parts = weights()
        state = {f"encoder.{name}": tensor for name, tensor in parts.state.items()}
        state["scale"] = torch.tensor(parts.scale)
        resolved = kind.resolved()
        encoder = resolved.architecture()
        projection = projection_state(kind.projection, encoder.feature_dim, parts.classifier_KD, parts.shift_D)
        state |= {f"projection.{name}": tensor for name, tensor in projection.items()}
        return _frozen(resolved, encoder, state, "weights")
    except BadInput as error:
        raise BadInput(f"{key}.{error}") from error


def _frozen(resolved: Kind, encoder: Architecture, state: Mapping[str, Tensor], source: str) -> Backbone:
    projection = ProjectionLayer(resolved.projection, encoder.feature_dim)
    module = FrozenEncoder(encoder.module, projection)
    load_strict(module, state, source)
    spec = _canonical(resolved)
    digest = digest_of(spec, module.state_dict().items())
    prepare = encoder.preprocess or resolved.preprocess
    return Backbone(resolved, spec, digest, projection.out_dim, prepare, module, torch.device("cpu"))


def _canonical(kind: Kind) -> str:
    return json.dumps(kind.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
