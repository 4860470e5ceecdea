"""A transformers encoder divided between two of its layers.

Below: embeddings and the first layers, as the model itself runs them. Above: the other layers, one after the other, the
model's last norm where it has one, and pooling. A text's outputs carry its mask as one more feature of each position.

# Shapes: B examples, T positions, D features.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from common.types import BadInput


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and layers of an encoder's stack. Raises BadInput: it has none."""
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and len({type(layer) for layer in part}) == 1:
            return name, part
    raise BadInput("from: expected an encoder made of layers of one kind")


def pool(hidden_BTD: Tensor, mask_BT: Tensor | None, pooling: str, max_positions: int | None) -> Tensor:
    """features_BD, or B x (T * D) of all positions, zeros where a text has ended."""
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
class Below(nn.Module):
    """Preprocessed items -> what the first layers make of them, B x T x D, with a mask B x T x (D + 1)."""

    def __init__(self, model: nn.Module, modality: Any, max_length: int | None) -> None:
        """Of a model that keeps only its first layers.

        Args:
            model: without a last norm.
            modality: see `common.backbones.parts.modalities`.
            max_length: positions of every text; None where nothing is masked.
        """
        super().__init__()
        self.model = model
        self.modality = modality
        self.max_length = max_length

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Zeros, the mask too, where a text has ended."""
        rows, found = [], []
        for positions, group_B in self.modality.groups(inputs_B):
            output, mask_BT = self.modality.run(self.model, group_B)
            hidden_BTD = output.last_hidden_state
            if self.max_length is not None:
                assert mask_BT is not None
                mask_BT1 = mask_BT.unsqueeze(2).to(hidden_BTD.dtype)
                hidden_BTD = torch.cat([hidden_BTD * mask_BT1, mask_BT1], dim=2)
                hidden_BTD = nn.functional.pad(hidden_BTD, (0, 0, 0, self.max_length - hidden_BTD.shape[1]))
            rows.append(positions)
            found.append(hidden_BTD)
        return torch.cat(found)[torch.argsort(torch.cat(rows))]


@final
class Above(nn.Module):
    """What `Below` gives -> raw features."""

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
        """features_BD, or B x (T * D)."""
        hidden_BTD, mask_BT, more = states, None, {}
        if self.masked:
            # Only as many positions as the longest text has: the others are masked for everyone.
            longest = max(1, int(states[:, :, -1].sum(1).max())) if len(states) else 1
            hidden_BTD, mask_BT = states[:, :longest, :-1], states[:, :longest, -1]
            more = {"attention_mask": _additive(mask_BT)}
        for layer in self.layers:
            output = layer(hidden_BTD, **more)
            hidden_BTD = output[0] if isinstance(output, tuple) else output
        if self.norm is not None:
            hidden_BTD = self.norm(hidden_BTD)
        return pool(hidden_BTD, mask_BT, self.pooling, self.max_positions)


def _additive(mask_BT: Tensor) -> Tensor:
    """0 where a position counts and the least number where not, for each head and query."""
    return ((1.0 - mask_BT) * torch.finfo(mask_BT.dtype).min)[:, None, None, :]


def last_norm(model: nn.Module, stack: str) -> str | None:
    """Name of the norm that a model applies after its layers; None where there is none."""
    names = [name for name, _ in model.named_children()]
    after = names[names.index(stack.split(".")[0]) + 1 :]
    norms = [name for name in after if isinstance(model.get_submodule(name), nn.LayerNorm)]
    return norms[0] if norms else None
