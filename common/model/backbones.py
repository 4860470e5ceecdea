"""Open backbones: one with its weights, those of a run, and one that was sent.

A coordinator calls `open_pretrained` to load weights; a site receives them by digest and calls `load_blob`, which
builds the same architecture, loads strictly and verifies. Both end in a `Backbone`: frozen and in eval mode for ever.

# Shapes: B examples, D features.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from common.backbones import (
    Architecture,
    Bag,
    Kind,
    Language,
    Precision,
    Pretrained,
    PublicShift,
    RawInputs,
    ReadsBags,
    draw_random,
    find_public_mean_file,
    find_weights_file,
    read_pretrained,
    resolve_settings,
    write_spec,
)
from common.backbones.parts.graphs.sizes import check_network
from common.backbones.parts.projection import ProjectionLayer, compute_projection
from common.backbones.parts.public_mean import read_public_mean
from common.backbones.parts.weights import compute_digest, load_strict
from common.model.fast import FastBackbone
from common.plugins import Spec, resolve
from common.run import Name, RunConfig
from common.types import BackboneBlob, BadInput, DigestMismatch

MAX_WEIGHT_BYTES = 8 << 30
MAX_SPEC_CHARS = 1 << 20

_PLACES = ("folder", "package", "weights")
_FILLED_IN = ("files", "tower", "graph", "vocabulary_bytes")
"""Settings that are read from a place, where they are not filled in."""

_PLACE = "backbone: expected resolved settings without any location of weights"


@final
class FrozenBackbone(nn.Module):
    """Network, scale, projection: no parameter takes a gradient, and eval mode never ends."""

    scale: Tensor

    def __init__(self, network: nn.Module, projection: ProjectionLayer, num_marks: int = 0) -> None:
        super().__init__()
        self._num_marks = num_marks
        # This name prefixes the tensors that a digest covers.
        self.encoder = network
        self.register_buffer("scale", torch.ones(()))
        self.projection = projection
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stays in eval mode, whatever is asked: BatchNorm statistics of a frozen backbone never move."""
        del mode
        super().train(False)
        return self

    def forward(self, items_B: Tensor) -> Tensor:
        """Returns features_BD in float32, or B x grid x D."""
        raw_BD = self.encoder(items_B).to(torch.float32)
        if not self._num_marks:
            features_BD: Tensor = self.projection(raw_BD * self.scale)
            return features_BD
        raw_BD, marks_BM = raw_BD.tensor_split([-self._num_marks], dim=-1)
        return torch.cat([self.projection(raw_BD * self.scale), marks_BM], dim=-1)


@final
@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen backbone, ready to encode.

    Attributes:
        kind: the resolved settings.
        spec: the same as canonical JSON text.
        digest: 64 hex digits over `spec` and every weight.
        feature_dim: number of features per item, or of each of its places.
        prepare: source item -> input.
        module: the network with its projection.
        device: the device that it encodes on.
        precision: number format inside the network; the site's choice, not in the digest.
        open_raw: opens the inputs of a network that is handed on; None where there are none but preprocessed items.
        trunk: where this is only the frozen part of a backbone, the name of the trunk that its features still have to
            pass (`common.model.trunks`); else None.
        grid: number of places along each axis of an item's features; none where an item has one vector.
        num_marks: number of features at the end that are marks of places.
        language: what the network knows of the texts that it writes, computed on the CPU; None where it writes none.
        bag: the rule by which a record stays a bag of its items; None where their features are averaged.
    """

    kind: Kind
    spec: str
    digest: str
    feature_dim: int
    prepare: Callable[[Any], Tensor] = dataclasses.field(repr=False)
    module: FrozenBackbone = dataclasses.field(repr=False)
    device: torch.device
    precision: Precision = "float32"
    open_raw: Callable[[], RawInputs] | None = dataclasses.field(default=None, repr=False)
    trunk: str | None = None
    grid: tuple[int, ...] = ()
    num_marks: int = 0
    language: Language | None = dataclasses.field(default=None, repr=False)
    bag: Bag | None = None

    @cached_property
    def _fast(self) -> FastBackbone:
        return FastBackbone(self.module, self.precision, self.device)

    @property
    def error(self) -> float | None:
        """Relative distance of the first items' features from those in float32; None before any."""
        return self._fast.error

    def public_spec(self) -> dict[str, Any]:
        """Returns the resolved settings as plain values; they hold no path."""
        values: dict[str, Any] = json.loads(self.spec)
        return values

    def preprocess(self, item: Any) -> Tensor:
        """Returns one source item as one input. Raises BadRecord."""
        return self.prepare(item)

    def encode(self, items_B: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns features of records of one preprocessed item each: B x grid x D float32, on the CPU."""
        return join_items(self.encode_items(items_B), [1] * len(items_B), self.bag)

    def encode_items(self, items_B: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns features of preprocessed items in float32, on the CPU; heads can be trained on them."""
        batch = items_B if isinstance(items_B, Tensor) else torch.stack(list(items_B))
        # Again before every use: `train()` on an inner module would not pass through FrozenBackbone.train.
        self.module.train(False)
        with torch.inference_mode():
            features_BD = self._fast(batch.to(self.device, non_blocking=True))
        # Cloned outside: autograd refuses inference tensors, and heads train on these.
        return features_BD.cpu().clone()

    def blob(self) -> BackboneBlob:
        """Returns the backbone as it travels."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}
        return BackboneBlob(spec=self.spec, weights=save(state), digest=self.digest)

    def to(self, device: torch.device) -> Backbone:
        """Returns the same backbone on a device; this one stays where it is."""
        if device == self.device:
            return self
        return dataclasses.replace(self, module=copy.deepcopy(self.module).to(device), device=device)

    def at(self, precision: Precision) -> Backbone:
        """Returns the same backbone with this number format inside."""
        return dataclasses.replace(self, precision=precision)


def join_items(features_ID: Tensor, sizes: Sequence[int], bag: Bag | None) -> Tensor:
    """Returns the features of records from those of their items: the mean, or a bag with zeros behind the last.

    Args:
        features_ID: what `Backbone.encode_items` returned of the items of consecutive records.
        sizes: number of items of each record.
        bag: the backbone's rule for records of several items.
    """
    parts = torch.split(features_ID, list(sizes))
    if bag is not None:
        features_BND = features_ID.new_zeros(len(sizes), bag.max_items, *features_ID.shape[1:])
        for row, part_ID in zip(features_BND, parts, strict=True):
            row[: len(part_ID)] = part_ID
        return features_BND
    if len(features_ID) == len(sizes):
        return features_ID
    return torch.stack([part_ID.mean(dim=0) for part_ID in parts])


@dataclass(frozen=True)
class Untrained:
    """A network to pre-train: not frozen, in train mode, freshly initialised.

    Attributes:
        kind: the backbone's settings.
        module: batch of preprocessed items -> raw features; its state is what `WeightedKind.pretrained` reads.
        feature_dim: number of raw features.
        weights_path: the file that `open_pretrained` will read; None where the settings name none.
        grid: number of places along each axis of an item's features; none where an item has one vector.
        language: what the network will know of the texts that it writes; None where it writes none.
    """

    kind: Kind
    module: nn.Module
    feature_dim: int
    weights_path: Path | None
    grid: tuple[int, ...] = ()
    language: Language | None = None

    def preprocess(self, item: Any) -> Tensor:
        """Returns one source item as one input. Raises BadRecord."""
        return self.kind.preprocess(item)


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Returns the device to encode on. Raises BadInput where `cuda` is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("device: expected a CUDA device, found none; write auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def open_pretrained(spec: Spec | Mapping[str, Any], key: str) -> Backbone:
    """Returns the backbone that settings ask for, with its weights. Torch's generators are left as they were.

    Raises:
        BadInput: unknown kind or setting; weights missing, misfit, or not plain tensors; a projection they do
            not allow.
    """
    kind: Kind = resolve("common.backbones", spec, key)
    with torch.random.fork_rng(devices=[]):
        return _assemble(kind, _read_with_public_mean, key)


def open_random(spec: Spec | Mapping[str, Any], key: str, seed: int) -> Backbone:
    """Returns the same architecture and preprocessing with random weights.

    Args:
        spec: settings of the backbone.
        key: key of the settings in their file, for messages.
        seed: seed of the weights.

    Raises:
        BadInput: the kind has no weights that could be random; an unknown kind or setting.
    """
    kind: Kind = resolve("common.backbones", spec, key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _assemble(kind, draw_random, key)


def open_untrained(spec: Spec | Mapping[str, Any], key: str, seed: int) -> Untrained:
    """Returns the architecture that settings ask for, trainable.

    Args:
        spec: settings of the backbone.
        key: key of the settings in their file, for messages.
        seed: seed of the initial weights.

    Raises:
        BadInput: an unknown kind or setting.
    """
    kind: Kind = resolve("common.backbones", spec, key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            architecture = kind.architecture()
        except BadInput as error:
            # Of a setting, or of the network as a whole.
            names_setting = re.match(r"[\w.]+: ", str(error)) is not None
            raise BadInput(f"{key}.{error}" if names_setting else f"{key}: {error}") from error
    weights_path = find_weights_file(kind)
    return Untrained(
        kind, architecture.module, architecture.feature_dim, weights_path, architecture.grid, architecture.language
    )


def load_blob(blob: BackboneBlob, max_weight_bytes: int = MAX_WEIGHT_BYTES) -> Backbone:
    """Returns the backbone that was sent, verified against its digest. Nothing in it is executed or unpickled.

    Args:
        blob: settings, weights and digest as received.
        max_weight_bytes: larger weights are refused unread, and a larger network before memory is taken for it.

    Raises:
        DigestMismatch: settings or weights are not the ones the digest names.
        BadInput: malformed or oversized; settings that are not resolved; weights that do not fit the architecture.
    """
    state = verify_blob(blob, max_weight_bytes)
    values = json.loads(blob.spec)
    if not isinstance(values, dict):
        raise BadInput("backbone: expected settings with keys")
    kind: Kind = resolve("common.backbones", values, "backbone")
    _refuse_places(kind)
    if write_spec(resolve_settings(kind)) != blob.spec:
        raise BadInput(_PLACE)
    try:
        check_network(kind, max_weight_bytes)
    except BadInput as error:
        raise BadInput(f"backbone: {error}") from error
    with torch.random.fork_rng(devices=[]):
        return _freeze(kind, kind.architecture(), state, "backbone: the received weights")


def _refuse_places(kind: Kind) -> None:
    """Refuses settings that name a place, before it is looked at: a site opens no folder and asks no Hub. BadInput."""
    named = any(getattr(kind, key, None) is not None for key in _PLACES) or "/" in (getattr(kind, "model", None) or "")
    if named or any(getattr(kind, key, True) is None for key in _FILLED_IN):
        raise BadInput(_PLACE)
    encoder = getattr(kind, "encoder", None)
    if isinstance(encoder, Spec):
        _refuse_places(resolve("common.backbones", encoder, "encoder"))


def verify_blob(blob: BackboneBlob, max_weight_bytes: int = MAX_WEIGHT_BYTES) -> dict[str, Tensor]:
    """Returns the weights that were sent, once they and the settings are known to be those the digest names.

    Nothing is built before: settings that nobody vouches for could ask for any amount of memory.

    Raises:
        DigestMismatch: they are not.
        BadInput: malformed or oversized.
    """
    if len(blob.weights) > max_weight_bytes or len(blob.spec) > MAX_SPEC_CHARS:
        raise BadInput(f"backbone: expected at most {max_weight_bytes} bytes of weights, got {len(blob.weights)}")
    try:
        state = load(bytes(blob.weights))
        json.loads(blob.spec)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise BadInput("backbone: expected JSON settings and safetensors weights, got something else") from error
    if compute_digest(blob.spec, state.items()) != blob.digest:
        raise DigestMismatch("backbone: the received settings and weights are not the ones that were agreed on")
    return state


def open_backbones(
    run: RunConfig, prefix: str = "", opened_by: Callable[[Spec, str], Backbone] = open_pretrained
) -> dict[Name, Backbone]:
    """Returns every backbone of a run, with its weights.

    Args:
        run: the run.
        prefix: beginning of keys in error messages, where the run stands inside another file.
        opened_by: settings and their key -> backbone.

    Raises:
        BadInput: one of them cannot be opened, or is not what the pack that the file names says.
    """
    opened = {}
    for name, spec in run.backbone_specs.items():
        key = prefix + run.backbone_key(name)
        opened[name] = opened_by(spec, key)
        stated = run.stated_weights.get(name) if opened_by is open_pretrained else None
        if stated is not None and stated.digest and stated.part:
            # The digest of the whole covers more: the part is opened once by itself.
            part_key = f"{key}.{stated.part}"
            whole = resolve("common.backbones", spec, key).model_dump(mode="json", by_alias=True)
            stated.check(open_pretrained(whole[stated.part], part_key).digest, part_key)
        elif stated is not None:
            stated.check(opened[name].digest, key)
    return opened


def _assemble(kind: Kind, read_weights: Callable[[Kind], Pretrained], key: str) -> Backbone:
    try:
        return _build(kind, read_weights(kind))
    except BadInput as error:
        raise BadInput(f"{key}.{error}") from error


def _read_with_public_mean(kind: Kind) -> Pretrained:
    """Returns a kind's weights, with the declared public mean as shift where its projection names one."""
    if isinstance(kind, ReadsBags):
        try:
            of_item = _read_with_public_mean(kind.open_encoder())
        except BadInput as error:
            raise BadInput(f"encoder.{error}") from error
        return kind.join_weights(of_item)
    parts = read_pretrained(kind)
    if kind.projection is None or not isinstance(kind.projection.shift, PublicShift):
        return parts
    # The mean was made with the backbone that has no projection, and names it by its digest.
    plain = _build(kind.model_copy(update={"projection": None}), parts)
    return dataclasses.replace(parts, shift_D=read_public_mean(find_public_mean_file(kind), plain.digest))


def _build(kind: Kind, parts: Pretrained) -> Backbone:
    state = {f"encoder.{name}": tensor for name, tensor in parts.state.items()}
    state["scale"] = torch.tensor(parts.scale)
    resolved = resolve_settings(kind)
    architecture = resolved.architecture()
    raw_dim = architecture.feature_dim - architecture.num_marks
    projection = compute_projection(resolved.projection, raw_dim, parts.classifier_KD, parts.shift_D)
    state |= {f"projection.{name}": tensor for name, tensor in projection.items()}
    return _freeze(resolved, architecture, state, "weights")


def _freeze(resolved: Kind, architecture: Architecture, state: Mapping[str, Tensor], source: str) -> Backbone:
    projection = ProjectionLayer(resolved.projection, architecture.feature_dim - architecture.num_marks)
    module = FrozenBackbone(architecture.module, projection, architecture.num_marks)
    load_strict(module, state, source)
    spec = write_spec(resolved)
    digest = compute_digest(spec, module.state_dict().items())
    prepare = architecture.preprocess or resolved.preprocess
    return Backbone(
        resolved,
        spec,
        digest,
        projection.out_dim + architecture.num_marks,
        prepare,
        module,
        torch.device("cpu"),
        open_raw=architecture.open_raw,
        grid=architecture.grid,
        num_marks=architecture.num_marks,
        language=architecture.language,
        bag=architecture.bag,
    )
