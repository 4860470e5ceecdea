"""A transformers model as a network that gives features, whole or divided between two of its layers.

Below: embeddings and the first layers, as the model itself runs them. Above: the other layers, one after the other, the
model's last norm where it has one, and pooling. Where records have lengths, positions carry masks as further features:
which of them others read, and of recordings also which of them are pooled.

# Shapes: B examples, T positions, D features, H and W places of a picture.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, final

import tokenizers
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from common.backbones import Divided
from common.backbones.parts.boundary import check_whole
from common.backbones.parts.hub.modalities import Modality, TextInput
from common.backbones.parts.hub.recordings import AudioInput
from common.backbones.parts.hub.stack import (
    Handed,
    LayerCall,
    Reached,
    Stop,
    Watched,
    find_layers,
    make_probe,
    stop_before,
    watch,
)
from common.errors import instead
from common.types import BadInput

UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of a model on inputs that it does not take."""


def pool_positions(hidden_BTD: Tensor, mask_BT: Tensor | None, pooling: str, max_positions: int | None) -> Tensor:
    """Returns features_BD, or B x (T * D) of all positions, zeros where a text has ended.

    Args:
        hidden_BTD: [B, T, D], the model's outputs.
        mask_BT: [B, T], 1 where a position counts; None where all do.
        pooling: `mean`, `cls`, `last` or `tokens`, as in the settings.
        max_positions: number of positions of `tokens`; None for T.
    """
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "last":
        if mask_BT is None:
            return hidden_BTD[:, -1]
        last_B = (mask_BT.sum(1).long() - 1).clamp(min=0)
        return hidden_BTD.gather(1, last_B[:, None, None].expand(-1, 1, hidden_BTD.shape[2]))[:, 0]
    if mask_BT is not None:
        hidden_BTD = hidden_BTD * mask_BT.unsqueeze(2)
    if pooling == "tokens":
        missing = 0 if max_positions is None else max_positions - hidden_BTD.shape[1]
        return nn.functional.pad(hidden_BTD, (0, 0, 0, missing)).flatten(1)
    count = hidden_BTD.shape[1] if mask_BT is None else mask_BT.sum(1, keepdim=True)
    return hidden_BTD.float().sum(1) / count


def find_device(model: nn.Module) -> torch.device:
    """Returns the device of a model's parameters: meta where any of them has no memory.

    Some models make a few on the CPU whatever the device is, such as wav2vec2 the vector of masked steps.
    """
    devices = [parameter.device for parameter in model.parameters()]
    return next((device for device in devices if device.type == "meta"), devices[0])


def list_positions(hidden: Tensor) -> Tensor:
    """Returns outputs as positions [B, T, D]; those of convolutional encoders are B x D x H x W or B x H x W x D."""
    if hidden.ndim != 4:
        return hidden
    _, first, second, last = hidden.shape
    # The axis of another length than the other two are those of features; most encoders have them first.
    if first == second != last:
        return hidden.flatten(1, 2)
    return hidden.flatten(2).transpose(1, 2)


@final
class LowerLayers(nn.Module):
    """Preprocessed items -> input of a layer, [B, T, D] and perhaps masks, or what a picture's layers have."""

    def __init__(self, model: nn.Module, stop: Stop, modality: Modality, positions: int | None, num_masks: int) -> None:
        """Stores a model that stops before a layer (`stop_before`).

        Args:
            model: the model.
            stop: what stops it.
            modality: how it reads a batch.
            positions: number of positions of every record; None where nothing is masked.
            num_masks: number of masks behind the features: 0, 1 or 2.
        """
        super().__init__()
        self.model = model
        self.modality = modality
        self._stop = stop
        self.positions = positions
        self.num_masks = num_masks

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns the layer's input; zeros, in the masks too, where a record has ended."""
        if torch.compiler.is_exporting():
            # A graph has no groups: padding is masked, and all texts of a batch are as long as the longest.
            return self.run(inputs_B)
        positions, states = [], []
        for rows, group_B in self.modality.groups(inputs_B):
            positions.append(rows)
            states.append(self.run(group_B)[: len(rows)])
        encoded_B = torch.cat(states)
        whole_B = encoded_B.new_zeros((len(inputs_B), *encoded_B.shape[1:]))
        whole_B[torch.cat(positions)] = encoded_B
        return whole_B

    def run(self, group_B: Tensor) -> Tensor:
        """Returns the layer's input of one group, padded."""
        hidden: Tensor | None
        try:
            self.modality.run(self.model, group_B)
        except Reached as reached:
            hidden = reached.hidden
        else:
            hidden, self._stop.hidden = self._stop.hidden, None
        if hidden is None:
            raise BadInput("from: expected a backbone whose layers run one after the other")
        if not self.num_masks:
            return hidden
        pooled_BT = self.modality.mark(self.model, group_B, hidden.shape[1])
        if pooled_BT is None:
            pooled_BT = torch.ones_like(hidden[:, :, 0])
        pooled_BT1 = pooled_BT.unsqueeze(2).to(hidden.dtype)
        if self.num_masks == 2:
            hidden = torch.cat([hidden, torch.ones_like(pooled_BT1), pooled_BT1], dim=2)
        else:
            hidden = torch.cat([hidden * pooled_BT1, pooled_BT1], dim=2)
        if self.positions is None:
            return hidden
        return nn.functional.pad(hidden, (0, 0, 0, self.positions - hidden.shape[1]))


@final
class UpperLayers(nn.Module):
    """Outputs of `LowerLayers` -> raw features."""

    def __init__(
        self, layers: nn.ModuleList, handed: Handed, norm: nn.Module | None, network: PooledModel, num_masks: int
    ) -> None:
        """Stores the layers.

        Args:
            layers: the layers.
            handed: what the model hands to each.
            norm: the model's last norm; None where there is none.
            network: the whole, whose pooling this has.
            num_masks: number of masks behind the features.
        """
        super().__init__()
        self.layers = layers
        self.norm = norm
        self.handed = handed
        self.dense = network.dense
        self.pooling = network.pooling
        self.num_masks = num_masks
        self.max_positions = network.max_positions

    def forward(self, states: Tensor) -> Tensor:
        """Returns features_BD, or B x (T * D)."""
        hidden, read_BT, pooled_BT = states, None, None
        if self.num_masks:
            # Only as many positions as the longest record has: the others are masked for everyone.
            read_BT = states[:, :, -self.num_masks]
            if torch.compiler.is_exporting():
                longest = states.shape[1]
            else:
                longest = max(1, int(read_BT.sum(1).max())) if len(states) else 1
            hidden, read_BT = states[:, :longest, : -self.num_masks], read_BT[:, :longest]
            pooled_BT = states[:, :longest, -1]
        self.handed.padding.read_BT = read_BT
        try:
            for number, layer in enumerate(self.layers):
                output = layer(hidden, **self.handed.list_arguments(number, hidden, read_BT))
                hidden = output[0] if isinstance(output, tuple) else output
        finally:
            self.handed.padding.read_BT = None
        if self.norm is not None:
            hidden = self.norm(hidden)
        features_BD = pool_positions(list_positions(hidden), pooled_BT, self.pooling, self.max_positions)
        return self.dense(features_BD) if len(self.dense) else features_BD


@final
class PooledModel(nn.Module):
    """A transformers model and the pooling of its output; one that reads text has its tokenizer's bytes as a buffer."""

    modality: Modality
    tokenizer: Tensor

    def __init__(self, model: nn.Module, tokenizer_bytes: int, pooling: str, dense: Sequence[nn.Module] = ()) -> None:
        """Stores a model.

        Args:
            model: the model.
            tokenizer_bytes: length of its tokenizer; 0 for none.
            pooling: as in the settings.
            dense: what follows the pooling.
        """
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.dense = nn.Sequential(*dense)
        self.max_positions: int | None = None
        self.tokenizer_bytes = tokenizer_bytes
        self._opened: tokenizers.Tokenizer | None = None
        if tokenizer_bytes:
            self.register_buffer("tokenizer", torch.zeros(tokenizer_bytes, dtype=torch.uint8))

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns features_BD, or B x (T * D); zeros for inputs that are nothing but padding."""
        if torch.compiler.is_exporting():
            return self._pool(*self.modality.run(self.model, inputs_B)).float()
        positions, pooled = [], []
        for rows, group_B in self.modality.groups(inputs_B):
            output, mask_BL = self.modality.run(self.model, group_B)
            positions.append(rows)
            pooled.append(self._pool(output, mask_BL)[: len(rows)].float())
        encoded_BD = torch.cat(pooled)
        features_BD = encoded_BD.new_zeros((len(inputs_B), encoded_BD.shape[1]))
        features_BD[torch.cat(positions)] = encoded_BD
        return features_BD

    def open_tokenizer(self, max_length: int) -> tokenizers.Tokenizer:
        """Returns the tokenizer whose bytes travelled with the weights. Raises BadInput for other bytes."""
        if self._opened is None:
            data = self.tokenizer.cpu().numpy().tobytes()
            try:
                json.loads(data)
                opened = tokenizers.Tokenizer.from_buffer(data)
            except (ValueError, RecursionError) as error:
                raise BadInput("backbone: expected a tokenizer among the weights, got other bytes") from error
            opened.enable_truncation(max_length)
            self._opened = opened
        return self._opened

    def measure(self, positions: int | None = None) -> int:
        """Returns the number of features, by encoding one random input.

        Args:
            positions: number of positions of `tokens`, where inputs have fewer; None for as many as an input has.

        Raises:
            BadInput: the model does not give finite features for such an input.
        """
        self.train(False)
        device = find_device(self.model)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            probe_B = self.modality.noise(1)
        self.max_positions = positions
        try:
            with torch.no_grad(), torch.device(device):
                features_BD = self._pool(*self.modality.run(self.model, probe_B.to(device)))
        except UNFIT as error:
            raise BadInput(
                "model: expected one that encodes such inputs by themselves, got one that needs more beside them, or "
                "whose config.json does not fit itself"
            ) from error
        if features_BD.ndim != 2 or (device.type != "meta" and not bool(torch.isfinite(features_BD).all())):
            raise BadInput("model: expected one that gives finite features of each position")
        return features_BD.shape[1]

    def _pool(self, output: Any, mask_BL: Tensor | None) -> Tensor:
        features_BD = self._pool_output(output, mask_BL)
        if len(self.dense):
            features_BD = self.dense(features_BD.float())
        return features_BD

    def _pool_output(self, output: Any, mask_BL: Tensor | None) -> Tensor:
        if self.pooling == "pooler":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise BadInput("pooling: expected mean, cls, last or tokens for a model without a pooler of its own")
            return pooled.flatten(1)
        hidden = getattr(output, "last_hidden_state", None)
        # Some convolutional nets give the outputs of stages alone.
        hidden_BTD = list_positions(output.feature_maps[-1] if hidden is None else hidden)
        if mask_BL is not None and mask_BL.shape[1] != hidden_BTD.shape[1]:
            raise BadInput("model: expected one with a position for each part of its input")
        return pool_positions(hidden_BTD, mask_BL, self.pooling, self.max_positions)


def count_positions(model: nn.Module, config: PretrainedConfig) -> int | None:
    """Returns the number of tokens that a model has positions for; None where it sets no bound.

    RoBERTa and its kin count positions from behind that of the padding token: they take fewer tokens than
    `max_position_embeddings` says.
    """
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is None or most < 1:
        return None
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and name.rpartition(".")[2] == "position_embeddings":
            first = 0 if part.padding_idx is None else part.padding_idx + 1
            return min(most, part.num_embeddings - first)
    return most


def read_width(model: nn.Module, config: PretrainedConfig) -> int:
    """Returns the number of features of one position, as a model's configuration says it. Raises BadInput."""
    own = getattr(model, "config", config)
    sizes = getattr(own, "hidden_sizes", None)
    width = sizes[-1] if sizes else getattr(own, "hidden_size", None)
    if not isinstance(width, int):
        raise BadInput("folder: expected a model whose configuration says its hidden_size; name its encoder by `part`")
    return width


def find_parts(whole: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the models inside a model, by name, outer ones first."""
    inner = [(name, part) for name, part in whole.named_modules() if name and isinstance(part, PreTrainedModel)]
    return sorted(inner, key=lambda pair: pair[0].count("."))


def divide(network: PooledModel, first: int, block: str) -> Divided:
    """Returns both sides of a layer's input.

    Args:
        network: the whole, in eval mode, perhaps without memory (device meta).
        first: number of the layer.
        block: its name, for messages.

    Raises:
        BadInput: the network cannot be divided there.
    """
    if network.pooling == "pooler":
        raise BadInput("from: expected a backbone with pooling mean, cls, last or tokens, got `pooler`")
    modality = network.modality
    device = find_device(network)
    name, layers = find_layers(network.model)
    is_audio = isinstance(modality, AudioInput)
    alone = isinstance(modality, AudioInput) and not modality.whole
    try:
        watched = watch(network.model, modality, name, alone=alone)
    except UNFIT as error:
        if device.type != "meta":
            raise BadInput(f"from: expected a backbone whose layers can be watched{instead(error)}") from error
        watched = Watched(tuple(LayerCall() for _ in layers), None)
    lower = copy.deepcopy(network).model
    stop = stop_before(lower, name, first)
    norm = network.model.get_submodule(watched.norm) if watched.norm else None
    handed = Handed(layers[first:], watched.calls[first:], adds_mask=alone)
    probe_B = make_probe(modality).to(device)
    num_masks = 2 if is_audio else int(modality.mark(network.model, probe_B, probe_B.shape[1] - 1) is not None)
    above = UpperLayers(layers[first:], handed, norm, network, num_masks)
    positions = modality.max_length if isinstance(modality, TextInput) else None
    with torch.no_grad():
        below = LowerLayers(lower, stop, modality, positions, num_masks)
        if is_audio:
            below.positions = below.run(probe_B[:1]).shape[1]
        if device.type == "meta":
            one = below.run(probe_B[:1])
            return Divided(below, above, (positions or one.shape[1], *one.shape[2:]))
        at_boundary_B = below(probe_B)
        check_whole(above(at_boundary_B), network(probe_B), block)
    return Divided(below, above, tuple(at_boundary_B.shape[1:]))
