"""The trainable head that all kinds share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

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


class BagHeadSettings(HeadSettings):
    """Shape of a head that may stand on bags, records of several items each (backbones of kind `bag`).

    Attributes:
        pooling: how the items of a record become one vector: their `mean`, the `max` of each feature, or a weighted
            mean whose weights are learned (`attention`, `gated_attention`). `hidden` is then a layer that each item
            passes before. Null reads one vector for each record.
        width: width of the layer from which attention follows.
    """

    pooling: Literal["mean", "max", "attention", "gated_attention"] | None = None
    width: Annotated[int, Field(ge=1, le=65536)] = 64

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("centre", "prior", "pooling", "width"))

    @property
    def _attends(self) -> bool:
        return self.pooling in ("attention", "gated_attention")

    @model_validator(mode="after")
    def _check_pooling(self) -> BagHeadSettings:
        if self.pooling is not None and self.centre:
            raise ValueError(
                "centre: expected false beside `pooling`, because a bag has many vectors; subtract a public mean of "
                "items instead (`encoder: {projection: {shift: {public: FILE}}}` of the backbone)"
            )
        if "width" in self.model_fields_set and not self._attends:
            raise ValueError("width: expected it beside `pooling: attention` or `gated_attention`")
        return self

    def _build_layers(self, feature_dim: int, num_outputs: int) -> nn.Module:
        if self.pooling is None:
            return HeadSettings._build_layers(self, feature_dim, num_outputs)
        from torch import nn

        from common.tasks.parts.nets.bags import BagHead, ItemScores

        pooled = self.hidden or feature_dim
        items = None if self.hidden is None else nn.Linear(feature_dim, self.hidden, bias=self.bias)
        last = nn.Linear(pooled, num_outputs, bias=self.bias)
        nn.init.zeros_(last.weight)
        if self.bias:
            nn.init.zeros_(last.bias)
        gated = self.pooling == "gated_attention"
        scores = ItemScores(pooled, self.width, gated=gated, bias=self.bias) if self._attends else None
        return BagHead(items, last, self.pooling, scores)


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
        from common.tasks.parts.nets.decoder import PlacesDecoder

        assert self.hidden is not None  # The validator has looked.
        return PlacesDecoder(feature_dim, self.hidden, num_outputs, kernel=self.kernel, bias=self.bias)
