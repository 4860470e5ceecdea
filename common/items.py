"""What a source hands to a backbone, where an array or a picture does not say enough.

| item | from sources | to backbones |
|---|---|---|
| PIL image or uint8 array | images | of images |
| float array T, or T x C channels | time series, vectors | of series; given features |
| mapping column -> text | tables | given features |
| `Text` | sentences and pairs of them | of text |
| `Audio` | recordings | of audio |
| `Several` | whatever is one record in several items: slices, frames | any: features are averaged |

A plain string is no item: a path or a name that got somewhere by mistake must not be taken for a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Text:
    """A text, or a pair of texts that are read together."""

    first: str = field(repr=False)
    second: str | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Audio:
    """A recording: mono samples in [-1, 1], float32, and how many there are in a second."""

    samples_T: NDArray[np.float32] = field(repr=False)
    sample_rate: int


@dataclass(frozen=True, eq=False)
class Several:
    """One record that is several items; its features are the mean of theirs."""

    items: Sequence[Any] = field(repr=False)
