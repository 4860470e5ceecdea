"""What a run brought this site: its final heads beside heads the site trains alone, on its own held-out units.

Everything stays here: nothing is sent, so nothing is charged. The site alone is shown twice: with the privacy the run
asked for, which is what the federation added to; and without, which is what a site could use if it never shared
anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from client.data.prepare import open_units
from client.data.units import Units
from client.personal.local_heads import train_alone
from client.personal.metrics import Values, exact_sums, pair_values, values_of
from client.protocol.site import Site, joined_run, modules_of
from client.solvers import Solver, open_solver
from common import messages
from common.model.trunks import initial_modules
from common.run import Privacy
from common.tasks import Task
from common.types import BadInput, DigestMismatch, Heads, Params, heads_digest

FEDERATED, ALONE, ALONE_NOT_PRIVATE = "federated", "site alone", "site alone, not private"


@dataclass(frozen=True)
class Comparison:
    """One run's result at this site.

    Attributes:
        run_id: of the run.
        num_held_out: units that were held out.
        tasks: task -> who trained the head -> metrics.
    """

    run_id: str
    num_held_out: int
    tasks: Mapping[str, Mapping[str, Values]]


def compare(site: Site, run_id: str | None = None) -> Comparison:
    """Evaluate a run's final heads, and heads trained alone, on held-out units of the site.

    Args:
        site: whose.
        run_id: which run; by default the one that came home last.

    Raises:
        BadInput: no such run, or its data are gone, or no unit is held out.
        DigestMismatch: the heads on disk are not those that came home.
    """
    run_id = run_id or _last(site)
    joined = joined_run(site, run_id)
    tasks = joined.tasks(site.config)
    device = torch.device("cpu")
    train, test = (open_units(joined.folder / "data", side, list(tasks), device) for side in ("train", "test"))
    if test.num_units == 0:
        raise BadInput("split: expected held-out units to evaluate on, got none; set split.test_fraction")
    sizes = {name: site.config.tasks[name].public_size for name in tasks}
    backbones = {name: site.backbones().open(digest) for name, digest in joined.digests(tasks).items()}

    def alone(solver: Solver, privacy: Privacy | None, purpose: str) -> Heads:
        run = joined.run
        modules = initial_modules(run, tasks, backbones)
        return train_alone(run, modules, solver, privacy, tasks, train, sizes, site.config.unit, site.entropy, purpose)

    solver = open_solver(joined.run.solver, "solver")
    heads = {FEDERATED: final_heads(joined.folder)}
    if joined.run.requested_privacy is not None:
        heads[ALONE] = alone(solver, joined.run.requested_privacy, f"home/{run_id}")
    heads[ALONE_NOT_PRIVATE] = alone(solver.without_privacy(), None, f"home/{run_id}/not-private")
    held_out = {who: test.passed(modules_of(site, joined, tasks, own)) for who, own in heads.items()}
    results = {
        name: {who: _values(own[name], name, task, held_out[who]) for who, own in heads.items()}
        for name, task in tasks.items()
    }
    return Comparison(run_id, test.num_units, results)


def final_heads(folder: Path) -> Heads:
    """The heads that came home.

    Raises:
        BadInput: none did.
        DigestMismatch: they changed on disk since.
    """
    path = folder / "final_heads.bin"
    if not path.exists():
        raise BadInput(f"run {folder.name}: expected its final heads, but it has not ended here yet")
    request = messages.decode(messages.from_bytes(path.read_bytes()), messages.FinishRequest)
    if heads_digest(request.heads) != request.digest:
        raise DigestMismatch(f"{path}: the heads differ from the digest they came home with")
    return request.heads


def _last(site: Site) -> str:
    found = sorted((site.config.state_dir / "runs").glob("*/final_heads.bin"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise BadInput("expected a run that has ended, but none came home to this site yet")
    return found[-1].parent.name


def _values(params: Params, name: str, task: Task, units: Units) -> Values:
    sums = exact_sums(params, name, task, units)
    return {} if sums is None else {**values_of(task, sums), **pair_values(params, name, task, [units])}


def as_json(result: Comparison) -> dict[str, object]:
    """The comparison as plain values."""
    return {
        "run": result.run_id,
        "held_out_units": result.num_held_out,
        "tasks": {name: {who: dict(values) for who, values in own.items()} for name, own in result.tasks.items()},
    }
