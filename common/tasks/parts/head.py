"""The trainable head that all kinds share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from common.plugins import Frozen

if TYPE_CHECKING:
    from torch import nn


class HeadSettings(Frozen):
    """Shape of a head.

    Attributes:
        hidden: width of one hidden layer with tanh; null is a linear head. Tanh is bounded, which suits clipped
            gradients (Papernot et al. 2021, arXiv 2007.14191).
        bias: whether the layers have a bias.
    """

    hidden: Annotated[int, Field(ge=1, le=65536)] | None = None
    bias: bool = True

    def build(self, feature_dim: int, num_outputs: int) -> nn.Module:
        """Returns Linear, or Linear-Tanh-Linear, with the last layer zero.

        Zero outputs are the same distance from every label and make the first private step independent of chance; a
        linear head's loss is convex, so that its start does not matter without privacy.
        """
        from torch import nn

        last = nn.Linear(self.hidden or feature_dim, num_outputs, bias=self.bias)
        nn.init.zeros_(last.weight)
        if self.bias:
            nn.init.zeros_(last.bias)
        if self.hidden is None:
            return last
        return nn.Sequential(nn.Linear(feature_dim, self.hidden, bias=self.bias), nn.Tanh(), last)
