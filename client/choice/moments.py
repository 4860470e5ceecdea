"""The exact sums by which a secure sum compares backbones: of features of each class, and of how many are told apart.

Units are in one of two halves, by a coin of each. Those of the first add to the sums of features of each class, in few
public directions of each candidate; those of the second to each candidate's number of units that are nearest to the
mean of their own class. A unit is in one half: both releases together cost what one costs. Its part is one vector of
length at most 1 over all candidates, clipped and truncated by itself (`common.privacy.lattice`).

# Shapes: R records, U units, B units of a block, D features, E directions, C classes, K candidates, P values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.units import TaskRecords, Units
from client.solvers.parts.objective import select_usable_records
from common.model.moments import has_classes
from common.privacy.lattice import Lattice, bound_norms, check_unit_count
from common.tasks import LabelPrior
from common.tasks.parts.adjusted import normalize_rows
from common.types import BadInput

DIRECTIONS = 32
"""Public directions of a candidate's features that are compared, drawn at random from its digest: with more of them
noise hides the classes sooner, and with fewer they overlap."""

COUNTS = 0.2
"""Part of a unit's squared length that its label has in the first release; the rest is its features'."""

MakeRows = Callable[[TaskRecords], Tensor]
"""Records of a block of units -> their parts, float64 [R, P], each of which follows from one record alone."""

_BLOCK = 256

_GRID = 2.0**-25
"""Features and directions are whole multiples of it where they are multiplied: products of them add up exactly, so that
a row has the same bits whatever rows stand beside it, and no other record decides which class it is nearest to."""


@dataclass(frozen=True)
class MeanClassifier:
    """A candidate's classifier: the class whose mean is nearest.

    Attributes:
        means_CE: float64, means of the classes' features in the candidate's directions.
        squares_C: float64, their squared lengths without what noise adds.
    """

    means_CE: NDArray[np.float64] = field(repr=False)
    squares_C: NDArray[np.float64] = field(repr=False)


def draw_directions(digest: str, dim: int) -> NDArray[np.float64] | None:
    """Returns orthonormal directions, float64 [D, E], the same wherever a backbone is; None takes all features.

    Args:
        digest: digest of the backbone.
        dim: number of its features.
    """
    if dim <= DIRECTIONS:
        return None
    drawn_DE = np.random.default_rng(int(digest, 16)).normal(size=(dim, DIRECTIONS))
    directions_DE: NDArray[np.float64] = np.linalg.qr(drawn_DE)[0]
    return directions_DE


def check_one_class(task: LabelPrior, name: str) -> None:
    """Checks that each label of a task is one class. Raises BadInput."""
    if not has_classes(task):  # type: ignore[arg-type]
        raise BadInput(f"tasks.{name}: expected a task whose records have one class each, for `--by moments`")


def add_up_classes(
    task: LabelPrior,
    units: Units,
    directions: Mapping[str, NDArray[np.float64] | None],
    chosen_U: NDArray[np.bool_],
    lattice: Lattice,
) -> Tensor:
    """Returns the sum over the chosen units, in steps: labels first, then each candidate's features of each class.

    Args:
        task: the task.
        units: the site's training units, with the task's records as each candidate sees them by its name.
        directions: candidate -> its directions.
        chosen_U: the units that take part.
        lattice: the whole numbers of the release.
    """
    scale = ((1.0 - COUNTS) / len(units.tasks)) ** 0.5

    def make_counts(records: TaskRecords) -> Tensor:
        counts_RC: Tensor = COUNTS**0.5 * task.count_labels(records.labels).double()
        return counts_RC

    def make_products(name: str) -> MakeRows:
        def make(records: TaskRecords) -> Tensor:
            features_RE = reduce_features(records.features_RD, directions[name])
            labels_RC = task.count_labels(records.labels).double()
            products_RP: Tensor = scale * (labels_RC[:, :, None] * features_RE[:, None, :]).flatten(1)
            return products_RP

        return make

    first = next(iter(units.tasks.values()))
    parts: list[tuple[TaskRecords, MakeRows]] = [(first.labelled(), make_counts)]
    parts += [(select_usable_records(records), make_products(name)) for name, records in units.tasks.items()]
    return _add_up(parts, units.num_units, chosen_U, lattice)


def add_up_hits(
    task: LabelPrior,
    units: Units,
    directions: Mapping[str, NDArray[np.float64] | None],
    classifiers: Mapping[str, MeanClassifier],
    chosen_U: NDArray[np.bool_],
    lattice: Lattice,
) -> Tensor:
    """Returns for each candidate the number of chosen units whose class its classifier tells, in steps / sqrt(K).

    Args:
        task: the task.
        units: the site's training units, with the task's records as each candidate sees them by its name.
        directions: candidate -> its directions.
        classifiers: candidate -> its classifier.
        chosen_U: the units that take part.
        lattice: the whole numbers of the release.
    """
    scale = len(units.tasks) ** -0.5

    def make_hits(name: str) -> MakeRows:
        means_CE = torch.from_numpy(classifiers[name].means_CE)
        # Which class is nearest does not change with the length of the longest mean.
        peak = max(float(means_CE.abs().sum(1).max()), 1e-9)
        half_squares_C = torch.from_numpy(classifiers[name].squares_C) / (2.0 * peak)

        def make(records: TaskRecords) -> Tensor:
            features_RE = reduce_features(records.features_RD, directions[name])
            nearest_R = (_multiply(features_RE, means_CE.T / peak) - half_squares_C).argmax(1)
            hits_R: Tensor = scale * (nearest_R == task.count_labels(records.labels).argmax(1)).double()
            return hits_R[:, None]

        return make

    parts = [(select_usable_records(records), make_hits(name)) for name, records in units.tasks.items()]
    return _add_up(parts, units.num_units, chosen_U, lattice)


def reduce_features(features_RD: Tensor, directions_DE: NDArray[np.float64] | None) -> Tensor:
    """Returns rows of length 1 (or 0) in some directions, float64.

    Args:
        features_RD: the features.
        directions_DE: the directions; None for all features.
    """
    rows_RD = normalize_rows(features_RD.flatten(1).double())
    return rows_RD if directions_DE is None else normalize_rows(_multiply(rows_RD, torch.from_numpy(directions_DE)))


def _multiply(rows_RD: Tensor, columns_DE: Tensor) -> Tensor:
    """Returns the product of two matrices on their grid, exact where the products of a value add up to 4 at most."""
    return (rows_RD / _GRID).trunc() @ (columns_DE / _GRID).trunc() * _GRID**2


def _add_up(
    parts: Sequence[tuple[TaskRecords, MakeRows]],
    num_units: int,
    chosen_U: NDArray[np.bool_],
    lattice: Lattice,
) -> Tensor:
    """Returns the sum of the units' parts, int64 [P]: whatever a unit's records are, its part is within the bound."""
    check_unit_count(num_units)
    total_P: Tensor | None = None
    for first in range(0, max(1, num_units), _BLOCK):
        chosen_B = torch.from_numpy(chosen_U[first : first + _BLOCK])
        columns = []
        for records, make in parts:
            inside_R = (records.unit_R >= first) & (records.unit_R < first + len(chosen_B))
            own = records.taken(inside_R.nonzero().squeeze(1), records.unit_R)
            values_RP = own.weight_R.double()[:, None] * make(own)
            empty_BP = values_RP.new_zeros((len(chosen_B), values_RP.shape[1]))
            columns.append(empty_BP.index_add_(0, own.unit_R - first, values_RP))
        values_BP = torch.cat(columns, dim=1)
        factor_B = lattice.compute_factors(bound_norms(values_BP)) * chosen_B
        whole_P = lattice.truncate(values_BP, factor_B).long().sum(0)
        total_P = whole_P if total_P is None else total_P + whole_P
    assert total_P is not None  # Without units there is one empty block.
    return total_P
