"""The newest attempt at a secure sum of one run, on the site's disk: what a site that was killed goes on from.

There is one at a time, and it goes forward: attempts of earlier rounds, and earlier attempts of the same round, are
over for this site. Its seed, from which all its keys follow, is overwritten by the next one and removed with the run's
end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.protocol.site import SECURE_SUM, SiteDeclined
from common.files import lock_file, write_atomic
from common.secure_sum.attempt import SiteAttempt
from common.secure_sum.terms import SumTerms
from common.types import BadInput, DeclineReason


@dataclass(frozen=True)
class AttemptStore:
    """The newest attempt of a run, while no other process or thread has it."""

    _path: Path

    @classmethod
    @contextmanager
    def exclusive(cls, run_folder: Path) -> Iterator[AttemptStore]:
        """Yields the store of a run; others wait meanwhile."""
        with lock_file(run_folder / f"{SECURE_SUM}.lock"):
            yield cls(run_folder / SECURE_SUM)

    def find(self, terms: SumTerms) -> SiteAttempt | None:
        """Returns the state of an attempt; None where it has not begun.

        Raises:
            SiteDeclined: it is over, or the file is damaged.
        """
        try:
            kept = SiteAttempt.from_bytes(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except BadInput as error:
            raise SiteDeclined(
                DeclineReason.INTERNAL, f"{self._path}: {error}; remove it, and a new attempt goes on"
            ) from error
        place, newest = (terms.round, terms.attempt), (kept.terms.round, kept.terms.attempt)
        if place < newest:
            raise SiteDeclined(
                DeclineReason.OVERTAKEN,
                f"attempt {terms.attempt} of round {terms.round}: attempt {newest[1]} of round {newest[0]} has begun",
            )
        return kept if place == newest else None

    def read(self, terms: SumTerms) -> SiteAttempt:
        """Returns the state of an attempt.

        Raises:
            SiteDeclined: it is over or has not begun.
        """
        kept = self.find(terms)
        if kept is None:
            raise SiteDeclined(
                DeclineReason.BAD_REQUEST, f"attempt {terms.attempt} of round {terms.round} has not begun here"
            )
        return kept

    def keep(self, attempt: SiteAttempt) -> None:
        """Keeps a state; it is on the disk when this returns, and only the owner can read it."""
        write_atomic(self._path, attempt.to_bytes())
