"""What is learned: label space, head, per-example loss, metric sums, decoding. One file is one kind.

# Shapes: B examples, D features, L label entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torchmetrics import Metric

from common.plugins import Spec, resolve


@runtime_checkable
class Task(Protocol):
    """One task, public to everyone.

    Law (tests/contracts/test_tasks.py): the loss of a batch is the losses of its examples, computed alone; Opacus
    validates the head; metric sums merge associatively; decoding an encoded label returns it.

    Attributes:
        kind: file name of the plug-in.
        scale: public factor on this task's loss, applied before joint clipping.
    """

    kind: str
    scale: float

    def head(self, feature_dim: int) -> nn.Module:
        """A new trainable head, features_BD -> outputs; initialised from torch's current generator."""

    def encode(self, cells: Sequence[str]) -> Tensor:
        """One example's label (no batch dimension) from one cell, or one cell for each label.

        Raises:
            BadRecord: the value is none of the task's labels; the message does not repeat it.
        """

    def missing(self) -> Tensor:
        """A placeholder of `encode`'s shape and dtype for a record without a label; its loss is never counted."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """losses_B, one for each example, from nothing but that example."""

    def scores(self, outputs: Tensor) -> Tensor:
        """What `metrics` take: probabilities or predictions."""

    def metrics(self) -> dict[str, Metric]:
        """New torchmetrics metrics, the main one first; every state is sum-reduced, so sites' states add up."""

    def decode(self, outputs: Tensor) -> list[Any]:
        """One prediction for each example, in the task's own label names."""


def open_task(spec: Spec | Mapping[str, Any], key: str) -> Task:
    """The task a setting asks for. Raises BadInput naming the key."""
    task: Task = resolve("common.tasks", spec, key)
    return task
