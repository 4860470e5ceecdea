"""Any backbone of single items, for records that stay a bag of them: slides as tiles, volumes as slices, notes.

Each item is encoded by itself; the features of a record's items stand side by side, each with a mark, and a head pools
them (`head: {pooling: attention}`; Ilse et al. 2018, arXiv 1802.04712). Without this kind the features of a record's
items are averaged before any head reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, WithJsonSchema, field_validator

from common.backbones import (
    Architecture,
    Bag,
    Example,
    Kind,
    Pretrained,
    draw_random,
    list_weights_paths,
    read_pretrained,
    resolve_settings,
)
from common.inputs import MAX_ITEMS
from common.plugins import Plugin, Spec, plugin_class, resolve
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor


@final
class BagBackbone(Plugin):
    """Settings of bags.

    Attributes:
        encoder: the backbone of one item, with its projection: any kind whose items have one vector each.
        max_items: largest number of items of a record; so many places are kept of each.
        over: what a record with more items means: `cut` reads so many of them, evenly spread over all; `leave_out`
            makes it a bad record.
        projection: none: the encoder has its own.
    """

    kind: Literal["bag"] = "bag"
    encoder: Annotated[Spec, WithJsonSchema({"type": "object", "additionalProperties": {}})]
    max_items: Annotated[int, Field(ge=1, le=MAX_ITEMS)]
    over: Literal["cut", "leave_out"] = "cut"
    projection: None = None

    @field_validator("encoder")
    @classmethod
    def _make_paths_absolute(cls, encoder: Spec) -> Spec:
        # Its paths are those of the file that it was read from.
        kind: Kind = resolve("common.backbones", encoder, "encoder")
        return Spec(**kind.model_dump(mode="json", by_alias=True, exclude_unset=True))

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns bags of at most three pictures."""
        of_pictures: Any = plugin_class("common.backbones", "small_cnn")
        encoder = of_pictures.example(folder)
        return Example({"kind": "bag", "encoder": dict(encoder.settings), "max_items": 3}, encoder.items)

    def resolved(self) -> BagBackbone:
        """Returns settings with those of the encoder resolved."""
        encoder = resolve_settings(self.open_encoder()).model_dump(mode="json", by_alias=True)
        return self.model_copy(update={"encoder": Spec(**encoder)})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the files of the encoder; None where they are elsewhere."""
        return list_weights_paths(self.open_encoder())

    def architecture(self) -> Architecture:
        """Returns the encoder with its projection, items -> features with a mark.

        Raises:
            BadInput: the encoder's features are those of places.
        """
        from common.backbones.parts.projection import ItemNetwork

        encoder = self.open_encoder()
        own = resolve_settings(encoder).architecture()
        if own.grid:
            raise BadInput("encoder: expected a backbone with one vector for each item, got one with places")
        module = ItemNetwork(own.module, encoder.projection, own.feature_dim)
        return Architecture(
            module,
            module.projection.out_dim + 1,
            own.preprocess,
            own.open_raw,
            grid=(self.max_items,),
            num_marks=1,
            bag=Bag(self.max_items, cuts=self.over == "cut"),
        )

    def pretrained(self) -> Pretrained:
        """Returns the encoder's weights and its projection."""
        return self.join_weights(read_pretrained(self.open_encoder()))

    def random(self) -> Pretrained:
        """Returns random weights of the encoder and their projection."""
        return self.join_weights(draw_random(self.open_encoder()))

    def preprocess(self, item: Any) -> Tensor:
        """Returns one item as the encoder reads it. Raises BadRecord."""
        return self.open_encoder().preprocess(item)

    def join_weights(self, parts: Pretrained) -> Pretrained:
        """Returns the weights of the encoder and those of its projection, from those of the encoder by itself."""
        import torch

        from common.backbones.parts.projection import compute_projection

        encoder = self.open_encoder()
        raw_dim = resolve_settings(encoder).architecture().feature_dim
        try:
            projection = compute_projection(encoder.projection, raw_dim, parts.classifier_KD, parts.shift_D)
        except BadInput as error:
            raise BadInput(f"encoder.{error}") from error
        state: Mapping[str, Tensor] = {
            **{f"network.{name}": tensor for name, tensor in parts.state.items()},
            **{f"projection.{name}": tensor for name, tensor in projection.items()},
            "scale": torch.tensor(parts.scale),
        }
        return Pretrained(state)

    def open_encoder(self) -> Kind:
        """Returns the backbone of one item."""
        encoder: Kind = resolve("common.backbones", self.encoder, "encoder")
        return encoder
