"""Compares a run's final heads with heads that the site trains alone, on the site's own held-out units.

Everything stays here: nothing is sent, so nothing is charged. The site alone is shown twice: with the privacy that the
run asked for, which shows what the federation added; and without, which is what a site could use if it never shared
anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from google.protobuf.message import DecodeError

from client.data.prepare import open_units
from client.data.units import Units
from client.personal.local_heads import LocalTraining, make_local_steps, train_alone
from client.personal.metrics import compute_exact_sums, compute_metrics, compute_pair_metrics
from client.protocol.site import FINAL_HEADS, Site, joined_run, load_modules
from client.solvers import Solver, open_solver
from common import messages
from common.errors import instead
from common.events import Metrics
from common.model.trunks import create_modules
from common.run import Privacy
from common.tasks import Task
from common.types import BadInput, DigestMismatch, Heads, Params, heads_digest

FEDERATED, ALONE, ALONE_NOT_PRIVATE = "federated", "site alone", "site alone, not private"


@dataclass(frozen=True)
class Comparison:
    """One run's result at this site.

    Attributes:
        run_id: id of the run.
        num_held_out: number of held-out units.
        tasks: task -> trained by (`FEDERATED`, `ALONE` or `ALONE_NOT_PRIVATE`) -> metrics.
    """

    run_id: str
    num_held_out: int
    tasks: Mapping[str, Mapping[str, Metrics]]

    def to_dict(self) -> dict[str, object]:
        """Returns the comparison as plain values for JSON."""
        tasks = {name: {by: dict(metrics) for by, metrics in columns.items()} for name, columns in self.tasks.items()}
        return {"run": self.run_id, "held_out_units": self.num_held_out, "tasks": tasks}


def compare(site: Site, run_id: str | None = None) -> Comparison:
    """Evaluates a run's final heads, and heads trained alone, on held-out units of the site.

    Args:
        site: the site that took part in the run.
        run_id: id of the run; by default the run whose final heads arrived last.

    Raises:
        BadInput: no such run, or its data are gone, or no unit is held out.
        DigestMismatch: the heads on disk are not those that were sent.
    """
    run_id = run_id or _find_last_run(site)
    joined = joined_run(site, run_id)
    run, tasks = joined.run, joined.tasks(site.config)
    device = torch.device("cpu")
    train, test = (open_units(joined.folder / "data", side, list(tasks), device) for side in ("train", "test"))
    if test.num_units == 0:
        raise BadInput("split: expected held-out units to evaluate on, got none; set split.test_fraction")
    sizes = run.parameter_group_sizes({name: site.config.tasks[name].public_size for name in tasks})
    backbones = {name: site.backbones().open(digest) for name, digest in joined.digests(tasks).items()}

    def train_here(solver: Solver, privacy: Privacy | None, purpose: str) -> Heads:
        plan = solver.plan(privacy, site.config.unit, run.rounds)
        asked = run if privacy is not None else run.model_copy(update={"privacy": "non_private"})
        training = LocalTraining(asked, solver, plan, run.rounds, tasks, train, sizes)
        modules = create_modules(run, tasks, backbones)
        steps = make_local_steps(asked, sizes)
        return train_alone(training, modules, entropy=site.entropy, purpose=purpose, apply_update=steps)

    solver = open_solver(run.solver, "solver")
    heads = {FEDERATED: load_final_heads(joined.folder)}
    if run.requested_privacy is not None:
        heads[ALONE] = train_here(solver, run.training_privacy, f"home/{run_id}")
    heads[ALONE_NOT_PRIVATE] = train_here(solver.without_privacy(), None, f"home/{run_id}/not-private")
    held_out = {by: test.passed(load_modules(site, joined, tasks, each)) for by, each in heads.items()}
    results = {
        name: {by: _evaluate(each[name], name, task, held_out[by]) for by, each in heads.items()}
        for name, task in tasks.items()
    }
    return Comparison(run_id, test.num_units, results)


def load_final_heads(folder: Path) -> Heads:
    """Returns the final heads in a run's folder.

    Raises:
        BadInput: the run has not ended here.
        DigestMismatch: the heads changed on disk since they were sent.
    """
    path = folder / FINAL_HEADS
    if not path.exists():
        raise BadInput(f"run {folder.name}: expected its final heads, but it has not ended here yet")
    try:
        request = messages.decode(messages.from_bytes(path.read_bytes()), messages.FinishRequest)
    except (DecodeError, OSError, messages.OtherVersion) as error:
        raise DigestMismatch(f"{path}: expected the final heads of a run{instead(error)}") from error
    if heads_digest(request.heads) != request.digest:
        raise DigestMismatch(f"{path}: the heads differ from the digest they were sent with")
    return request.heads


def _find_last_run(site: Site) -> str:
    ended = sorted(site.config.coordinator_dir.glob(f"runs/*/{FINAL_HEADS}"), key=lambda path: path.stat().st_mtime)
    if not ended:
        raise BadInput("expected a run that has ended, but this site has received no final heads yet")
    return ended[-1].parent.name


def _evaluate(params: Params, name: str, task: Task, units: Units) -> Metrics:
    sums = compute_exact_sums(params, name, task, units)
    if sums is None:
        return {}
    return {**compute_metrics(task, sums), **compute_pair_metrics(params, name, task, [units])}
