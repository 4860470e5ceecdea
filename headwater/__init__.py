"""The public API of Headwater: run, plan and audit a simulation, and use what came out of it, from Python.

Importing it loads nothing heavy; each function imports what it uses when it is called.

    import headwater

    run = headwater.simulate("demo.yaml", run__rounds=3)
    print(run.summary.tasks["digit"].metrics)
    model = headwater.load(run.folder)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.prediction.predict import LoadedModel
    from client.protocol.plan import RunPlan
    from common.events import AuditVerdict, RunEvent, Summary

__all__ = ["Run", "audit", "load", "plan", "read_run", "simulate"]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: the run's folder, with `journal.jsonl`, `summary.json`, `model/` and `checkpoint.safetensors`.
        summary: metrics of every task, privacy spent at every site, bytes and time.
    """

    folder: Path
    summary: Summary

    def read_journal(self) -> list[RunEvent]:
        """Returns the run's events in their order."""
        from common.events import read_run_journal

        return read_run_journal(self.folder / "journal.jsonl")

    @property
    def heads(self) -> dict[str, Path]:
        """The safetensors files of the final heads, by task."""
        return {path.stem: path for path in sorted((self.folder / "model" / "heads").glob("*.safetensors"))}


def simulate(config: str | Path, *, out: str | Path | None = None, **overrides: Any) -> Run:
    """Runs a simulation and returns its result.

    Args:
        config: path of a simulation file.
        out: folder for the results, new or empty; by default a new one in the file's `runs_dir`.
        **overrides: values that replace those of the file; two underscores stand for a dot: `run__rounds=3`.

    Raises:
        BadInput: the file, an override or a file that it names is not valid.
        RunFailed: a task did not get enough replies.
    """
    from simulations.experiment import run

    summary = run(Path(config), out=None if out is None else Path(out), overrides=_as_overrides(overrides))
    assert summary.path is not None
    return Run(Path(summary.path), summary)


def load(path: str | Path, *, device: str = "cpu", backbones: str | Path | None = None) -> LoadedModel:
    """Returns a finished model, ready to use.

    Args:
        path: the model's folder, or the folder of the run that it is the result of.
        device: device that records are encoded on, as torch names it.
        backbones: weights of a model that was handed on without them: a safetensors file, or a folder of such files.

    Raises:
        BadInput: there is no model, or a part of it is missing.
        DigestMismatch: a part of it was changed.
    """
    import torch

    from client.prediction.predict import LoadedModel
    from common.serving.network import open_model

    return LoadedModel(
        open_model(Path(path), torch.device(device), backbones=None if backbones is None else Path(backbones))
    )


def read_run(run_folder: str | Path) -> Run:
    """Returns a finished run from its folder.

    Raises:
        BadInput: the folder holds no summary.
    """
    from common.events import Summary
    from common.types import BadInput

    path = Path(run_folder) / "summary.json"
    if not path.is_file():
        raise BadInput(f"{run_folder}: expected the folder of a finished run, found no summary.json in it")
    return Run(Path(run_folder), Summary.model_validate_json(path.read_bytes()))


def plan(config: str | Path, **overrides: Any) -> list[RunPlan]:
    """Returns what a simulation would cost each site and how well it can work; nothing is trained or spent.

    Args:
        config: path of a simulation file.
        **overrides: as in `simulate`.

    Raises:
        BadInput: the file or an override is not valid.
    """
    from common.yaml import load as load_settings
    from simulations.config import SimulationConfig
    from simulations.plan import plan_simulation

    return plan_simulation(load_settings(SimulationConfig, Path(config), _as_overrides(overrides)))


def audit(config: str | Path, **overrides: Any) -> AuditVerdict:
    """Returns the verdict of a privacy audit of a simulation's solver on synthetic records.

    Args:
        config: path of a simulation file.
        **overrides: as in `simulate`.

    Raises:
        BadInput: the run promises no privacy, or uses a solver or task that cannot be audited.
        RunFailed: nothing could be measured.
    """
    from common.yaml import load as load_settings
    from simulations.audit import audit_simulation
    from simulations.config import SimulationConfig

    loaded = load_settings(SimulationConfig, Path(config), _as_overrides(overrides))
    return audit_simulation(loaded, lambda phase, done, total: None)


def _as_overrides(values: dict[str, Any]) -> list[str]:
    from common.yaml import as_override

    return [as_override(key.replace("__", "."), value) for key, value in values.items()]
