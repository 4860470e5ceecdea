"""An embedding in which records of one identity are near each other, also for identities never seen in training.

Each training identity has a fixed public direction, the corner of a simplex (Li et al. 2023, "No fear of classifier
biases"); the loss draws each record to its own with the additive cosine margin of CosFace (Wang et al. 2018). A
record's loss comes from that record and public directions alone: nothing is mined across records, no other record is
its negative. Identities listed as `unseen` have no loss; pairs of their records are compared when it is judged.

# Shapes: B examples, E embedding dimensions, K training identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, final

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from common.cells import CellNames, position
from common.plugins import Plugin
from common.tasks import Example
from common.tasks.parts.head import HeadSettings
from common.tasks.parts.statistics import share
from common.tasks.parts.verification import verification
from common.types import BadRecord

if TYPE_CHECKING:
    from torchmetrics import Metric

_MISSING = -100


@final
class Embedding(Plugin):
    """Settings of an embedding.

    Attributes:
        labels: the training identities.
        unseen: identities that are only compared, never trained on.
        dim: dimensions of the embedding; by default as many as training identities.
        start: what an untrained head says: nothing, or the features as they are, which training then changes. From
            features an embedding is at first as good as they are, and noise costs it little: it turns them as a whole.
            As many dimensions as features, and a linear head without a bias.
        sharpness: factor on cosines before the softmax.
        margin: by which a record's cosine with its own identity must exceed the others'.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file.
    """

    kind: Literal["embedding"] = "embedding"
    labels: Annotated[CellNames, Field(min_length=2)]
    unseen: CellNames = ()
    dim: Annotated[int, Field(ge=2, le=4096)] | None = None
    start: Literal["zero", "features"] = "zero"
    sharpness: Annotated[float, Field(gt=0, le=1000)] = 8.0
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.2
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(), alias="head")

    @model_validator(mode="after")
    def _identities_differ(self) -> Embedding:
        both = next((name for name in self.unseen if position(name, self.labels) is not None), None)
        if both is not None:
            raise ValueError(f"unseen: expected identities that are not among labels, got {both!r}")
        return self

    @model_validator(mode="after")
    def _start_fits(self) -> Embedding:
        own = self.head_settings
        if self.start == "features" and (self.dim is not None or own.hidden is not None or own.bias):
            raise ValueError("start: features: expected `head: {bias: false}` without `hidden`, and no `dim`")
        return self

    @classmethod
    def example(cls) -> Example:
        """Four speakers."""
        settings = {"kind": "embedding", "labels": ["ann", "bob", "cem", "dan"], "unseen": ["eve", "fay"]}
        return Example(settings, [["ann"], ["bob"], ["dan"], ["cem"]])

    def head(self, feature_dim: int) -> nn.Module:
        """features_BD -> embeddings_BE, not normalised."""
        if self.start == "zero":
            return self.head_settings.build(feature_dim, self.dim or len(self.labels))
        head = nn.Linear(feature_dim, feature_dim, bias=False)
        nn.init.eye_(head.weight)
        return head

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Identity (int64) from one cell; unseen ones come after the training identities. Raises BadRecord."""
        index = position(cells[0], (*self.labels, *self.unseen)) if len(cells) == 1 else None
        if index is None:
            raise BadRecord("expected one of the task's identities in one column")
        return torch.tensor(index)

    def missing(self) -> Tensor:
        """A mark whose loss is zero."""
        return torch.tensor(_MISSING)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of scaled cosines with the margin; zero where the identity is not a training one."""
        known_B = self._known(labels)
        own_BK = nn.functional.one_hot(torch.where(known_B, labels, 0), len(self.labels))
        logits_BK = self.sharpness * (self._cosines(outputs) - self.margin * own_BK)
        losses_B = nn.functional.cross_entropy(logits_BK, own_BK.argmax(dim=1), reduction="none")
        return torch.where(known_B, losses_B, 0.0)

    def scores(self, outputs: Tensor) -> Tensor:
        """Probabilities of the training identities, B x K."""
        return (self.sharpness * self._cosines(outputs.double())).softmax(dim=1)

    def metrics(self) -> dict[str, Metric]:
        """Share of records of training identities that are nearest to their own direction."""
        from common.tasks.parts.metrics import KnownAccuracy

        return {"accuracy": KnownAccuracy(len(self.labels))}

    def obvious(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """The features themselves."""
        del known_features, known_labels
        return features

    def compared(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Equal error rate, and acceptance of equal pairs where 1 and 10 % of unequal ones are accepted.

        Over all pairs of records of unseen identities. It compares records: for whoever may see them together.
        """
        chosen_B = labels >= len(self.labels)
        return verification(outputs[chosen_B].detach(), labels[chosen_B])

    def counts(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Whether the record is of a training identity, and whether it was recognised."""
        known_B = self._known(labels)
        correct_B = known_B & (self.scores(outputs.detach()).argmax(dim=1) == labels)
        return torch.stack([known_B, correct_B], dim=1).double()

    def counts_norm(self) -> float:
        """Both counts."""
        return float(np.sqrt(2.0))

    def counted(self, sums: Tensor) -> dict[str, float]:
        """Accuracy from summed, perhaps noised `counts`."""
        return {"accuracy": float(share(sums[1], sums[0]))}

    def decode(self, outputs: Tensor) -> list[str]:
        """The training identity that each record is nearest to."""
        return [self.labels[index] for index in self.scores(outputs).argmax(dim=1).tolist()]

    def _known(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels < len(self.labels))

    def _cosines(self, outputs: Tensor) -> Tensor:
        """Cosines B x K, shrunk near the origin: a new head's outputs are zero, where a cosine has no derivative."""
        soft_BE = outputs / torch.sqrt(1.0 + outputs.square().sum(dim=1, keepdim=True))
        return soft_BE @ self._directions(outputs.shape[1]).to(soft_BE).T

    def _directions(self, dim: int) -> Tensor:
        """K unit vectors, K x E, that never change: the corners of a simplex, or random ones where it does not fit.

        Random ones too where the head starts from features: corners would favour the first few of these.
        """
        count = len(self.labels)
        if dim >= count and self.start == "zero":
            corners = np.eye(count, dim) - np.eye(count, dim).mean(0)
        else:
            corners = np.random.default_rng(0).normal(size=(count, dim))
        return torch.from_numpy(corners / np.linalg.norm(corners, axis=1, keepdims=True))
