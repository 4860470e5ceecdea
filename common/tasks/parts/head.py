"""The trainable head that all kinds share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.plugins import Frozen
from common.run import drop_unset

if TYPE_CHECKING:
    from torch import nn


class HeadSettings(Frozen):
    """Shape of a head.

    Attributes:
        hidden: width of one hidden layer with tanh; null is a linear head. Tanh is bounded, which suits clipped
            gradients (Papernot et al. 2021, arXiv 2007.14191).
        bias: whether the layers have a bias.
        centre: whether the head subtracts a mean from its features and normalises what is left. The mean is measured
            before the first round (`moments` of the run file); until then it is zero.
        prior: whether a number of each output that does not train is added to it: while it trains, the logarithm of
            how frequent the label is (`moments` of the run file); in use, of how frequent it is said to be.
    """

    hidden: Annotated[int, Field(ge=1, le=65536)] | None = None
    bias: bool = True
    centre: bool = False
    prior: bool = False

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("centre", "prior"))

    def build(self, feature_dim: int, num_outputs: int) -> nn.Module:
        """Returns Linear, or Linear-Tanh-Linear, with the last layer zero.

        Zero outputs are the same distance from every label and make the first private step independent of chance; a
        linear head's loss is convex, so that its start does not matter without privacy.
        """
        return self.adjust(self._build_layers(feature_dim, num_outputs), feature_dim, num_outputs)

    def adjust(self, layers: nn.Module, feature_dim: int, num_outputs: int) -> nn.Module:
        """Returns layers with the fixed numbers that the settings ask for around them.

        Args:
            layers: the part that trains.
            feature_dim: number of features.
            num_outputs: number of outputs.
        """
        if not (self.centre or self.prior):
            return layers
        from common.tasks.parts.adjusted import AdjustedHead

        return AdjustedHead(layers, feature_dim if self.centre else None, num_outputs if self.prior else None)

    def _build_layers(self, feature_dim: int, num_outputs: int) -> nn.Module:
        from torch import nn

        last = nn.Linear(self.hidden or feature_dim, num_outputs, bias=self.bias)
        nn.init.zeros_(last.weight)
        if self.bias:
            nn.init.zeros_(last.bias)
        if self.hidden is None:
            return last
        return nn.Sequential(nn.Linear(feature_dim, self.hidden, bias=self.bias), nn.Tanh(), last)


class PlacesHeadSettings(HeadSettings):
    """Shape of a head that reads the places of a picture.

    Attributes:
        kernel: side of the square of places that each of its two layers reads; 1 for the place alone. Above 1 the head
            needs `hidden`: two convolutions with tanh between them, which see a square of 2 * kernel - 1 places.
    """

    kernel: Annotated[int, Field(ge=1, le=15)] = 1

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("centre", "prior", "kernel"))

    @model_validator(mode="after")
    def _check(self) -> PlacesHeadSettings:
        if self.centre or self.prior:
            raise ValueError("expected no `centre` and no `prior`, which are of a whole record")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number of places, got {self.kernel}")
        if self.kernel > 1 and self.hidden is None:
            raise ValueError("hidden: expected a number of channels beside `kernel`")
        return self

    def _build_layers(self, feature_dim: int, num_outputs: int) -> nn.Module:
        if self.kernel == 1:
            return HeadSettings._build_layers(self, feature_dim, num_outputs)
        from common.tasks.parts.decoder import PlacesDecoder

        assert self.hidden is not None  # The validator has looked.
        return PlacesDecoder(feature_dim, self.hidden, num_outputs, kernel=self.kernel, bias=self.bias)
