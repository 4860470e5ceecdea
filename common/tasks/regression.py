"""A number for each example, within a declared public range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, final

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from common.cells import number
from common.plugins import Plugin
from common.tasks import Example
from common.tasks.parts.head import HeadSettings
from common.types import BadRecord

if TYPE_CHECKING:
    from torchmetrics import Metric


@final
class Regression(Plugin):
    """Settings of a regression. The head's output is in units of half the range, from its middle.

    Attributes:
        range: lowest and highest public value of the target; predictions are clipped to it.
        outside: what a value beyond the range means: `clip` it, or `refuse` the record.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["regression"] = "regression"
    range: tuple[float, float]
    outside: Literal["clip", "refuse"] = "refuse"
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(), alias="head")

    @field_validator("range")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not bounds[0] < bounds[1]:
            raise ValueError(f"expected [lowest, highest], got {list(bounds)}")
        return bounds

    @classmethod
    def example(cls) -> Example:
        """An age."""
        return Example({"kind": "regression", "range": [0, 128]}, [["0"], ["32.5"], ["64"], ["128"]])

    def head(self, feature_dim: int) -> nn.Module:
        """features_BD -> outputs B x 1."""
        return self.head_settings.build(feature_dim, 1)

    def encode(self, cells: Sequence[str]) -> Tensor:
        """The target in its own unit (float32 scalar) from one cell. Raises BadRecord."""
        value = number(cells[0]) if len(cells) == 1 else None
        if value is None:
            raise BadRecord("expected one number")
        low, high = self.range
        clipped = min(max(value, low), high)
        if clipped != value and self.outside == "refuse":
            raise BadRecord("expected a number within the task's range")
        return torch.tensor(clipped, dtype=torch.float32)

    def missing(self) -> Tensor:
        """The middle of the range."""
        return torch.tensor(self._middle, dtype=torch.float32)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared error of each example, targets scaled to [-1, 1]."""
        targets_B = (labels - self._middle) / self._half
        return 0.5 * (outputs.squeeze(1) - targets_B) ** 2

    def slopes(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Residual of each example, targets scaled to [-1, 1]."""
        return outputs - ((labels - self._middle) / self._half).unsqueeze(1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Predictions in the target's unit, float64."""
        low, high = self.range
        return (outputs.squeeze(1).double() * self._half + self._middle).clamp(low, high)

    def metrics(self) -> dict[str, Metric]:
        """Mean absolute error first, in the target's unit."""
        from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

        from common.tasks.parts.metrics import R2

        metrics: dict[str, Metric] = {
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
            "r2": R2(),
        }
        # float64: the spread of a target is a small difference of large sums.
        return {name: metric.set_dtype(torch.float64) for name, metric in metrics.items()}

    def counts(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """1, absolute and squared error in widths of the range, the target scaled to [-1, 1], and its square."""
        targets_B = labels.double()
        error_B = (self.scores(outputs.detach()) - targets_B) / (2 * self._half)
        scaled_B = (targets_B - self._middle) / self._half
        return torch.stack([torch.ones_like(error_B), error_B.abs(), error_B**2, scaled_B, scaled_B**2], dim=1)

    def counts_norm(self) -> float:
        """Five entries of at most 1: predictions are cut to the range, and labels outside of it are not encoded."""
        return math.sqrt(5.0)

    def counted(self, sums: Tensor) -> dict[str, float]:
        """The metrics of summed, perhaps noised `counts`; NaN where they are undefined."""
        total, absolute, square, target, target_square = sums.tolist()
        if total <= 0.0:
            return dict.fromkeys(("mae", "rmse", "r2"), math.nan)
        spread = target_square - target**2 / total
        width = 2 * self._half
        return {
            "mae": max(absolute / total, 0.0) * width,
            "rmse": math.sqrt(max(square / total, 0.0)) * width,
            "r2": 1.0 - 4.0 * square / spread if spread > 0.0 else math.nan,
        }

    def decode(self, outputs: Tensor) -> list[float]:
        """The prediction for each example, in the target's unit."""
        values: list[float] = self.scores(outputs).tolist()
        return values

    @property
    def _middle(self) -> float:
        return (self.range[0] + self.range[1]) / 2

    @property
    def _half(self) -> float:
        return (self.range[1] - self.range[0]) / 2
