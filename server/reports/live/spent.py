"""Upper bounds on what each site has spent in a run so far, from the public numbers in the run's journal.

They are computed at once, and so a little larger, where records are sampled, than those in a run's summary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import final

from common.events import HeadsEvaluated, MomentsMeasured, RoundEnded, RunEvent, SiteJoined
from common.privacy.accounting import Mechanism, compute_epsilon


@final
class SpentSoFar:
    """The releases of every site that the coordinator used, added up event by event.

    Attributes:
        num_added: number of releases so far: while it stays the same, so does every epsilon.
    """

    def __init__(self) -> None:
        self.num_added = 0
        self._deltas: dict[str, float] = {}
        self._releases: dict[str, Counter[Mechanism]] = {}
        self._before: dict[str, Mechanism] = {}

    def add(self, event: RunEvent) -> None:
        """Adds the next event of the journal."""
        match event:
            case SiteJoined():
                self._deltas[event.site] = event.delta
            case MomentsMeasured():
                self.num_added += 1
                # Of several the last: a run was resumed before its first round, and got the stored replies.
                self._before = {
                    site: _make_release(noise) for site, noise in event.noise_multipliers.items() if noise > 0
                }
            case RoundEnded():
                for site, update in event.sites.items():
                    self._add_release(site, Mechanism.of(update.plan))
            case HeadsEvaluated():
                for site, noise in event.noise_multipliers.items():
                    self._add_release(site, _make_release(noise))
            case _:
                pass

    def compute_epsilon(self, site: str) -> float | None:
        """Returns an upper bound on a site's epsilon at the delta of its budget; None where it did not join."""
        if site not in self._deltas:
            return None
        mechanisms = [replace(kind, steps=count) for kind, count in self._releases.get(site, Counter()).items()]
        before = [self._before[site]] if site in self._before else []
        return compute_epsilon([*mechanisms, *before], self._deltas[site], quick=True)

    def find_largest(self) -> float | None:
        """Returns the largest epsilon of all sites; None where nothing was released, or a release is not private."""
        spent = [epsilon for site in self._deltas if (epsilon := self.compute_epsilon(site))]
        largest = max(spent, default=None)
        return None if largest is None or math.isinf(largest) else largest

    def _add_release(self, site: str, mechanism: Mechanism) -> None:
        self.num_added += 1
        self._releases.setdefault(site, Counter())[replace(mechanism, steps=1)] += mechanism.steps


def _make_release(noise_multiplier: float) -> Mechanism:
    return Mechanism("gaussian", noise_multiplier, 1.0, 1, 1.0)
