"""An embedding in which records of one identity are near each other, also for identities never seen in training.

Each training identity has a fixed public direction, the corner of a simplex (Li et al. 2023, "No fear of classifier
biases"); the loss draws each record to its identity's direction with the additive cosine margin of CosFace (Wang et al.
2018). A record's loss comes from that record and public directions alone: nothing is mined across records, no other
record is its negative. Identities listed as `unseen` have no loss; pairs of their records are compared in evaluation.

# Shapes: B examples, N training records, D features, E embedding dimensions, K training identities.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field, model_validator

from common.inputs import CellNames, find_name
from common.plugins import Plugin
from common.tasks import SparseRows, Statistic, TaskExample
from common.tasks.parts.declared import ClassCodec
from common.tasks.parts.head import HeadSettings
from common.tasks.parts.rates import RATE, Array, compute_ratio

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
class Embedding(Plugin):
    """Settings of an embedding.

    Attributes:
        labels: the training identities.
        unseen: identities that are only compared, never trained on.
        dim: dimensions of the embedding; by default as many as training identities.
        start: the outputs of an untrained head: zero, or the features as they are, which training then changes. From
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
    def _check_identities_differ(self) -> Embedding:
        both = next((name for name in self.unseen if find_name(name, self.labels) is not None), None)
        if both is not None:
            raise ValueError(f"unseen: expected identities that are not among labels, got {both!r}")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Embedding:
        shape = self.head_settings
        if self.start == "features" and (self.dim is not None or shape.hidden is not None or shape.bias):
            raise ValueError("start: features: expected `head: {bias: false}` without `hidden`, and no `dim`")
        return self

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a task of four speakers."""
        settings = {"kind": "embedding", "labels": ["ann", "bob", "cem", "dan"], "unseen": ["eve", "fay"]}
        return TaskExample(settings, [["ann"], ["bob"], ["dan"], ["cem"]])

    @property
    def codec(self) -> ClassCodec:
        """Indices of identities, unseen ones after the training identities; the prediction is a training identity."""
        return ClassCodec((*self.labels, *self.unseen), self._nearest)

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BD -> embeddings_BE, not normalised."""
        from torch import nn

        if self.start == "zero":
            return self.head_settings.build(feature_dim, self.dim or len(self.labels))
        head = nn.Linear(feature_dim, feature_dim, bias=False)
        nn.init.eye_(head.weight)
        return self.head_settings.adjust(head, feature_dim, feature_dim)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the cross entropy of scaled cosines with the margin; zero for other than training identities."""
        from torch.nn import functional

        known_B = self._is_training_identity(labels)
        target_BK = functional.one_hot(labels.where(known_B, 0), len(self.labels))
        logits_BK = self.sharpness * (self._cosines(outputs) - self.margin * target_BK)
        losses_B = functional.cross_entropy(logits_BK, target_BK.argmax(dim=1), reduction="none")
        return losses_B.where(known_B, 0.0)

    @property
    def smoothness(self) -> float:
        """Curvature of the loss: of a softmax of scaled cosines with unit vectors, and of a cosine by the outputs."""
        return self.sharpness**2 + 2.0 * self.sharpness

    @property
    def first_slope(self) -> float:
        """Length of uniform probabilities minus a unit vector, times the sharpness."""
        return self.sharpness * math.sqrt(1.0 - 1.0 / len(self.labels))

    @property
    def tolerated_noise(self) -> float:
        """That of a logit: noise turns an embedding as a whole."""
        return 0.5

    @property
    def centres(self) -> bool:
        """The mean of features tells no identity from another, and makes all cosines alike."""
        return True

    def predict_baseline(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Returns the features themselves as embeddings.

        Args:
            features: [B, D], features of the records to compare.
            known_features: [N, D], unused.
            known_labels: int64 [N], unused.
        """
        del known_features, known_labels
        return features

    def pair_metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Returns the equal error rate, and acceptance of genuine pairs where 1 and 10 % of impostors are accepted.

        Over all pairs of records of unseen identities. It compares records: for whoever may see them together.
        """
        from common.tasks.parts.pairs import compute_verification

        unseen_B = labels >= len(self.labels)
        return compute_verification(outputs[unseen_B].detach(), labels[unseen_B])

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the numbers of the embedding's dimensions."""
        return [str(number) for number in range(num_outputs)]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns embeddings of length 1, whose products are the cosines that compare two records."""
        from torch.nn import functional

        return functional.normalize(outputs, dim=1)

    def statistic(self, buckets: int) -> Statistic:
        """Returns for records of training identities 1, and 1 where the nearest direction is that of their identity."""
        del buckets
        return Statistic(2, math.sqrt(2.0), self._entries, self._compute, {"accuracy": RATE})

    def _entries(self, outputs: Tensor, labels: Tensor) -> SparseRows:
        import torch

        known_B = self._is_training_identity(labels)
        correct_B = known_B & (self._nearest(outputs) == labels)
        value_B2 = torch.stack([known_B, correct_B], dim=1).double()
        return SparseRows(torch.arange(2, device=value_B2.device).expand(len(value_B2), 2), value_B2)

    def _compute(self, sums_S: Array, clip: bool) -> dict[str, float]:
        return {"accuracy": float(compute_ratio(sums_S[1], sums_S[0], clip=clip))}

    def _is_training_identity(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels < len(self.labels))

    def _nearest(self, outputs: Tensor) -> Tensor:
        """Returns the index of the training identity whose direction each embedding is nearest to."""
        return self._cosines(outputs.double()).argmax(dim=1)

    def _cosines(self, outputs: Tensor) -> Tensor:
        """Returns cosines_BK, shrunk near the origin: a new head's outputs are zero, where cosine has no derivative."""
        shrunk_BE = outputs / (1.0 + outputs.square().sum(dim=1, keepdim=True)).sqrt()
        return shrunk_BE @ self._directions(outputs.shape[1]).to(shrunk_BE).T

    def _directions(self, dim: int) -> Tensor:
        """Returns K unit vectors [K, E] that never change: a simplex's corners, or random ones where it does not fit.

        Random ones too where the head starts from features: corners would favour the first few of these.
        """
        import numpy as np
        import torch

        count = len(self.labels)
        if dim >= count and self.start == "zero":
            corners = np.eye(count, dim) - np.eye(count, dim).mean(0)
        else:
            corners = np.random.default_rng(0).normal(size=(count, dim))
        return torch.from_numpy(corners / np.linalg.norm(corners, axis=1, keepdims=True))
