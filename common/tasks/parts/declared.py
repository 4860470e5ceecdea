"""Names, numbers and texts that a run file declares of labels: the prior a head is served with, weights, thresholds.

All of them are public. None may come from a site's records: a true label count inside a loss or an output would let one
record change what is computed from all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from common.inputs import CellName, find_name
from common.plugins import Frozen
from common.types import BadRecord

if TYPE_CHECKING:
    from torch import Tensor

MISSING_CLASS = -100
"""PyTorch's own mark of a class that contributes no loss."""

LabelWeight = Annotated[float, Field(ge=0.01, le=100.0)]
"""Factor on a loss. It enters a unit's gradient before that is clipped, so that the clip norm bounds it as ever."""

Threshold = Annotated[float, Field(gt=0.0, lt=1.0)]
"""Probability above which a label is predicted."""

Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
"""Ratio of records that have a label."""

Smoothing = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Part of a label that a loss shares among all of them."""

StartText = Annotated[str, Field(min_length=1, max_length=2000)]
"""A text that says what a label means."""

LabelWeights = dict[CellName, LabelWeight]
LabelRatios = dict[CellName, Ratio]
LabelThresholds = dict[CellName, Threshold]


class TextStart(Frozen):
    """A head before the first round from public texts, through a backbone that reads texts.

    Attributes:
        texts: label -> names of the class and phrases that are typical of it; never of a site's records.
    """

    texts: dict[CellName, Annotated[list[StartText], Field(min_length=1, max_length=100)]]

    def order(self, labels: Sequence[str]) -> list[list[str]]:
        """Returns the texts of each label, in the labels' order. Raises ValueError where a label has none."""
        position = order_by_label({name: float(at) for at, name in enumerate(self.texts)}, labels, "start.texts")
        texts = list(self.texts.values())
        return [texts[int(at)] for at in position]


def order_by_label(
    values: Mapping[str, float], labels: Sequence[str], key: str, *, default: float | None = None
) -> list[float]:
    """Returns one value for each label, in the labels' order.

    Args:
        values: label -> value.
        labels: the task's labels.
        key: key of the setting, for the message.
        default: value of labels that are not named; None where all must be.

    Raises:
        ValueError: a name is not one of the labels, two names are the same label, or a label has no value.
    """
    found: dict[int, float] = {}
    for name, value in values.items():
        index = find_name(name, labels)
        if index is None or index in found:
            raise ValueError(f"{key}: expected each name to be another one of the task's labels, got {name!r}")
        found[index] = value
    absent = [name for index, name in enumerate(labels) if index not in found]
    if default is None and absent:
        raise ValueError(f"{key}: expected a value for every label, got none for {absent[0]!r}")
    return [found[index] if default is None else found.get(index, default) for index in range(len(labels))]


def compute_logit(probability: float) -> float:
    """Returns log(p / (1 - p))."""
    return math.log(probability) - math.log1p(-probability)


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
