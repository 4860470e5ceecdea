"""An MLflow store in one SQLite file; `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db` shows it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from common.plugins import Plugin
from server.reports.trackers import Point, TrackedRun

STORE = "mlflow.db"
EXPERIMENT = "headwater"


@final
class Mlflow(Plugin):
    """Keeps each run as a run of one experiment, with its facts as tags."""

    kind: Literal["mlflow"]
    packages: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")
    extra: ClassVar[str] = "mlflow"

    def begin(self, folder: Path, run_id: str, settings: Mapping[str, str]) -> TrackedRun:
        """Begins a run of the experiment.

        Args:
            folder: folder of the store.
            run_id: id of the run, which is its name at MLflow.
            settings: facts of the run.
        """
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # Read when the package is imported: it would ask a server.
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve()}/{STORE}")
        known = client.get_experiment_by_name(EXPERIMENT)
        artifacts = (folder.resolve() / "artifacts").as_uri()
        experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        for earlier in client.search_runs([experiment]):
            if "path" in settings and earlier.data.tags.get("path") == settings["path"]:
                client.delete_run(earlier.info.run_id)  # It was interrupted: the journal has its numbers too.
        run = client.create_run(experiment, run_name=run_id, tags=dict(settings))
        return _StoredRun(client, run.info.run_id)


@final
@dataclass(frozen=True)
class _StoredRun:
    client: Any
    run: str

    def add(self, points: Sequence[Point]) -> None:
        """Adds numbers, in batches of the size that MLflow takes."""
        from mlflow.entities import Metric

        for start in range(0, len(points), 500):
            batch = [
                Metric(point.curve, point.value, round(1000 * point.time), point.step)
                for point in points[start : start + 500]
            ]
            self.client.log_batch(self.run, metrics=batch)

    def end(self, *, completed: bool) -> None:
        """Says at MLflow how the run ended."""
        self.client.set_terminated(self.run, "FINISHED" if completed else "FAILED")
