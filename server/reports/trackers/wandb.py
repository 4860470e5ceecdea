"""Weights & Biases, offline: files in a folder, which `wandb sync` uploads where somebody decides that."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from common.plugins import Plugin
from server.reports.trackers import Point, TrackedRun

PROJECT = "headwater"


@final
class Wandb(Plugin):
    """Keeps each run as an offline run of one project, with its facts as configuration."""

    kind: Literal["wandb"]
    packages: ClassVar[tuple[str, ...]] = ("wandb",)
    extra: ClassVar[str] = "wandb"

    def begin(self, folder: Path, run_id: str, settings: Mapping[str, str]) -> TrackedRun:
        """Begins an offline run, whatever WANDB_MODE says: a coordinator's machine sends its numbers nowhere.

        Args:
            folder: folder of the offline runs.
            run_id: id of the run.
            settings: facts of the run.
        """
        os.environ["WANDB_MODE"] = "offline"
        os.environ["WANDB_CACHE_DIR"] = str(folder / "cache")  # Its log of itself, else in the user's home.
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # Read when the package is imported.
        import wandb

        own = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            # Of the machine and its packages nothing is written: the journal does not say it either.
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        run = wandb.init(
            project=PROJECT,
            id=run_id,
            name=run_id,
            dir=str(folder),
            mode="offline",
            config=dict(settings),
            reinit="create_new",
            settings=own,
        )
        # The rounds are the axis: an evaluation and the round's other numbers arrive one after the other.
        run.define_metric("*", step_metric="round")
        return _OfflineRun(run)


@final
@dataclass(frozen=True)
class _OfflineRun:
    run: Any

    def add(self, points: Sequence[Point]) -> None:
        """Adds numbers, those of a round together."""
        for step in dict.fromkeys(point.step for point in points):
            self.run.log({"round": step, **{point.curve: point.value for point in points if point.step == step}})

    def end(self, *, completed: bool) -> None:
        """Ends the run and writes its file."""
        self.run.finish(exit_code=0 if completed else 1)
