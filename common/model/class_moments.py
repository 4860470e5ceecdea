"""The moments of a task's classes over all sites: what was released once, and serves adaptation wherever it is kept.

They are parts of round 0 (`common.model.moments`, `moments.classes` and `moments.scatter` of a run file): noised sums
over units that were charged, so that whoever holds them may compute from them at no further cost.

# Shapes: C classes, D features z of length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.model.moments import CLASSES, SCATTER, NoisedSum
from common.tasks import Task
from common.types import BadInput, Heads, Params

Array = NDArray[np.float64]

_ABOUT = ("deviation", "units")


@dataclass(frozen=True)
class ClassMoments:
    """Noised sums of one task over the training units of all sites. A unit with several records counts once.

    Attributes:
        counts_C: number of units of each class, in the order of the task's labels.
        sums_CD: sum of the features of each class.
        scatter_DD: sum of z z' over the units of the task's backbone, symmetric; None where the run did not measure it.
        counts_deviation: deviation of the noise in each value of `counts_C`; 0 without any.
        sums_deviation: the same of `sums_CD`.
        scatter_deviation: the same of `scatter_DD` above and below its diagonal times sqrt(2), as it was drawn.
        units: declared number of units, over sites.
    """

    counts_C: Array
    sums_CD: Array
    scatter_DD: Array | None
    counts_deviation: float
    sums_deviation: float
    scatter_deviation: float
    units: float

    def shares_C(self) -> Array:
        """Returns the share of each class; one that noise has left nothing of has half of the noise's deviation."""
        least = max(0.5, self.counts_deviation / 2.0)
        counts_C = np.maximum(self.counts_C, least)
        shares_C: Array = counts_C / counts_C.sum()
        return shares_C

    def means_CD(self) -> Array:
        """Returns the mean of the features of each class, by the shares and the declared number of units."""
        means_CD: Array = self.sums_CD / (self.shares_C() * max(self.counts_C.sum(), 1.0))[:, None]
        return means_CD

    def within_DD(self) -> Array | None:
        """Returns the covariance of features within classes; None where the run did not measure products.

        Its eigenvalues are at least s sqrt(2 D) / units, s the noise of a product: what is below is noise.
        """
        if self.scatter_DD is None:
            return None
        units, means_CD = max(self.counts_C.sum(), 1.0), self.means_CD()
        within_DD = self.scatter_DD / units - (means_CD * self.shares_C()[:, None]).T @ means_CD
        values_D, vectors_DD = np.linalg.eigh(within_DD)
        least = max(self.scatter_deviation * np.sqrt(2.0 * len(values_D)) / units, 1e-9)
        floored_DD: Array = (vectors_DD * np.maximum(values_D, least)) @ vectors_DD.T
        return floored_DD


def pack_class_moments(sums: Mapping[str, NoisedSum], backbones: Mapping[str, str]) -> dict[str, Params]:
    """Returns what a model keeps of the release before the first round: nothing where the run did not measure classes.

    Args:
        sums: name of a part of the release -> its sum over all sites.
        backbones: task -> name of its backbone.
    """
    packed: dict[str, Params] = {}
    for name, backbone in backbones.items():
        if f"{name}{CLASSES}" in sums and name in sums:
            counts = sums[name]
            packed[f"{name}{CLASSES}"] = {
                **_pack(sums[f"{name}{CLASSES}"]),
                "counts": counts.values.astype(np.float32),
                "counts_deviation": np.array([counts.deviation], np.float32),
            }
            if f"{backbone}{SCATTER}" in sums:
                packed[f"{backbone}{SCATTER}"] = _pack(sums[f"{backbone}{SCATTER}"])
    return packed


def select_class_moments(groups: Heads, tasks: Mapping[str, str]) -> dict[str, Params]:
    """Returns those of packed moments that some tasks need.

    Args:
        groups: what `pack_class_moments` returned.
        tasks: task -> name of its backbone.
    """
    own = {f"{name}{CLASSES}" for name in tasks} | {f"{backbone}{SCATTER}" for backbone in tasks.values()}
    return {name: params for name, params in groups.items() if name in own}


def split_class_moments(groups: Heads) -> tuple[dict[str, Params], dict[str, Params]]:
    """Returns heads and trunks, and the packed moments that travel beside them."""
    moments = {name: params for name, params in groups.items() if name.endswith((CLASSES, SCATTER))}
    return {name: params for name, params in groups.items() if name not in moments}, moments


def unpack_class_moments(groups: Heads, task: str, backbone: str, num_classes: int) -> ClassMoments:
    """Returns the moments of a task.

    Args:
        groups: what `pack_class_moments` returned; anything may be in it.
        task: name of the task.
        backbone: name of its backbone.
        num_classes: number C of its labels.

    Raises:
        BadInput: there are none of this task, or they do not fit.
    """
    own, products = groups.get(f"{task}{CLASSES}"), groups.get(f"{backbone}{SCATTER}")
    if own is None:
        raise BadInput(
            f"task {task}: expected a run that released the moments of classes (`moments.classes` of its run file), "
            "got one without"
        )
    try:
        values = np.asarray(own["sum"], np.float64)
        if not num_classes or not values.size or values.size % num_classes or own["counts"].shape != (num_classes,):
            raise BadInput(f"task {task}: expected moments of {num_classes} classes, got others")
        sums_CD = values.reshape(num_classes, -1)
        dim = sums_CD.shape[1]
        scatter_DD = None
        if products is not None:
            if products["sum"].size != dim**2:
                raise BadInput(f"task {task}: expected products of {dim} features, got others")
            whole_DD = np.asarray(products["sum"], np.float64).reshape(dim, dim)
            scatter_DD = (whole_DD + whole_DD.T) / 2.0
        moments = ClassMoments(
            np.asarray(own["counts"], np.float64),
            sums_CD,
            scatter_DD,
            _read(own, "counts_deviation"),
            _read(own, "deviation"),
            0.0 if products is None else _read(products, "deviation"),
            _read(own, "units"),
        )
    except KeyError as error:
        raise BadInput(f"task {task}: expected the moments of its classes, got some without {error}") from error
    arrays = [moments.counts_C, moments.sums_CD, *([] if scatter_DD is None else [scatter_DD])]
    if not all(np.isfinite(array).all() for array in arrays):
        raise BadInput(f"task {task}: expected finite moments")
    return moments


def check_class_moments(
    groups: Heads, tasks: Mapping[str, Task], backbones: Mapping[str, str], num_features: Mapping[str, int]
) -> None:
    """Checks packed moments that came over a network.

    Args:
        groups: the moments.
        tasks: task -> its definition.
        backbones: task -> name of its backbone.
        num_features: task -> number of its features.

    Raises:
        BadInput: some are of another task or backbone, or do not fit.
    """
    sent = {name: backbone for name, backbone in backbones.items() if f"{name}{CLASSES}" in groups}
    # Products of features without the classes of a task on the same backbone are of no use, and are not looked at.
    if len(select_class_moments(groups, sent)) != len(groups):
        raise BadInput("moments: expected those of this site's tasks, got others")
    for name, backbone in sent.items():
        moments = unpack_class_moments(groups, name, backbone, len(getattr(tasks[name], "labels", ())))
        if moments.sums_CD.shape[1] != num_features[name]:
            raise BadInput(
                f"moments: expected those of {num_features[name]} features for {name}, got {moments.sums_CD.shape[1]}"
            )


def _pack(total: NoisedSum) -> dict[str, NDArray[np.float32]]:
    about = (total.deviation, total.units)
    numbers = {name: np.array([value], np.float32) for name, value in zip(_ABOUT, about, strict=True)}
    return {"sum": total.values.astype(np.float32), **numbers}


def _read(params: Params, name: str) -> float:
    if params[name].shape != (1,) or not np.isfinite(params[name]).all() or params[name][0] < 0.0:
        raise BadInput(f"moments: expected a number of at least 0 for {name}, got another")
    return float(params[name][0])
