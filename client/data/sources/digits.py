"""The embedded data set: scikit-learn's handwritten digits, each scattered once and reproducibly on a larger canvas."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import SourceSettings, digest
from client.data.sources.parts.scatter import scatter

CLOSED_LOOP = frozenset({"0", "6", "8", "9"})


class Digits(SourceSettings):
    """Settings of scattered digits. Columns: `digit`, and `loop` ("yes" where the digit contains a closed loop).

    Attributes:
        classes: the digits to take.
        canvas: side of the square canvas in pixels.
        seed: seed of the places on the canvas.
    """

    kind: Literal["digits"]
    classes: Annotated[list[Annotated[int, Field(ge=0, le=9)]], Field(min_length=1)]
    canvas: Annotated[int, Field(ge=13)] = 20
    seed: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Two of the digits; there is nothing secret in them."""
        del folder
        return SourceExample({"kind": "digits", "classes": [3, 8], "seed": 1})

    def open(self) -> ScatteredDigits:
        """The scattered digits."""
        from sklearn.datasets import load_digits

        data = load_digits()
        chosen = [row for row in range(len(data.target)) if int(data.target[row]) in self.classes]
        images = np.stack(
            # Each digit has a generator of its own: choosing other classes does not move it.
            [scatter(data.images[row] / 16.0, self.canvas, np.random.default_rng([self.seed, row])) for row in chosen]
        )
        return ScatteredDigits(tuple(chosen), tuple(str(data.target[row]) for row in chosen), images)


@dataclass(frozen=True)
class ScatteredDigits:
    """Opened digits."""

    rows: tuple[int, ...]
    labels: tuple[str, ...] = field(repr=False)
    images: np.ndarray = field(repr=False)

    def digest(self) -> str:
        """Over all pictures."""
        return digest([str(self.images.shape).encode(), self.images.tobytes()])

    def index(self) -> list[SourceRecord]:
        """All digits in scikit-learn's order."""
        return [
            SourceRecord(
                row=position + 1,
                file="digits",
                key=f"digit {row}",
                patient=None,
                split=None,
                cells={"digit": label, "loop": "yes" if label in CLOSED_LOOP else "no"},
            )
            for position, (row, label) in enumerate(zip(self.rows, self.labels, strict=True))
        ]

    def load(self, position: int) -> np.ndarray:
        """One picture, canvas x canvas, uint8."""
        picture: np.ndarray = self.images[position]
        return picture
