"""A transformers model as a network that gives features, whole or divided between two of its layers.

Below: embeddings and the first layers, as the model itself runs them. Above: the other layers, one after the other, the
model's last norm where it has one, and pooling. A text's outputs carry its mask as one more feature of each position.

# Shapes: B examples, T positions, D features.
"""

from __future__ import annotations

import json
from typing import Any, final

import tokenizers
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from common.backbones.parts.hub.modalities import Modality
from common.types import BadInput


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the name and the layers of a model's stack. Raises BadInput where it has none."""
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and len({type(layer) for layer in part}) == 1:
            return name, part
    raise BadInput("from: expected a backbone made of layers of one kind")


def pool_positions(hidden_BTD: Tensor, mask_BT: Tensor | None, pooling: str, max_positions: int | None) -> Tensor:
    """Returns features_BD, or B x (T * D) of all positions, zeros where a text has ended.

    Args:
        hidden_BTD: [B, T, D], the model's outputs.
        mask_BT: [B, T], 1 where a position counts; None where all do.
        pooling: `mean`, `cls` or `tokens`, as in the settings.
        max_positions: number of positions of `tokens`; None for T.
    """
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if mask_BT is not None:
        hidden_BTD = hidden_BTD * mask_BT.unsqueeze(2)
    if pooling == "tokens":
        missing = 0 if max_positions is None else max_positions - hidden_BTD.shape[1]
        return nn.functional.pad(hidden_BTD, (0, 0, 0, missing)).flatten(1)
    count = hidden_BTD.shape[1] if mask_BT is None else mask_BT.sum(1, keepdim=True)
    return hidden_BTD.float().sum(1) / count


@final
class LowerLayers(nn.Module):
    """Preprocessed items -> outputs of the first layers, B x T x D, or with a mask B x T x (D + 1)."""

    def __init__(self, model: nn.Module, modality: Modality, max_length: int | None) -> None:
        """Stores a model that keeps only its first layers.

        Args:
            model: the model without its upper layers and last norm.
            modality: how it reads a batch.
            max_length: number of positions of every text; None where nothing is masked.
        """
        super().__init__()
        self.model = model
        self.modality = modality
        self.max_length = max_length

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns the outputs; zeros, in the mask too, where a text has ended."""
        if torch.compiler.is_exporting():
            # A graph has no groups: padding is masked, and all texts of a batch are as long as the longest.
            return self._run(inputs_B)
        positions, states = [], []
        for rows, group_B in self.modality.groups(inputs_B):
            positions.append(rows)
            states.append(self._run(group_B)[: len(rows)])
        return torch.cat(states)[torch.argsort(torch.cat(positions))]

    def _run(self, group_B: Tensor) -> Tensor:
        output, mask_BT = self.modality.run(self.model, group_B)
        hidden_BTD: Tensor = output.last_hidden_state
        if self.max_length is None:
            return hidden_BTD
        assert mask_BT is not None
        mask_BT1 = mask_BT.unsqueeze(2).to(hidden_BTD.dtype)
        hidden_BTD = torch.cat([hidden_BTD * mask_BT1, mask_BT1], dim=2)
        return nn.functional.pad(hidden_BTD, (0, 0, 0, self.max_length - hidden_BTD.shape[1]))


@final
class UpperLayers(nn.Module):
    """Outputs of `LowerLayers` -> raw features."""

    def __init__(
        self, layers: nn.ModuleList, norm: nn.Module | None, pooling: str, *, masked: bool, max_positions: int | None
    ) -> None:
        super().__init__()
        self.layers = layers
        self.norm = norm
        self.pooling = pooling
        self.masked = masked
        self.max_positions = max_positions

    def forward(self, states: Tensor) -> Tensor:
        """Returns features_BD, or B x (T * D)."""
        hidden_BTD, mask_BT, more = states, None, {}
        if self.masked:
            # Only as many positions as the longest text has: the others are masked for everyone.
            if torch.compiler.is_exporting():
                longest = states.shape[1]
            else:
                longest = max(1, int(states[:, :, -1].sum(1).max())) if len(states) else 1
            hidden_BTD, mask_BT = states[:, :longest, :-1], states[:, :longest, -1]
            more = {"attention_mask": _create_additive_mask(mask_BT)}
        for layer in self.layers:
            output = layer(hidden_BTD, **more)
            hidden_BTD = output[0] if isinstance(output, tuple) else output
        if self.norm is not None:
            hidden_BTD = self.norm(hidden_BTD)
        return pool_positions(hidden_BTD, mask_BT, self.pooling, self.max_positions)


def _create_additive_mask(mask_BT: Tensor) -> Tensor:
    """Returns 0 where a position counts and the least number where not, for each head and query."""
    return ((1.0 - mask_BT) * torch.finfo(mask_BT.dtype).min)[:, None, None, :]


def find_last_norm(model: nn.Module, stack: str) -> str | None:
    """Returns the name of the norm that a model applies after its layers; None where there is none."""
    names = [name for name, _ in model.named_children()]
    after = names[names.index(stack.split(".")[0]) + 1 :]
    norms = [name for name in after if isinstance(model.get_submodule(name), nn.LayerNorm)]
    return norms[0] if norms else None


@final
class PooledModel(nn.Module):
    """A transformers model and the pooling of its output; one that reads text has its tokenizer's bytes as a buffer."""

    modality: Modality
    tokenizer: Tensor

    def __init__(self, model: nn.Module, tokenizer_bytes: int, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.max_positions: int | None = None
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

    def _pool(self, output: Any, mask_BL: Tensor | None) -> Tensor:
        if self.pooling == "pooler":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise BadInput("pooling: expected mean, cls or tokens for a model without a pooler of its own")
            return pooled.flatten(1)
        hidden_BTD: Tensor = output.last_hidden_state
        if hidden_BTD.ndim == 4:
            # Convolutional encoders: B x D x H x W.
            hidden_BTD = hidden_BTD.flatten(2).transpose(1, 2)
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
