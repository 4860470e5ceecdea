"""What is learned: label space, head, per-example loss, metric sums, decoding. One file is one kind.

# Shapes: B examples, D features, L label entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from common.plugins import Spec, resolve

if TYPE_CHECKING:
    # torchmetrics brings in torchvision and transformers: two seconds that no training round needs.
    from torchmetrics import Metric

Sums = Mapping[str, Tensor]
"""State of all of a task's metrics, "metric.state" -> tensor: plain sums, so that several sites' add up."""


@dataclass(frozen=True)
class Example:
    """A small instance of a kind: every kind is tested with its own.

    Attributes:
        settings: what a user would write.
        cells: label cells of at least four records, as a site would read them.
    """

    settings: Mapping[str, Any]
    cells: Sequence[Sequence[str]]


@runtime_checkable
class Task(Protocol):
    """One task, public to everyone.

    Law (tests/contracts/test_tasks.py): the loss of a batch is the losses of its examples, computed alone; Opacus
    validates the head; metric sums merge associatively; decoding an encoded label returns it; one example's counts are
    bounded, and their sums give the task's metrics, up to buckets of scores.

    Attributes:
        kind: file name of the plug-in.
        scale: public factor on this task's loss, applied before joint clipping.
    """

    kind: str
    scale: float

    @classmethod
    def example(cls) -> Example:
        """A small instance for tests."""

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

    def counts(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """One row of statistics for each example (float64), from nothing but that example; for noised evaluation.

        Guarantee: no row is longer than `counts_norm`, whatever the outputs are.
        """

    def counts_norm(self) -> float:
        """Public bound on the L2 norm of one example's `counts`."""

    def counted(self, sums: Tensor) -> dict[str, float]:
        """The names of `metrics`, in their order, from summed `counts`, perhaps with noise; NaN where undefined."""

    def decode(self, outputs: Tensor) -> list[Any]:
        """One prediction for each example, in the task's own label names."""


@runtime_checkable
class Sloped(Protocol):
    """A task whose loss has a slope in closed form; optional, and faster than asking autograd.

    Law (tests/contracts/test_tasks.py): `slopes` is the gradient that autograd finds for `losses`.
    """

    def slopes(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each example's loss by its outputs, in the outputs' shape; only of examples with a label."""


@runtime_checkable
class Comparing(Protocol):
    """What a task has besides where it is also judged by pairs of records.

    Pairs are no sums over records: nothing here merges over sites or leaves one, and no loss may use it.
    """

    def compared(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Further metrics from all labelled records together; NaN where undefined."""


@runtime_checkable
class Obvious(Protocol):
    """What a task has besides where something obvious can be said without training. For comparison only."""

    def obvious(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Outputs for features (B x D) from labelled training records alone; where pairs judge, of any width."""


def open_task(spec: Spec | Mapping[str, Any], key: str) -> Task:
    """The task a setting asks for. Raises BadInput naming the key."""
    task: Task = resolve("common.tasks", spec, key)
    return task


def num_counts(task: Task) -> int:
    """How many statistics a task's `counts` hold."""
    nobody = task.head(1)(torch.zeros(0, 1))
    return task.counts(nobody, task.missing().unsqueeze(0)[:0]).shape[1]


def metric_sums(task: Task, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """State of the task's metrics over a batch, which may be empty.

    Args:
        task: whose metrics.
        outputs: of its head.
        labels: as encoded; only records that have a label.
    """
    sums = {}
    # Sums of squares cancel in R2: never in float32.
    exact = labels.double() if labels.is_floating_point() else labels
    for name, metric in task.metrics().items():
        metric.to(outputs.device)
        if len(outputs) > 0:
            metric.update(task.scores(outputs.detach()), exact)
        for state, value in metric.metric_state.items():
            assert isinstance(value, Tensor)
            sums[f"{name}.{state}"] = value.cpu()
    return sums


def merge_sums(first: Sums, second: Sums) -> dict[str, Tensor]:
    """State over both batches: the sum, entry by entry. Raises KeyError where they are not of one task."""
    return {key: first[key] + second[key] for key in first.keys() | second.keys()}


def metric_values(task: Task, sums: Sums) -> dict[str, float]:
    """The metrics that sums amount to, the main one first; NaN where undefined."""
    values = {}
    for name, metric in task.metrics().items():
        for state in metric.metric_state:
            setattr(metric, state, sums[f"{name}.{state}"])
        with warnings.catch_warnings():
            # torchmetrics misses `update`; the state was filled directly.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            values[name] = float(metric.compute())
    return values
