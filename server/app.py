"""The ServerApp: reads what the run configuration names and calls one function."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from common.events import FileJournal
from common.run import RunConfig
from common.types import BadInput
from common.yaml import load, write_yaml
from server.reports.results import new_run_folder, write_environment, write_results
from server.reports.summary import FLOWER_APP
from server.reports.tables import render_summary
from server.rounds.loop import run_federation
from server.superlink.deployed_run import run_deployed

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the folder that `headwater coordinator start` prepared, or the run file that `flwr run` names."""
    setting = {key: str(context.run_config.get(key, "")) for key in ("run-folder", "run-file", "run-dir")}
    if setting["run-folder"]:
        run_deployed(grid, Path(setting["run-folder"]))
    elif setting["run-file"]:
        _run_from_file(grid, Path(setting["run-file"]), Path(setting["run-dir"] or "runs"))
    else:
        raise BadInput("run-file: expected the path of a run file, got nothing")


def _run_from_file(grid: Grid, run_file: Path, run_dir: Path) -> None:
    """Runs a run file, as by `flwr run . --run-config 'run-file="..." run-dir="..."'`."""
    run = load(RunConfig, run_file)
    if run.choice is not None:
        raise BadInput(f"{run_file}: choice: expected none here; `headwater coordinator choose` has sites vote")
    folder = new_run_folder(run_dir, run.name)
    write_yaml(folder / "config.yaml", run)
    write_environment(folder / "environment.json", {"run": run.seed})
    from common.model.backbones import open_backbones  # Here: a deployed run's process never loads torch.

    backbones = open_backbones(run)
    journal = FileJournal(folder / "journal.jsonl")
    outcome = run_federation(
        grid,
        run,
        backbones,
        run_id=folder.name,
        folder=folder,
        journal=journal,
        executor=FLOWER_APP,
        witnesses=run_dir / "witnesses.json",
    )
    summary = write_results(folder, run, backbones, outcome.heads, outcome.moments)
    console = Console(width=100)
    console.print(render_summary(summary))
    console.print(f"results: {folder}", soft_wrap=True)
