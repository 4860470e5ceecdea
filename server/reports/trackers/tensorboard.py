"""TensorBoard's event files; `tensorboard --logdir FOLDER` shows them, one run beside the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from common.plugins import Plugin
from server.reports.trackers import Point, TrackedRun


@final
class Tensorboard(Plugin):
    """Writes a folder of event files for each run."""

    kind: Literal["tensorboard"]
    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)
    extra: ClassVar[str] = "tensorboard"

    def begin(self, folder: Path, run_id: str, settings: Mapping[str, str]) -> TrackedRun:
        """Begins a run in a folder of its id.

        Args:
            folder: folder of all runs.
            run_id: id of the run.
            settings: facts of the run; TensorBoard shows numbers only.
        """
        del settings
        from tensorboard.summary import Writer  # Its own writer: torch's would load torch.

        return _EventFile(Writer(str(folder / run_id)))


@final
@dataclass(frozen=True)
class _EventFile:
    writer: Any

    def add(self, points: Sequence[Point]) -> None:
        """Adds numbers and flushes the file."""
        for point in points:
            self.writer.add_scalar(point.curve, point.value, point.step, wall_time=point.time)
        self.writer.flush()

    def end(self, *, completed: bool) -> None:
        """Closes the file; that a run failed is not said in it."""
        del completed
        self.writer.close()
