"""What a backbone's plug-in class provides: settings, architecture, weights, preprocessing.

# Shapes: D features, K classes of the pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from common.backbones.parts.projection import Projection


@dataclass(frozen=True)
class Architecture:
    """An encoder: module and number of features.

    Attributes:
        module: batch of preprocessed items -> raw features B x `feature_dim`.
        feature_dim: before any projection.
        preprocess: in place of `Kind.preprocess` where it needs what travels with the weights, such as a vocabulary.
    """

    module: nn.Module
    feature_dim: int
    preprocess: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Pretrained:
    """What a kind takes from its weights.

    Attributes:
        state: tensors of `Kind.architecture().module`, by name.
        classifier_KD: weights of the pre-training's classifier, for a projection; None where there are none.
        shift_D: predicted mean of the features, for a projection; None where nothing predicts it.
        scale: factor on the features; 1 unless the weights are random.
    """

    state: Mapping[str, Tensor]
    classifier_KD: Tensor | None = None
    shift_D: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Example:
    """A small instance of a kind that needs nothing but a folder: every kind is tested with its own.

    Attributes:
        settings: what a user would write.
        items: at least four different source items.
    """

    settings: Mapping[str, Any]
    items: Sequence[Any]


class Kind(Protocol):
    """What a plug-in file's class provides: settings, architecture, weights, preprocessing.

    Law (tests/contracts/test_backbones.py), stated for the `Backbone` made from it: frozen, deterministic, independent
    of the batch an item stands in; its digest changes with any weight, setting or preprocessing step that shapes
    features and with nothing else.

    Messages of `BadInput` begin with the setting's own name; the caller puts the key in front.

    Attributes:
        kind: file name of the plug-in.
        projection: what happens to the features before they leave the backbone.
    """

    kind: str
    projection: Projection | None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """A small instance for tests; files it needs are written to `folder`, the same on every call."""

    def resolved(self) -> Kind:
        """The same settings with everything that shapes features explicit and no location of weights.

        This is what travels to the sites and what the digest covers. Resolving twice changes nothing.
        """

    def architecture(self) -> Architecture:
        """A new encoder, initialised from torch's current generator."""

    def pretrained(self) -> Pretrained:
        """The weights. Called at the coordinator only. Raises BadInput: missing, misfit, a pickle with code."""

    def random(self) -> Pretrained:
        """Weights drawn from torch's current generator (see `_random`). Raises BadInput if the kind has no weights."""

    def weights_file(self) -> Path | None:
        """The local file that `pretrained` reads, if it reads one."""

    def preprocess(self, item: Any) -> Tensor:
        """One source item (see `common.items`) as one input, without a batch dimension; all are of one shape.

        Raises:
            BadRecord: the item cannot be used; the message holds nothing of its content.
        """

    def model_dump(self, *, mode: str, by_alias: bool) -> dict[str, Any]:
        """The settings as plain values (pydantic's)."""
