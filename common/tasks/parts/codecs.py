"""The label codec of tasks whose label is one of several names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.inputs import find_name
from common.types import BadRecord

if TYPE_CHECKING:
    from torch import Tensor

MISSING_CLASS = -100
"""PyTorch's own mark of a class that contributes no loss."""


@dataclass(frozen=True)
class ClassCodec:
    """Labels are the index of a name (int64 scalar).

    Attributes:
        names: public names, in the order of their indices.
        predict: a head's outputs -> predicted index_B.
    """

    names: Sequence[str]
    predict: Callable[[Tensor], Tensor]

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Returns the index of the name in the only cell. Raises BadRecord."""
        import torch

        index = find_name(cells[0], self.names) if len(cells) == 1 else None
        if index is None:
            raise BadRecord("expected one of the task's labels in one column")
        return torch.tensor(index)

    def missing(self) -> Tensor:
        """Returns MISSING_CLASS."""
        import torch

        return torch.tensor(MISSING_CLASS)

    def decode(self, outputs: Tensor) -> list[list[str]]:
        """Returns the predicted name of each example in one cell."""
        return [[self.names[index]] for index in self.predict(outputs).tolist()]
