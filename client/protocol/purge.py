"""A patient leaves: excluded from now on, and everything at the site that was computed from records is removed.

Removed are all cached features, all prepared arrays, all heads that the site adapted to itself and the keys of secure
sums, not only those that can be matched to the patient: features of an earlier export of a source have another digest
and could not be found by name. They are encoded again, without the patient, when a run is prepared. What was spent
stays spent; stored replies stay, because they are noised and left the site already, and a repeated request must get the
same bytes.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from client.data.exclusions import Exclusions
from client.data.prepare import PROBLEMS
from client.data.sources import open_source
from client.ledger.overlap import forget_patients
from client.ledger.place import locate_ledgers
from client.protocol.site import MODELS, PERSONAL_HEADS, SECURE_SUM, Site
from common.events import FileJournal, RecordsPurged
from common.files import flush_folder, private_folder
from common.types import BadInput


@dataclass(frozen=True)
class Purged:
    """The result of a purge, in numbers only.

    Attributes:
        num_excluded: ids on the list now; one that was not written in its shared form counts twice.
        num_new: of them by this purge.
        num_records: records of the site's present sources that are left out.
        num_features: cached sources removed.
        num_runs: runs whose prepared arrays were removed; they have to be prepared again.
    """

    num_excluded: int
    num_new: int
    num_records: int
    num_features: int
    num_runs: int


def purge(site: Site, ids: Iterable[str]) -> Purged:
    """Exclude patients or records, then remove what was computed from any record.

    Raises:
        BadInput: a blank id, a damaged exclusion list, a source that cannot be opened (the ids are then excluded and
            the features removed all the same).
    """
    state_dir = site.config.state_dir
    before = Exclusions.read(state_dir)
    after = before.with_ids(ids)
    # Before anything is removed, so that nothing is encoded again from those who leave.
    after.write(state_dir)
    features = _removed(site.features_folder())
    places = site.config.list_coordinator_dirs().values()
    runs = [folder for place in places for folder in sorted(place.glob("runs/*")) if _remove_prepared(folder)]
    for folder in sorted((state_dir / MODELS).glob("*")):
        _remove_prepared(folder)
    with contextlib.suppress(BadInput):  # Two ledgers: no charge can be made until one is gone.
        forget_patients(locate_ledgers(site.config), site.config.registry, state_dir)
    num_new = len(after.hashes) - len(before.hashes)
    journal = FileJournal(private_folder(state_dir) / "site.jsonl")  # Of the site, whatever coordinator it serves.
    journal.write(RecordsPurged(num_excluded=num_new, num_features=features, num_runs=len(runs)))
    return Purged(len(after.hashes), num_new, _count(site, after), features, len(runs))


def _count(site: Site, exclusions: Exclusions) -> int:
    config = site.config
    sources = [open_source(spec, f"sources.{name}", config.plugins) for name, spec in config.sources.items()]
    return sum(len(exclusions.positions(source.open().index())) for source in sources)


def _removed(folder: Path) -> int:
    """Remove every entry, and what a dead writer left of one."""
    entries = [path for path in folder.glob("*") if path.is_dir()] if folder.exists() else []
    for entry in entries:
        shutil.rmtree(entry)
    if entries:
        flush_folder(folder)
    return sum(not entry.name.startswith(".") for entry in entries)


def _remove_prepared(run: Path) -> bool:
    """Remove a run's arrays and the heads adapted to them; the mark of complete preparation goes first.

    So does what opens the stored vector of a secure sum, whose noise is a part of what the sum has.
    """
    prepared = (run / "prepared.json").exists() or (run / "data").exists()
    (run / "prepared.json").unlink(missing_ok=True)
    shutil.rmtree(run / "data", ignore_errors=True)
    (run / PROBLEMS).unlink(missing_ok=True)
    others = [path for path in (run / PERSONAL_HEADS, run / SECURE_SUM) if path.exists()]
    for path in others:
        path.unlink(missing_ok=True)
    if prepared or others:
        flush_folder(run)
    return prepared
