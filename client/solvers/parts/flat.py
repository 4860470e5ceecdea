"""Parameters of several affine heads side by side in one vector: one draw of noise, one update, one difference.

The order is that of the tasks' names, then of each head's own parameters: it fixes which noise goes where, and is the
order in which `dp_sgd` holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Flat:
    """The layout of several heads in one vector.

    Attributes:
        heads: task -> head, in the order of names; only their kind and shapes are used.
        sizes: number of values of each parameter.
    """

    heads: Mapping[str, nn.Module]
    sizes: list[int]

    @classmethod
    def from_heads(cls, heads: Mapping[str, nn.Module]) -> Flat:
        """Returns the layout of these heads."""
        ordered = {name: heads[name] for name in sorted(heads)}
        return cls(ordered, [part.numel() for head in ordered.values() for part in head.parameters()])

    def copy_parameters(self) -> Tensor:
        """Returns the heads' parameters as a new vector."""
        return torch.cat([part.detach().flatten() for head in self.heads.values() for part in head.parameters()])

    def views(self, vector: Tensor) -> dict[str, list[Tensor]]:
        """Returns task -> views of a vector: the weight as a matrix of outputs x features, then the bias if any."""
        parts = iter(torch.split(vector, self.sizes))
        return {name: [next(parts).view(shape) for shape in shapes] for name, shapes in self._shapes.items()}

    @cached_property
    def _shapes(self) -> dict[str, list[tuple[int, ...]]]:
        return {
            name: [(each.shape[0], -1) if each.dim() > 1 else tuple(each.shape) for each in head.parameters()]
            for name, head in self.heads.items()
        }

    def expand(self, by_task: Mapping[str, float]) -> Tensor | float:
        """Returns each task's number at every position of its values; one number where it is the same for all."""
        if len(set(by_task.values())) == 1:
            return next(iter(by_task.values()))
        device = next(next(iter(self.heads.values())).parameters()).device
        per_task = [
            torch.full((sum(part.numel() for part in head.parameters()),), by_task[name], dtype=torch.double)
            for name, head in self.heads.items()
        ]
        return torch.cat(per_task).to(device)

    def split_by_task(self, vector: Tensor) -> dict[str, dict[str, NDArray[Any]]]:
        """Returns task -> parameter -> its part of a vector, in its own shape."""
        parts = iter(torch.split(vector.cpu(), self.sizes))
        return {
            name: {key: next(parts).view(each.shape).numpy() for key, each in head.named_parameters()}
            for name, head in self.heads.items()
        }
