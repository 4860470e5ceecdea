"""Windows of public time series, each changed in one of six ways, to pre-train a backbone that must tell how.

Recognising what was done to a window needs no label of it (Sarkar and Etemad 2020, arXiv 2002.03898). Reads the `.ts`
files of the time series archives, in a folder or a zip, which a Python wheel is too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import SourceSettings, digest
from client.data.sources.parts.tree import open_tree
from common.inputs import parse_number
from common.plugins import LocalPath
from common.types import BadInput

CHANGES = ("none", "inverted", "reversed", "permuted", "noisy", "smoothed")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got one with an error: {error}") from error
    return text


class Windows(SourceSettings):
    """Settings: where the series are, and how windows are cut. The one column is `change`.

    Attributes:
        path: folder or zip with `.ts` files anywhere below it.
        exclude: files whose path it finds are left out, such as copies in another form.
        length: time steps of every window.
        per_series: windows of each series: at random between half of it and all, brought to `length`.
        seed: of places and changes; each series has its own generator.
    """

    kind: Literal["windows"]
    path: LocalPath
    exclude: Annotated[str, AfterValidator(_pattern)] | None = None
    length: Annotated[int, Field(ge=8, le=65536)] = 96
    per_series: Annotated[int, Field(ge=1, le=1000)] = 3
    seed: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Three series of one file."""
        rng = np.random.default_rng(0)
        lines = [":".join([",".join(f"{value:.4f}" for value in rng.normal(size=30)), str(n)]) for n in range(3)]
        (folder / "q7-waves.ts").write_text("@problemName waves\n@data\n" + "\n".join(lines) + "\n")
        return SourceExample({"kind": "windows", "path": str(folder), "length": 16, "per_series": 2}, ["q7-"])

    def open(self) -> CutWindows:
        """The windows. Raises BadInput: missing, or no series."""
        excluded = re.compile(self.exclude) if self.exclude is not None else None
        tree = open_tree(self.path, "series").chosen(
            lambda name: name.suffix == ".ts" and not (excluded and excluded.search(name.as_posix()))
        )
        windows, labels = [], []
        for position, series_T in enumerate(_all_series(tree.read(name, "series") for name in tree.stamps)):
            rng = np.random.default_rng([self.seed, position])
            for _ in range(self.per_series):
                change = CHANGES[rng.integers(len(CHANGES))]
                windows.append(_changed(_cut(series_T, self.length, rng), change, rng).astype(np.float32))
                labels.append(change)
        if not windows:
            raise BadInput(f"{self.path}: expected .ts files with series, got none")
        return CutWindows(self.path.name, tuple(labels), np.stack(windows))


@dataclass(frozen=True)
class CutWindows:
    """Opened windows."""

    file: str
    labels: tuple[str, ...] = field(repr=False)
    windows_NT: NDArray[np.float32] = field(repr=False)

    def digest(self) -> str:
        """Over all windows."""
        return digest([str(self.windows_NT.shape).encode(), self.windows_NT.tobytes()])

    def index(self) -> list[SourceRecord]:
        """Windows, series by series."""
        return [
            SourceRecord(row=n, file=self.file, key=f"window {n}", patient=None, split=None, cells={"change": label})
            for n, label in enumerate(self.labels, start=1)
        ]

    def load(self, position: int) -> NDArray[np.float32]:
        """One window."""
        window: NDArray[np.float32] = self.windows_NT[position]
        return window


def _all_series(files: Iterator[bytes]) -> Iterator[NDArray[np.float64]]:
    """Every channel of every row with enough finite values that differ; others are left out."""
    for data in files:
        text = data.decode("utf-8", errors="replace")
        _, _, body = text.partition("@data")
        for line in body.splitlines():
            # The last part is the label.
            for channel in line.split(":")[:-1]:
                values = [parse_number(cell) for cell in channel.split(",")]
                series_T = np.array([value for value in values if value is not None], dtype=np.float64)
                if len(series_T) >= 24 and len(series_T) == len(values) and 0 < series_T.std() < np.inf:
                    yield series_T


def _cut(series_T: NDArray[np.float64], length: int, rng: np.random.Generator) -> NDArray[np.float64]:
    width = max(int(rng.uniform(0.5, 1.0) * len(series_T)), 24)
    start = rng.integers(0, len(series_T) - width + 1)
    window_T = np.interp(np.linspace(0, width - 1, length), np.arange(width), series_T[start : start + width])
    standard_T: NDArray[np.float64] = (window_T - window_T.mean()) / (window_T.std() or 1.0)
    return standard_T


def _changed(window_T: NDArray[np.float64], change: str, rng: np.random.Generator) -> NDArray[np.float64]:
    if change == "inverted":
        return -window_T
    if change == "reversed":
        return window_T[::-1]
    if change == "permuted":
        parts = np.array_split(window_T, 4)
        return np.concatenate([parts[part] for part in rng.permutation(4)])
    if change == "noisy":
        return window_T + 0.3 * rng.normal(size=len(window_T))
    if change == "smoothed":
        return np.convolve(window_T, np.ones(7) / 7, mode="same")
    return window_T
