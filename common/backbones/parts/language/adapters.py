"""The part of a frozen decoder that trains: low-rank adapters of which one side alone moves, or its last block.

An adapter adds (alpha / rank) B A x to a linear layer's W x (Hu et al. 2021, arXiv 2106.09685). A is drawn once from a
public seed and stays: B alone trains and travels, half as many numbers, and from zero, so that a new adapter changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from common.backbones.parts.boundary import list_trainable
from common.backbones.parts.hub.stack import find_layers
from common.errors import nearest
from common.types import BadInput


@final
class LowRank(nn.Module):
    """A linear layer and its adapter, in its place."""

    down: Tensor

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rng: np.random.Generator) -> None:
        super().__init__()
        self.base = base
        # As the library peft draws it. It follows from the seed: nothing of it is kept or sent.
        edge = 1.0 / math.sqrt(base.in_features)
        drawn = rng.uniform(-edge, edge, (rank, base.in_features)).astype(np.float32) * (alpha / rank)
        self.register_buffer("down", torch.from_numpy(drawn).to(base.weight.device), persistent=False)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the layer's outputs with the adapter's added."""
        lowered = nn.functional.linear(inputs, self.down)
        if torch.is_grad_enabled() and not lowered.requires_grad:
            # Opacus' hooks expect inputs that take a gradient; that of a frozen source would cost as much as all else.
            lowered.requires_grad_()
        outputs: Tensor = self.base(inputs) + self.up(lowered)
        return outputs


def add_adapters(module: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> list[nn.Parameter]:
    """Puts adapters in the place of linear layers, and returns what trains of them.

    Args:
        module: the decoder.
        rank: rank of the product B A.
        alpha: factor alpha of the formula.
        targets: last parts of the layers' names, such as `encoder_attn.q_proj`.
        seed: public seed of A.

    Raises:
        BadInput: a target is no linear layer; names those there are.
    """
    linear = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    chosen = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            names = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise BadInput(
                f"decoder.lora.targets: expected some of {', '.join(names)}, got {target!r}{nearest(target, names)}"
            )
    rng = np.random.default_rng(seed)
    opened: list[nn.Parameter] = []
    for name in chosen:
        base = module.get_submodule(name)
        assert isinstance(base, nn.Linear)
        adapter = LowRank(base, rank, alpha, rng)
        module.set_submodule(name, adapter)
        opened += adapter.up.parameters()
    return opened


def open_last_block(module: nn.Module) -> list[nn.Parameter]:
    """Returns what can train of a decoder's last block. Raises BadInput: it has no blocks of one kind."""
    _, layers = find_layers(module)
    return list_trainable(layers[-1])
