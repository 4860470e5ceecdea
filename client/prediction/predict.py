"""Prediction as one call: records in, a file or a table out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from client.data.records import RejectedRecord
from client.prediction.data import Records, choose_tasks, open_records
from client.prediction.output import Output, OutputLayout, opened_output, write_rejected
from client.prediction.places import NO_PLACES, PlacesOutput, PlacesWriter, opened_places, plan_places
from client.prediction.records import Encode, Part, PredictedRecord, encode_now, predict_part
from common.serving.network import Model
from common.types import BadInput

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from common.serving.folder import ModelConfig
    from common.serving.network import Network

Observe = Callable[[str, int, int], None]
"""Told which source is at work, and how many of how many of its records are done."""


@dataclass(frozen=True)
class Written:
    """The outcome of a prediction to a file.

    Attributes:
        num_predicted: number of records with a row.
        num_rejected: number of records that cannot be used, or not by all tasks.
    """

    num_predicted: int
    num_rejected: int


def write_predictions(
    model: Model,
    records: Records,
    output: Output,
    *,
    places: PlacesOutput = NO_PLACES,
    encode: Encode = encode_now,
    observe: Observe | None = None,
) -> Written:
    """Writes what a model says of records, and the list of those that it cannot use.

    Args:
        model: the model, with its backbones on the device that is to encode.
        records: the records.
        output: where both are written.
        places: where masks, boxes and overlays are written, as `plan_places` returned it.
        encode: computes or reads features.
        observe: told how far it is.

    Raises:
        BadInput: no record can be used; the list is written all the same.
    """
    layout, rejected, count = OutputLayout.of(model, records.parts), list(records.rejected), 0
    try:
        # The table is on the disk before anything else takes its place.
        with opened_places(places, model, records.parts) as drawing, opened_output(output, layout.columns) as writer:
            for part, predicted, others in _predict_all(model, records, encode, observe, drawing):
                writer.write([layout.make_row(part, each) for each in predicted])
                rejected += others
                count += len(predicted)
            if count == 0:
                raise BadInput(_explain_none(records, rejected, f"; {output.rejected} lists them" if rejected else ""))
            drawing.finish()
    except BadInput:
        if count == 0:
            write_rejected(output, rejected)
        raise
    write_rejected(output, rejected)
    return Written(count, len({(each.file, each.row) for each in rejected}))


@final
class LoadedModel:
    """A finished model in Python: `model(items)`, `model.predict(data)`, `model.torch()`.

    Attributes:
        model: the model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def config(self) -> ModelConfig:
        """All that is known of the model but its numbers."""
        return self.model.config

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks."""
        return list(self.model.tasks)

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Returns what each task serves for records in memory (`common.serving.network.Model`). Raises BadRecord."""
        return self.model(items)

    def list_columns(self, task: str) -> list[str]:
        """Returns the names of the columns that a task serves."""
        return self.model.list_columns(task)

    def torch(self, *tasks: str) -> Network:
        """Returns tasks as one module on the CPU, from raw inputs to what they serve (`common.serving.network.Model`).

        Args:
            *tasks: the tasks, which share a backbone; may be left out where the model has one.

        Raises:
            BadInput: there is no such task, or several and none is named.
        """
        return self.model.torch(*tasks)

    def predict(
        self,
        data: str | Path | pd.DataFrame | Sequence[str | Path],
        *,
        tasks: Sequence[str] = (),
        columns: Sequence[str] = (),
        source: str | None = None,
        masks: str | Path | None = None,
        boxes: str | Path | None = None,
        overlays: str | Path | None = None,
    ) -> pd.DataFrame:
        """Returns a row for each record of data that can be used, as `headwater predict` writes it.

        Args:
            data: a file or folder as `headwater predict --data` takes it, a table in memory, or paths of files. Rows
                of a table in memory keep their index.
            tasks: names of tasks; by default all.
            columns: of a table the column of texts or paths, and of pairs of texts the second one too; of an .npz file
                the array; by default it is found.
            source: of a file with several sources, the one to read.
            masks: new folder for the masks of a model that predicts some; the table then has their paths. A name that
                ends in .json is a file of their run lengths, as COCO has them.
            boxes: new `.json` file for the boxes of a model that predicts some.
            overlays: new folder for the pictures with masks or boxes drawn on them.

        Returns:
            The table. `attrs["rejected"]` lists the file, row, task and reason of each record that cannot be used; a
            warning says how many there are.

        Raises:
            BadInput: there is nothing that can be read, no record can be used, or something is there already.
        """
        import pandas as pd

        wanted = PlacesOutput(*(None if path is None else Path(path) for path in (masks, boxes, overlays)))

        given = Path(data) if isinstance(data, str) else data
        chosen = choose_tasks(self.model, tasks)
        places = plan_places(wanted, self.model, chosen, force=False)
        records = open_records(self.model, given, tasks=chosen, columns=columns, source=source)
        layout, rejected, rows, index = OutputLayout.of(self.model, records.parts), list(records.rejected), [], []
        with opened_places(places, self.model, records.parts) as drawing:
            for part, predicted, others in _predict_all(self.model, records, encode_now, None, drawing):
                rows += [layout.make_row(part, each) for each in predicted]
                index += [each.position for each in predicted]
                rejected += others
            if not rows:
                raise BadInput(_explain_none(records, rejected, ""))
            drawing.finish()
        frame = pd.DataFrame(rows, columns=[column.name for column in layout.columns])
        if isinstance(data, pd.DataFrame):
            frame.index = data.index[index]
        frame.attrs["rejected"] = [
            {"file": each.file, "row": each.row, "task": each.task, "reason": each.reason} for each in rejected
        ]
        if rejected:
            warnings.warn(f"{len(rejected)} record(s) could not be used: see attrs['rejected']", stacklevel=2)
        return frame


def _predict_all(
    model: Model, records: Records, encode: Encode, observe: Observe | None, drawing: PlacesWriter
) -> Iterator[tuple[Part, list[PredictedRecord], list[RejectedRecord]]]:
    for part in records.parts:

        def progress(done: int, total: int, part: Part = part) -> None:
            if observe is not None:
                observe(f"predicting {part.name}".strip(), done, total)

        for predicted, rejected in predict_part(model, part, encode, progress):
            drawn, others = drawing.write(part, predicted)
            yield part, drawn, [*rejected, *others]


def _explain_none(records: Records, rejected: Sequence[RejectedRecord], where: str) -> str:
    reasons = Counter(each.reason for each in rejected).most_common(1)
    reason = f", most because: {reasons[0][0]}" if reasons else ""
    counted = f"got {records.num_records:,}, of which it can use none"
    return f"data: expected records that the model can use, {counted}{reason}{where}"
