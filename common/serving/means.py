"""Means of features of length 1, which may be handed on, and the distances between them.

A mean is of a backbone's home sample, which is public, or what a site released before a run's first round: a noised
sum, charged to its ledger, divided by its declared number of units. A distance follows from them and costs nothing.

# Shapes: D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import instead
from common.files import write_atomic
from common.types import BadInput

MEANS = "means.safetensors"
"""File of a run's folder with the means that its sites released."""
HOME = "home sample"
"""Name of the mean of a backbone's home sample, as it is shown."""

_KEY = "means"
_MOST = 1e10
"""Largest value of a mean, its noise and its units in a file from elsewhere: their squares stay numbers."""
_PUBLIC_MEAN = "`headwater simulate public-mean ... --out FILE` makes a home file"


@dataclass(frozen=True)
class FeatureMean:
    """A mean over units of the mean of each unit's features, every record's divided by their length.

    Attributes:
        name: a site's name, or another one.
        digest: digest of the backbone whose features they are.
        mean_D: float64 [D].
        deviation: deviation of the noise in each value; 0 without any.
        units: number of units, a declared one where the mean was released.
        source: what it is of, in words.
        is_home: true for a backbone's home sample, which is public.
    """

    name: str
    digest: str
    mean_D: NDArray[np.float64] = field(repr=False)
    deviation: float
    units: float
    source: str
    is_home: bool = False


@dataclass(frozen=True)
class MeanDistance:
    """The squared distance of two means, the mean part of the Frechet distance between two sets of features.

    Attributes:
        value: |m1 - m2|^2 less what the noise adds to it on average; below 0 by chance where they are near.
        error: its standard deviation due to the noise; 0 without any.
    """

    value: float
    error: float

    @property
    def shown(self) -> float:
        """The distance as it is shown: no squared distance is below 0."""
        return max(0.0, self.value)


def compute_distance(one: FeatureMean, other: FeatureMean) -> MeanDistance:
    """Returns the squared distance of two means whose noises are independent.

    With noise of variance v in each of D values of the difference, |difference + noise|^2 is D v larger on average and
    has the variance 4 v |difference|^2 + 2 D v^2.

    Raises:
        BadInput: they have different numbers of features: a file was changed.
    """
    _check_lengths([one, other])
    variance = one.deviation**2 + other.deviation**2
    value = float(np.square(one.mean_D - other.mean_D).sum()) - len(one.mean_D) * variance
    error = math.sqrt(4.0 * variance * max(0.0, value) + 2.0 * len(one.mean_D) * variance**2)
    return MeanDistance(value, error)


def combine_means(means: Sequence[FeatureMean], name: str) -> FeatureMean:
    """Returns the mean over the units of several sites of one backbone.

    Args:
        means: their means, at least one.
        name: name of the result.

    Raises:
        BadInput: they have different numbers of features: a file was changed.
    """
    _check_lengths(means)
    units = math.fsum(each.units for each in means)
    mean_D = np.sum([each.units * each.mean_D for each in means], axis=0) / units
    deviation = math.hypot(*(each.units * each.deviation for each in means)) / units
    return FeatureMean(name, means[0].digest, mean_D, deviation, units, f"{len(means)} sites")


def _check_lengths(means: Sequence[FeatureMean]) -> None:
    lengths = sorted({len(each.mean_D) for each in means})
    if len(lengths) > 1:
        raise BadInput(
            f"means of backbone {means[0].digest[:12]}: expected one number of features in all files, got {lengths[0]} "
            f"and {lengths[1]}; take the file that the run left"
        )


def pack_means(means: Sequence[FeatureMean]) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    """Returns means as tensors by name and as the metadata of their file."""
    tensors = {f"mean {number}": np.asarray(each.mean_D, np.float64) for number, each in enumerate(means)}
    about = [
        {
            "tensor": tensor,
            "name": each.name,
            "backbone": each.digest,
            "deviation": each.deviation,
            "units": each.units,
            "source": each.source,
            "home": each.is_home,
        }
        for tensor, each in zip(tensors, means, strict=True)
    ]
    return tensors, {_KEY: json.dumps(about)}


def write_means(path: Path, means: Sequence[FeatureMean]) -> None:
    """Writes means as a file that `read_means` reads."""
    tensors, metadata = pack_means(means)
    write_atomic(path, save(tensors, metadata=metadata))


def read_means(path: Path) -> list[FeatureMean]:
    """Returns the means in a file: a home file, or what a run left.

    Args:
        path: the file, or a run's folder.

    Raises:
        BadInput: it is not there, or damaged, or holds no mean.
    """
    file = path / MEANS if path.is_dir() else path
    if not file.is_file():
        raise BadInput(
            f"{path}: expected means that were released, found no {file.name}; a run leaves {MEANS} in its folder "
            f"where its sites release `moments.means`, as with `solver: {{kind: auto}}`; {_PUBLIC_MEAN}"
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if _KEY not in metadata:
                raise BadInput(f"{file}: expected a file with means of features, got another one; {_PUBLIC_MEAN}")
            return [_unpack(each, opened.get_tensor(each["tensor"])) for each in json.loads(metadata[_KEY])]
    except (ArithmeticError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise BadInput(f"{file}: expected a file with means of features{instead(error)}") from error


def _unpack(about: Mapping[str, Any], mean_D: NDArray[Any]) -> FeatureMean:
    mean = FeatureMean(
        str(about["name"]),
        str(about["backbone"]),
        mean_D.astype(np.float64),
        float(about["deviation"]),
        float(about["units"]),
        str(about["source"]),
        about["home"] is True,
    )
    # Features have a length of 1: what is far larger is noise alone.
    if mean.mean_D.ndim != 1 or not mean.mean_D.size or not np.abs(mean.mean_D).max() <= _MOST:
        raise ValueError("expected a mean")
    texts = (mean.name, mean.digest, mean.source)
    if not 0.0 <= mean.deviation <= _MOST or not 1.0 <= mean.units <= _MOST:
        raise ValueError("expected a mean of units")
    if not all(text.isprintable() and len(text) < 400 for text in texts):
        raise ValueError("expected texts that can be printed")
    return mean


def select_backbone(means: Sequence[FeatureMean], digests: Collection[str], where: Path) -> list[FeatureMean]:
    """Returns the means in a file that are of some of these backbones.

    Args:
        means: the means in the file.
        digests: digests of the backbones.
        where: the file, for the message.

    Raises:
        BadInput: all are of others.
    """
    chosen = [each for each in means if each.digest in digests]
    if not chosen:
        raise BadInput(
            f"{where}: expected means of features of backbone {_shorten(digests)}, got those of another backbone, "
            f"weights file or preprocessing ({_shorten({each.digest for each in means})}), which cannot be compared"
        )
    return chosen


def _shorten(digests: Collection[str]) -> str:
    return ", ".join(sorted(digest[:12] for digest in digests)) or "none"
