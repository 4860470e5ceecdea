"""Task kinds: what a head learns, and how it is judged. One file in this folder is one kind.

A kind's module loads no torch until one of its methods needs it, so that commands that only read settings start fast.

# Shapes: B examples, N training records, D features, S entries of a statistic, P entries of it that one example fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from common.events import Outcomes
from common.plugins import Spec, fulfils, resolve
from common.types import BadInput

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from common.backbones import Language
    from common.run import RunConfig

EXACT_BUCKETS = 2048
"""Score buckets where no noise is added. Measured against the AUROC of the scores themselves, for logits of scale 0.01
to 5: the largest difference is 0.0009."""

NOISED_BUCKETS = 16
"""Score buckets of a released statistic. Each bucket has noise of its own, so that few are better; too few take
different scores for equal. Noise of standard deviation s makes an error of about s sqrt(buckets / 3) / (number of
positives) in AUROC. Measured with 8 / 16 / 32 / 64 buckets, on normal scores of AUROC 0.6 to 0.95 and logits of scale
0.1 to 10: largest error without noise .081 / .018 / .004 / .001; root mean square error with s = 5 and 200 examples of
each truth .050 / .060 / .076 / .106."""


WRITTEN_AT_ONCE = 32
"""Texts that are written at once (`WritesTexts`); more records are a multiple of it, so that none depends on others."""


@dataclass(frozen=True)
class TaskExample:
    """A small instance of a kind, with which its contract tests run.

    Attributes:
        settings: the task's settings as a user would write them.
        cells: label cells of at least four records, as a site would read them.
        grid: number of places along each axis of the features that its head reads; none where a record has one vector.
    """

    settings: Mapping[str, Any]
    cells: Sequence[Sequence[str]]
    grid: tuple[int, ...] = ()


class LabelCodec(Protocol):
    """Translation between table cells, label tensors and predictions.

    Law (tests/contracts/test_tasks.py): decoding outputs that fit a label returns cells which `encode` reads as that
    label.
    """

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Returns one example's label (no batch dimension) from one cell, or from one cell for each label.

        Raises:
            BadRecord: the value is none of the task's labels; the message does not repeat it.
        """

    def missing(self) -> Tensor:
        """Returns a placeholder of `encode`'s shape and dtype for a record without a label; its loss is never used."""

    def decode(self, outputs: Tensor) -> list[list[str]]:
        """Returns the predicted label of each example of a head's outputs, as the cells that `encode` reads."""


class SparseRows(NamedTuple):
    """Rows of a statistic, one for each example; entries that are not named are zero.

    Attributes:
        index_BP: int64 [B, P], positions in [0, S).
        value_BP: float64 [B, P], what is added at these positions.
    """

    index_BP: Tensor
    value_BP: Tensor


@dataclass(frozen=True)
class Statistic:
    """A bounded vector of one example, and the metrics that follow from its sum over examples.

    Exact metrics and metrics released with noise come from the same rows and the same `values`; they differ in the
    number of score buckets only.

    Law (tests/contracts/test_tasks.py): an example's row depends on that example alone, is finite and has an L2 norm of
    at most `bound`, whatever the outputs are.

    Attributes:
        size: number of entries S.
        bound: public bound on the L2 norm of one example's row.
        entries: outputs and labels (as encoded, none missing) -> the rows of these examples.
        compute: sums_S over examples (float64, perhaps with noise), and whether what noise moved out of its range is
            clipped to it -> metric -> value, the main metric first; NaN where a metric is undefined.
        ranges: metric -> the ends of its range, in its own unit; of one without an end there, a value that means no
            use at all.
        errors: metrics that are the better the smaller they are.
    """

    size: int
    bound: float
    entries: Callable[[Tensor, Tensor], SparseRows]
    compute: Callable[[NDArray[np.float64], bool], dict[str, float]]
    ranges: Mapping[str, tuple[float, float]]
    errors: frozenset[str] = frozenset()

    def values(self, sums_S: Tensor | NDArray[np.float64]) -> dict[str, float]:
        """Returns metric -> value of sums over examples, clipped into its range; NaN where it is undefined."""
        return self.compute(np.asarray(sums_S), True)

    def rows(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns rows_BS (float64): the vector of each example."""
        index_BP, value_BP = self.entries(outputs.detach(), labels)
        return value_BP.new_zeros(len(value_BP), self.size).scatter_add_(1, index_BP, value_BP)

    def sums(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns sums_S (float64, on the CPU): the sum of all rows, without noise; the rows are never formed."""
        index_BP, value_BP = (part.cpu().flatten() for part in self.entries(outputs.detach(), labels))
        return value_BP.new_zeros(self.size).index_add_(0, index_BP, value_BP)

    def compose(self, function: Callable[[Tensor], Tensor]) -> Statistic:
        """Returns the same statistic of other outputs, which the function turns into those that this one reads."""
        return replace(self, entries=lambda outputs, labels: self.entries(function(outputs), labels))


@runtime_checkable
class Task(Protocol):
    """A task's public definition, which the coordinator and all sites share.

    Law (tests/contracts/test_tasks.py): the loss of a batch is the losses of its examples, computed alone; Opacus
    validates the head; the laws of `LabelCodec` and `Statistic` hold.

    Attributes:
        kind: file name of the plug-in.
        scale: public factor on this task's loss, applied before joint clipping.
    """

    kind: str
    scale: float

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a small instance for tests."""

    @property
    def codec(self) -> LabelCodec:
        """Translation between cells, labels and predictions."""

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a new trainable head, features_BD -> outputs, initialised from torch's current generator."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns losses_B, each computed from that example alone; 0 or any finite number for a missing label."""

    def statistic(self, buckets: int) -> Statistic:
        """Returns the statistic whose sums give the task's metrics.

        Args:
            buckets: number of score buckets for metrics of the scores' order, EXACT_BUCKETS or NOISED_BUCKETS; a task
                without such metrics ignores it.
        """


@runtime_checkable
class NamedCells(Protocol):
    """Optional part of a task whose label is several cells of different meanings, all of which it needs."""

    @property
    def cell_names(self) -> tuple[str, ...]:
        """The meaning of each cell, in the order in which `LabelCodec.encode` takes them."""


@runtime_checkable
class NamedParts(Protocol):
    """Optional part of a task whose label is a mask or boxes: one cell, whose places or objects have names."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names that a place or an object may have."""


@runtime_checkable
class ReadsPlaces(Protocol):
    """Optional part of a task whose head reads the features of a record's places; others read their mean."""

    @property
    def reads_places(self) -> bool:
        """True where the head's outputs are those of places."""


@runtime_checkable
class PoolsItems(Protocol):
    """Optional part of a task whose head may pool the items of bags (`common.backbones.Bag`) to one vector."""

    @property
    def pools_items(self) -> bool:
        """True where the head reads bags."""


@runtime_checkable
class PlacesLabels(Protocol):
    """Optional part of a task that reads the marks of a record's places (`common.backbones.Architecture.num_marks`).

    Law (tests/contracts/test_tasks.py): a placed label begins with the label itself; it follows from that record alone.
    """

    @property
    def codec(self) -> LabelCodec:
        """Translation between cells, labels and predictions, as every task has it."""

    def place_label(self, label: Tensor, marks_P: Tensor) -> Tensor:
        """Returns a record's label followed by what its loss needs to know of the record's places.

        Args:
            label: as encoded.
            marks_P: marks of its places, 0 where the record has ended.

        Raises:
            BadRecord: the label does not fit the record.
        """


@runtime_checkable
class ChangesWithRounds(Protocol):
    """Optional part of a task whose loss is another one in some rounds of a run."""

    def select_round(self, round_: int, rounds: int) -> Task:
        """Returns the task as it is trained in a round; nothing but these public numbers decides.

        Args:
            round_: number of the round, from 1.
            rounds: number of rounds of the run.
        """


@runtime_checkable
class WritesTexts(Protocol):
    """Optional part of a task whose predictions are texts that its backbone writes, with the head inside the loop.

    Only the backbone knows the vocabulary: such a task reads labels, has a loss and predicts once it was opened on it.

    Law (tests/contracts/test_tasks.py): what is generated of a record follows from its own features and the head alone;
    `LabelCodec.decode`, `Statistic` and `Servable.serve` take it in place of a head's outputs.
    """

    def open_on(self, language: Language) -> Task:
        """Returns the task with the language of its backbone. Raises BadInput: they do not fit."""

    def start_head(self, head: nn.Module) -> None:
        """Sets the weights of a new head of an opened task so that it predicts what its backbone itself would.

        Raises:
            BadInput: it is a head that cannot.
        """

    def force(self, head: nn.Module, features_BPD: Tensor, labels: Tensor) -> Tensor:
        """Returns a head's outputs on records of an opened task whose true texts are known (teacher forcing).

        Args:
            head: a head of the task.
            features_BPD: features of the records.
            labels: their labels.
        """

    def generate(self, head: nn.Module, features_BPD: Tensor) -> Tensor:
        """Returns what is written of records of an opened task: outputs, and behind them what was chosen."""


@runtime_checkable
class ThinsPlaces(Protocol):
    """Optional part of a task that reads places and trains on some of them."""

    @property
    def every(self) -> int:
        """Every so manieth place along each side is trained on; above 1 labels have the places of the outputs."""


@runtime_checkable
class StaysCurved(Protocol):
    """Optional part of a task whose loss stays curved by the weights while it trains: large momentum would swing."""

    @property
    def stays_curved(self) -> bool:
        """True where it does."""


@runtime_checkable
class LossGradient(Protocol):
    """Optional part of a task whose loss has a gradient in closed form, which is faster than autograd.

    Law (tests/contracts/test_tasks.py): `loss_gradient` equals the gradient that autograd computes for `losses`.
    """

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the gradient of each example's loss by its outputs, in the outputs' shape; no label is missing."""


@runtime_checkable
class ServedPrior(Protocol):
    """Optional part of a task whose head is served for a declared prior, whatever the labels' shares in training are.

    Law (tests/contracts/test_tasks.py): of outputs that are zero, those with the offset added have the probabilities of
    the declared prior, which is uniform where none is declared.
    """

    def served_offset(self) -> list[float]:
        """Returns what is added to each output of a head that was trained for equally frequent labels."""


@runtime_checkable
class StartsFromTexts(Protocol):
    """Optional part of a task whose linear head may begin as public texts say (`common.model.text_start`)."""

    def list_start_texts(self) -> list[list[str]]:
        """Returns the texts of each output, in the outputs' order; an empty list where the head begins at zero."""


@runtime_checkable
class SmoothLoss(Protocol):
    """Optional part of a task whose loss is smooth: gradient descent on it needs no step to be tuned.

    Law (tests/contracts/test_tasks.py): the gradient of a record's loss by its outputs, the task's scale left out,
    changes by at most `smoothness` times the change of the outputs.
    """

    @property
    def smoothness(self) -> float:
        """The largest curvature of a record's loss by its outputs."""

    @property
    def first_slope(self) -> float:
        """The usual length of the gradient of a record's loss by outputs with which training begins.

        That is zero, or what label frequencies give (`LabelPrior`). It is a scale for clip norms.
        """

    @property
    def tolerated_noise(self) -> float:
        """The deviation of noise in an output that costs little beside what the longer steps behind it gain."""

    @property
    def centres(self) -> bool:
        """True where what is common to all features tells nothing about a label."""


@runtime_checkable
class LaterSlope(Protocol):
    """Optional part of a task with a smooth loss whose gradients are soon much shorter, or longer, than at first.

    Clip norms, and the scale by which a task shares one with others, follow from it (`common.model.auto`).
    """

    @property
    def later_slope(self) -> float:
        """The usual length of a record's gradient in the rounds after the first, where features have a length of 1."""


@runtime_checkable
class ConstantCurvature(Protocol):
    """Optional part of a task with a smooth loss whose curvature stays, however well the outputs fit: squared errors.

    Its steps stay below the limit beyond which they diverge.
    """

    @property
    def squared_length(self) -> float:
        """The squared length of what the outputs' weights are multiplied by, with features of length 1."""


@runtime_checkable
class LabelPrior(Protocol):
    """Optional part of a task whose outputs can be shifted by how frequent labels are.

    Law (tests/contracts/test_tasks.py): a row of `count_labels` follows from that label alone and has an L2 norm of at
    most 1, whatever the label is; offsets of the rows' sums are finite for any sums, also with noise; those of the
    balanced labels' sums are zero.
    """

    @property
    def num_counts(self) -> int:
        """The number of counts C."""

    def count_labels(self, labels: Tensor) -> Tensor:
        """Returns rows_BC (float32), whose sum over records tells how frequent labels are; none is missing."""

    def compute_offset(self, sums_C: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
        """Returns what is added to the outputs while they are trained: the logarithm of labels' frequencies.

        Args:
            sums_C: sum of the rows of `count_labels`, with noise.
            deviation: deviation of that noise; 0 without any.
        """

    def balanced_labels(self) -> Tensor:
        """Returns a few labels as encoded, among which each is as frequent as the others."""


@runtime_checkable
class Calibratable(Protocol):
    """Optional part of a task whose outputs are logarithms of probabilities, up to a constant.

    Law (tests/contracts/test_tasks.py): both follow from an example alone; overconfidence is in [-k, k], where k is the
    known part of the labels, in [0, 1], and never falls where the outputs are multiplied by more.
    """

    def overconfidence(self, outputs: Tensor, labels: Tensor, offset: Tensor) -> Tensor:
        """Returns for each example the probability of its prediction, less 1 where that is true; over known labels.

        Args:
            outputs: outputs of a head for equally frequent labels; the prediction follows from them alone.
            labels: the labels.
            offset: what is added to the outputs of each example before they become probabilities.
        """

    def known_part(self, labels: Tensor) -> Tensor:
        """Returns the ratio of labels that are known of each example."""


@runtime_checkable
class Servable(Protocol):
    """Optional part of a task that says what a finished model tells of a record; without it, the head's outputs.

    Law (tests/contracts/test_tasks.py): a record's row follows from its own outputs alone, is finite for finite
    outputs, and has one column for each name; torch can export `serve`.
    """

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the names of the columns that `serve` returns of so many outputs."""

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns served_BC (float32) of a head's outputs: probabilities where the task has any."""


@runtime_checkable
class ServesMaps(Protocol):
    """Optional part of a task that labels places: what an exported network tells of each of them.

    Law (tests/contracts/test_tasks.py): a record's maps follow from its own outputs alone; torch can export
    `serve_maps`; the first maps, summed up over places, are the columns of `serve`.
    """

    @property
    def map_summary(self) -> Literal["mean", "max"]:
        """The way in which a map is summed up over its places to a column of `serve`."""

    def name_maps(self) -> list[str]:
        """Returns the names of the maps, first those behind the columns of `serve`."""

    def serve_maps(self, outputs: Tensor) -> Tensor:
        """Returns maps_BCSS (float32) of a head's outputs: probabilities where the task has any."""


@dataclass(frozen=True)
class BoxRule:
    """The numbers by which boxes follow from a detection's maps.

    Attributes:
        threshold: probability from which a box is predicted.
        overlap: overlap with a surer box of the same label above which a box is left out.
        most: most boxes of a picture.
    """

    threshold: float
    overlap: float
    most: int


@runtime_checkable
class FindsBoxes(Protocol):
    """Optional part of a task that serves maps: its predictions are boxes, whose centres are the maps' peaks.

    Of `ServesMaps.name_maps` the first are the labels, then come the boxes' widths and their heights, label by label.
    """

    @property
    def box_rule(self) -> BoxRule:
        """The numbers by which boxes follow from the maps."""


@runtime_checkable
class ServesTexts(Protocol):
    """Optional part of a task whose predictions are texts: what an exported network tells of them.

    Law (tests/common/exports/test_texts.py): `common/exports/parts/scripts/written.py`, which knows nothing of
    Headwater, reads `decode`'s text and `serve`'s numbers from it by the stated rule; torch can export `serve_texts`.
    """

    def describe_texts(self) -> dict[str, Any]:
        """Returns the rule by which a text is read, as plain values. Raises BadInput: no graph can hold the task."""

    def serve_texts(self, outputs: Tensor) -> Tensor:
        """Returns what a text is read from, float32, places behind records."""


@runtime_checkable
class CountedOutcomes(Protocol):
    """Optional part of a task whose statistic counts predictions and scores: confusion matrices, curves.

    Law (tests/contracts/test_tasks.py): of the sums of one example, each table of all classes holds a single 1, and so
    do the positives and negatives of a label together where its truth is known.
    """

    def count_outcomes(self, sums_S: NDArray[np.float64], deviation: float) -> Outcomes:
        """Returns the counts that sums of the task's statistic hold, whatever its number of score buckets is.

        Args:
            sums_S: summed rows, perhaps with noise.
            deviation: standard deviation of the noise in each entry; 0 without any.
        """


@runtime_checkable
class JoinsCells(Protocol):
    """Optional part of a task whose prediction is several cells (`LabelCodec.decode`); else they are joined by `|`."""

    def join_cells(self, cells: Sequence[str]) -> str:
        """Returns the cells of one prediction as one that people read."""


@runtime_checkable
class ComparesTexts(Protocol):
    """Optional part of a task whose prediction is a text, judged by its words.

    Law (tests/contracts/test_tasks.py): a text that was read reads as itself, and so does a prediction.
    """

    def read_text(self, cell: str) -> str:
        """Returns a label's text in the form in which predictions are compared with it. Raises BadRecord."""


@runtime_checkable
class HeardTexts(Protocol):
    """Optional part of a task whose labels a model of speech may hear without a head, to be compared with one.

    Law (tests/contracts/test_tasks.py): of what a head predicts the rates are those of its statistic.
    """

    def read_text(self, cell: str) -> str:
        """Returns a label's text in the form in which predictions are compared with it. Raises BadRecord."""

    def allows_piece(self, piece: str) -> bool:
        """Returns whether a piece of text may stand in what is heard where it has to be made of the task's symbols."""

    def compare_heard(self, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Returns the task's metrics of texts as they were heard, each beside its label's as `read_text` returns it."""


@runtime_checkable
class PairMetrics(Protocol):
    """Optional part of a task that is also judged by comparing its records with each other, in pairs or in an order.

    These metrics are no sums over records: they cannot be merged over sites or released, and no loss may use them.
    """

    def pair_metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Returns further metrics of all labelled records together, by name; NaN where undefined."""


@runtime_checkable
class BaselinePrediction(Protocol):
    """Optional part of a task that can predict without any training. Used for comparison only."""

    def predict_baseline(self, features: Tensor, known_features: Tensor, known_labels: Tensor) -> Tensor:
        """Returns outputs that need no training.

        Args:
            features: [B, D], features of the records to predict.
            known_features: [N, D], features of labelled training records.
            known_labels: N labels, as encoded.

        Returns:
            Outputs as a head would give them; of a task with `PairMetrics`, embeddings of any width.
        """


def expect_slope(task: SmoothLoss) -> float:
    """Returns the usual length of a record's gradient while a task trains, its scale left out."""
    return task.later_slope if isinstance(task, LaterSlope) else task.first_slope


def pools_items(task: Task) -> bool:
    """Returns true for a task whose head reads bags (`PoolsItems`)."""
    return isinstance(task, PoolsItems) and task.pools_items


def reads_places(task: Task) -> bool:
    """Returns true for a task whose head reads the features of a record's places (`ReadsPlaces`), or of its items."""
    return pools_items(task) or (isinstance(task, ReadsPlaces) and task.reads_places)


def open_on_backbones(tasks: Mapping[str, Task], languages: Mapping[str, Language | None]) -> dict[str, Task]:
    """Returns tasks with what their backbones know of texts; those that write none stay as they are.

    Args:
        tasks: the tasks by name.
        languages: task -> language of its backbone; None of one that writes no texts.

    Raises:
        BadInput: a task and its backbone do not fit.
    """
    return {
        name: _open_on(name, task, languages[name]) if fulfils(task, WritesTexts) else task
        for name, task in tasks.items()
    }


def _open_on(name: str, task: WritesTexts, language: Language | None) -> Task:
    if language is None:
        raise BadInput(f"tasks.{name}: expected a backbone that writes texts, such as kind seq2seq, got another")
    try:
        return task.open_on(language)
    except BadInput as error:
        raise BadInput(f"tasks.{name}.{error}") from error


def predict_outputs(task: Task, head: nn.Module, features: Tensor) -> Tensor:
    """Returns what a head predicts of features: its outputs, or those of the texts that are written with it.

    Args:
        task: the task; one that writes texts was opened on its backbone.
        head: its head.
        features: features of some records.
    """
    outputs: Tensor = task.generate(head, features) if isinstance(task, WritesTexts) else head(features)
    return outputs


def force_outputs(task: Task, head: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """Returns a head's outputs of which `Task.losses` tells how far they are from known labels.

    Args:
        task: the task; one that writes texts was opened on its backbone.
        head: its head.
        features: features of some records.
        labels: their labels.
    """
    outputs: Tensor = task.force(head, features, labels) if isinstance(task, WritesTexts) else head(features)
    return outputs


def open_tasks(run: RunConfig) -> dict[str, Task]:
    """Returns all tasks of a run by name; raises BadInput naming the key of one that is wrong."""
    return {name: open_task(spec, f"tasks.{name}") for name, spec in run.tasks.items()}


def select_round(tasks: Mapping[str, Task], round_: int, rounds: int) -> dict[str, Task]:
    """Returns tasks as they are trained in a round of a run.

    Args:
        tasks: the tasks by name.
        round_: number of the round, from 1.
        rounds: number of rounds of the run.
    """
    return {
        name: task.select_round(round_, rounds) if fulfils(task, ChangesWithRounds) else task
        for name, task in tasks.items()
    }


def open_task(spec: Spec | Mapping[str, Any], key: str) -> Task:
    """Returns the task that a setting describes; raises BadInput naming the key where it is wrong."""
    task: Task = resolve("common.tasks", spec, key)
    return task
