"""A number for each example, within a declared public range.

# Shapes: B examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field, field_validator

from common.inputs import parse_number
from common.plugins import Plugin
from common.tasks import SparseRows, Statistic, TaskExample
from common.tasks.parts.head import BagHeadSettings
from common.tasks.parts.rates import RATE, Array
from common.types import BadRecord

if TYPE_CHECKING:
    from torch import Tensor, nn


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
    head_settings: BagHeadSettings = Field(default=BagHeadSettings(), alias="head")

    @field_validator("range")
    @classmethod
    def _check_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not bounds[0] < bounds[1]:
            raise ValueError(f"expected [lowest, highest], got {list(bounds)}")
        return bounds

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a task on ages."""
        return TaskExample({"kind": "regression", "range": [0, 128]}, [["0"], ["32.5"], ["64"], ["128"]])

    @property
    def codec(self) -> RangeCodec:
        """Targets and predictions in the target's own unit."""
        return RangeCodec(*self.range, clips=self.outside == "clip")

    @property
    def pools_items(self) -> bool:
        """True where the head pools the items of bags."""
        return self.head_settings.pooling is not None

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BD -> outputs [B, 1]."""
        return self.head_settings.build(feature_dim, 1)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns half the squared error of each example, with targets scaled to [-1, 1]."""
        return 0.5 * (outputs.squeeze(1) - self.codec.to_unit(labels)) ** 2

    @property
    def smoothness(self) -> float:
        """Curvature of half a squared error."""
        return 1.0

    @property
    def squared_length(self) -> float:
        """That of the features, and of the 1 that a bias is multiplied by."""
        return 2.0 if self.head_settings.bias else 1.0

    @property
    def first_slope(self) -> float:
        """Half of the largest residual, which is 1: that of targets spread evenly."""
        return 0.5

    @property
    def tolerated_noise(self) -> float:
        """That of a number from -1 to 1: a fifth of what a logit bears."""
        return 0.1

    @property
    def centres(self) -> bool:
        """A mean target is the bias's."""
        return True

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the residual of each example, with targets scaled to [-1, 1]."""
        return outputs - self.codec.to_unit(labels).unsqueeze(1)

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the name of the only column."""
        del num_outputs
        return ["value"]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns the predicted value [B, 1] in the target's unit, clipped to the range."""
        return self.codec.predict(outputs).float().unsqueeze(1)

    def statistic(self, buckets: int) -> Statistic:
        """Returns 1, absolute and squared error in widths of the range, the target scaled to [-1, 1], and its square.

        The main metric is the mean absolute error, in the target's unit.
        """
        del buckets
        # Five entries of at most 1: predictions are clipped to the range, and labels outside of it are not encoded.
        width = 2 * self.codec.half
        # R2 has no lower end; 0 is predicting the mean.
        ranges = {"mae": (0.0, width), "rmse": (0.0, width), "r2": RATE}
        errors = frozenset({"mae", "rmse"})
        return Statistic(5, math.sqrt(5.0), self._entries, self._compute, ranges, errors)

    def _entries(self, outputs: Tensor, labels: Tensor) -> SparseRows:
        import torch

        codec, targets_B = self.codec, labels.double()
        error_B = (codec.predict(outputs) - targets_B) / (2 * codec.half)
        scaled_B = codec.to_unit(targets_B)
        value_B5 = torch.stack([torch.ones_like(error_B), error_B.abs(), error_B**2, scaled_B, scaled_B**2], dim=1)
        return SparseRows(torch.arange(5, device=value_B5.device).expand(len(value_B5), 5), value_B5)

    def _compute(self, sums_S: Array, clip: bool) -> dict[str, float]:
        total, absolute, square, target, target_square = sums_S.tolist()
        if total <= 0.0:
            return dict.fromkeys(("mae", "rmse", "r2"), math.nan)
        spread = target_square - target**2 / total
        width = 2 * self.codec.half
        absolute, square = absolute / total, square / total
        if clip:
            # Predictions and targets are of the range: no true error is wider.
            absolute, square = min(max(absolute, 0.0), 1.0), min(max(square, 0.0), 1.0)
        return {
            "mae": absolute * width,
            # Signed, so that a square which noise made negative is seen below the range.
            "rmse": math.copysign(math.sqrt(abs(square)), square) * width,
            "r2": 1.0 - 4.0 * square * total / spread if spread > 0.0 else math.nan,
        }


@dataclass(frozen=True)
class RangeCodec:
    """Labels are numbers in the target's own unit (float32 scalar).

    Attributes:
        low: lowest value of the target.
        high: highest value of the target.
        clips: whether a value outside the range is clipped to it; otherwise it is refused.
    """

    low: float
    high: float
    clips: bool

    @property
    def middle(self) -> float:
        """Middle of the range."""
        return (self.low + self.high) / 2

    @property
    def half(self) -> float:
        """Half the width of the range."""
        return (self.high - self.low) / 2

    def to_unit(self, values: Tensor) -> Tensor:
        """Returns values of the range scaled to [-1, 1]."""
        return (values - self.middle) / self.half

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Returns the target from the only cell. Raises BadRecord."""
        import torch

        value = parse_number(cells[0]) if len(cells) == 1 else None
        if value is None:
            raise BadRecord("expected one number")
        clipped = min(max(value, self.low), self.high)
        if clipped != value and not self.clips:
            raise BadRecord("expected a number within the task's range")
        return torch.tensor(clipped, dtype=torch.float32)

    def missing(self) -> Tensor:
        """Returns the middle of the range."""
        import torch

        return torch.tensor(self.middle, dtype=torch.float32)

    def predict(self, outputs: Tensor) -> Tensor:
        """Returns the predicted value of each example (float64), clipped to the range."""
        return (outputs.squeeze(1).double() * self.half + self.middle).clamp(self.low, self.high)

    def decode(self, outputs: Tensor) -> list[list[str]]:
        """Returns the predicted value of each example in one cell."""
        return [[repr(value)] for value in self.predict(outputs).tolist()]
