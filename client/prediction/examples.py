"""Records of a site on its own page: the text of their label, that which the head predicts, and the errors between.

A rate hides what is wrong: one speaker who is never understood, or every recording a little. The page stays at the
site, because its rows are records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from client.config import LabelColumns
from client.data.sources import SourceRecord
from client.data.sources.parts.boundary import try_record
from client.personal.report import find_reported_run
from client.prediction.home import StoredFeatures, open_home_model, open_home_records
from client.prediction.records import Chosen, Part, name_file, predict_part
from client.protocol.site import Site, SiteDeclined, joined_run
from common.inputs import spread
from common.report.page import ReportTable, Section, count_of
from common.serving.network import Model
from common.tasks import ComparesTexts
from common.tasks.parts.transcripts.symbols import count_edits
from common.types import BadInput, DigestMismatch

_MOST_READ = 200
"""Held-out records of each task that are compared, evenly spread over all of them."""

_WORST, _MEDIAN = 5, 3
"""Rows of a table: of the worst, and of those in the middle."""

_NOTHING = "(nothing)"


@dataclass(frozen=True)
class _Compared:
    """One record.

    Attributes:
        file: its file.
        meant: the words of its label.
        heard: the words of the prediction.
        edits: insertions, deletions and substitutions between them.
    """

    file: str
    meant: str
    heard: str
    edits: int

    @property
    def rank(self) -> tuple[float, int]:
        """Edits over the words of the label, then edits: the larger, the worse."""
        return self.edits / max(1, len(self.meant.split())), self.edits


def show_home_examples(site: Site, run_id: str | None) -> list[Section]:
    """Returns the section with a site's worst and middle held-out records of each task that predicts a text.

    Args:
        site: the site.
        run_id: id of the run; by default the one that the site's report is about.

    Returns:
        The section; none where the run has not ended, or predicts no texts.
    """
    chosen = run_id or find_reported_run(site.config)
    if chosen is None:
        return []
    try:
        # Most runs have no such task: their backbones are not opened.
        known = joined_run(site, chosen).tasks(site.config)
        names = [name for name, task in known.items() if isinstance(task, ComparesTexts) and name in site.config.tasks]
        if not names:
            return []
        model = open_home_model(site, chosen, torch.device("cpu"), federated=True).model
        parts = open_home_records(site, model, names, "test").parts
    except (BadInput, DigestMismatch, SiteDeclined):
        return []  # The results say why there are none.
    tables = [
        _make_table(name, _compare(site, model, part, name, site.config.tasks[name]))
        for part in parts
        for name in part.tasks
    ]
    lead = (
        "Held-out records of this site, as their labels say and as the federated head says: the worst first, by word "
        "errors over words, then those in the middle of all. Both are in the form in which they are compared."
    )
    return [Section("Examples", lead, tables=tables)]


def _compare(site: Site, model: Model, part: Part, name: str, own: LabelColumns) -> list[_Compared]:
    """Returns the records of a part that have a label and a prediction, the worst first."""
    task, compared = model.tasks[name], []
    assert isinstance(task, ComparesTexts)
    positions = spread(len(part.source.index()), _MOST_READ)
    some = Part(part.name, Chosen(part.source, positions), [name])
    for predicted, _ in predict_part(model, some, StoredFeatures(site, model).encode):
        for each in predicted:
            meant, _ = try_record(lambda each=each: _read_label(task, own, each.record))  # type: ignore[misc]
            if meant is not None:
                heard, _ = each.results[name]
                edits = count_edits(heard.split(), meant.split())
                compared.append(_Compared(name_file(each.record), meant, heard, edits))
    return sorted(compared, key=lambda each: each.rank, reverse=True)


def _read_label(task: ComparesTexts, own: LabelColumns, record: SourceRecord) -> str | None:
    """Returns a record's text as it is compared; None where it has none. Raises BadRecord."""
    cell = record.cells[own.columns[0]].strip()
    return task.read_text(own.read_cell(own.columns[0], cell)) if cell or own.missing == "read" else None


def _make_table(name: str, compared: Sequence[_Compared]) -> ReportTable:
    """Returns the worst and the middle ones of records that are sorted, each once."""
    middle = max(0, (len(compared) - _MEDIAN) // 2)
    chosen = [*range(min(_WORST, len(compared))), *range(middle, min(middle + _MEDIAN, len(compared)))]
    rows = [
        (
            each.file,
            "worst" if at < _WORST else "middle",
            each.meant or _NOTHING,
            each.heard or _NOTHING,
            f"{each.edits} of {count_of(len(each.meant.split()), 'word')}",
        )
        for at, each in ((at, compared[at]) for at in dict.fromkeys(chosen))
    ]
    caption = f"Task {name}: examples of {count_of(len(compared), 'held-out record')}"
    return ReportTable(caption, ("file", "among", "as labelled", "as predicted", "errors"), rows)
