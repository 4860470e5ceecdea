"""Krum and Multi-Krum (Blanchard et al. 2017, Section 4): the changes that are nearest to their neighbours.

Of n updates, `byzantine` = f of which may be anything, each has a score: the sum of squared L2 distances to its
n - f - 2 nearest others. The mean of the `selected` updates of the lowest scores is taken; 1 is Krum. The proof needs
n > 2 f + 2, and for the mean of m that m <= n - f - 2 (El Mhamdi et al. 2018): of five sites one may be hostile, and
not two.

Scores are those of one head or trunk: different sites may be selected for different ones. Sites count alike: a public
size is what a site says of itself. Where the noise of privacy is longer than the sites' signal, all honest updates are
nearly as far from each other, and a hostile update near their middle has the lowest score: Krum then selects it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from server.rounds.aggregators import Stateless, Weighted, sort_updates, stack_changes


class Krum(Stateless):
    """new = old + learning_rate * mean of the changes of the lowest scores, whatever the sites' sizes.

    Attributes:
        byzantine: number of sites that may send anything.
        selected: number of updates that are averaged; 1 is Krum, more is Multi-Krum.
    """

    kind: Literal["krum"]
    byzantine: Annotated[int, Field(ge=1, le=10_000)]
    selected: Annotated[int, Field(ge=1, le=10_000)] = 1
    needs_sum: ClassVar[bool] = False

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "krum", "byzantine": 1, "selected": 2, "learning_rate": 0.5}

    @property
    def min_updates(self) -> int:
        """2 * byzantine + 3, and byzantine + selected + 2 where that is more."""
        return max(2 * self.byzantine + 3, self.byzantine + self.selected + 2)

    def combine(self, deltas: Sequence[Weighted]) -> Mapping[str, NDArray[np.float64]]:
        """Returns the mean of the selected changes."""
        ordered = sort_updates(deltas)  # Of equal scores the first is selected, whoever answered first.
        changes = stack_changes(ordered)
        scores_N = self._compute_scores(np.concatenate([part.reshape(len(part), -1) for part in changes.values()], 1))
        selected = np.sort(np.argsort(scores_N, kind="stable")[: self.selected])
        return {name: part[selected].mean(axis=0) for name, part in changes.items()}

    def _compute_scores(self, changes_NP: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns each update's sum of squared distances to its nearest others."""
        scores = []
        for index, change_P in enumerate(changes_NP):
            distances_N = np.sort(np.square(np.delete(changes_NP, index, axis=0) - change_P).sum(axis=1))
            scores.append(distances_N[: len(changes_NP) - self.byzantine - 2].sum())
        return np.array(scores)
