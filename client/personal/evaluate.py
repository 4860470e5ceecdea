"""Compares a run's final heads with those that the site adapts to itself or trains alone, on its own held-out units.

Everything stays here: nothing is sent, so nothing is charged. The site alone is shown with the privacy that the run
asked for, which shows what the federation added; without it; and as what the site's own adaptation makes of an
untrained head, which is what it could use if it never shared anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from google.protobuf.message import DecodeError

from client.aligners.parts.head import AlignedHead, list_alignments, serve_equal_classes
from client.config import Personal
from client.data.prepare import open_units
from client.data.units import Units
from client.personal.adapt import adapt_heads
from client.personal.align import ReleasedTask, adapt_tasks, select_adaptable
from client.personal.intervals import Estimate, estimate_metrics, list_intervals, list_values
from client.personal.local_heads import LocalTraining, make_local_steps, train_alone
from client.personal.metrics import Predictions, predict
from client.personal.personal_heads import PersonalHeads, list_head_parameters, save_personal_heads
from client.personal.tied import tie_heads
from client.protocol.site import FINAL_HEADS, Joined, Site, joined_run, load_modules, open_on_stored
from client.solvers import Solver, open_solver
from common import messages
from common.errors import instead
from common.events import ALONE, ALONE_ADAPTED, ALONE_NOT_PRIVATE, FEDERATED, PERSONAL, PERSONAL_UNIFORM
from common.model.class_moments import split_class_moments, unpack_class_moments
from common.model.trunks import create_modules
from common.run import Privacy
from common.tasks import Task
from common.types import BadInput, DigestMismatch, Heads, heads_digest


@dataclass(frozen=True)
class HomePredictions:
    """The outputs of several kinds of heads for one site's held-out units.

    Attributes:
        run_id: id of the run.
        personal: how the site adapted the final heads.
        num_held_out: number of held-out units.
        tasks: task -> its definition.
        outputs: task -> kind of heads -> outputs; tasks without a labelled held-out record are left out.
        alignments: task -> which alignment the site took, in words; of tasks that none was tried for nothing.
    """

    run_id: str
    personal: Personal
    num_held_out: int
    tasks: Mapping[str, Task]
    outputs: Mapping[str, Mapping[str, Predictions]] = field(repr=False)
    alignments: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One run's result at this site.

    Attributes:
        run_id: id of the run.
        personal: how the site adapted the final heads.
        num_held_out: number of held-out units.
        tasks: task -> kind of heads (`FEDERATED` and the others of common/events) -> metric -> its estimate.
        alignments: task -> which alignment the site took, in words; of tasks that none was tried for nothing.
    """

    run_id: str
    personal: Personal
    num_held_out: int
    tasks: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    alignments: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Returns the comparison as plain values for JSON."""
        return {
            "run": self.run_id,
            "held_out_units": self.num_held_out,
            "personal": self.personal,
            "alignments": dict(self.alignments),
            "tasks": {
                task: {kind: list_values(own) for kind, own in each.items()} for task, each in self.tasks.items()
            },
            "intervals": {
                task: {kind: list_intervals(own) for kind, own in each.items()} for task, each in self.tasks.items()
            },
        }


def compare(site: Site, run_id: str | None = None) -> Comparison:
    """Evaluates a run's final heads, personal heads and heads trained alone, on held-out units of the site.

    Args:
        site: the site that took part in the run.
        run_id: id of the run; by default the run whose final heads arrived last.

    Raises:
        BadInput: no such run, or its data are gone, or no unit is held out.
        DigestMismatch: the heads on disk are not those that were sent.
    """
    return estimate_all(predict_at_home(site, run_id))


def estimate_all(found: HomePredictions) -> Comparison:
    """Returns the metrics of all kinds of heads, with their intervals."""
    estimates = {
        name: {kind: estimate_metrics(task, [each]) for kind, each in found.outputs.get(name, {}).items()}
        for name, task in found.tasks.items()
    }
    return Comparison(found.run_id, found.personal, found.num_held_out, estimates, found.alignments)


def predict_at_home(site: Site, run_id: str | None = None, *, lenient: bool = False) -> HomePredictions:
    """Returns the outputs of all kinds of heads for the site's held-out units; personal heads are saved.

    Args:
        site: the site that took part in the run.
        run_id: id of the run; by default the run whose final heads arrived last.
        lenient: as in `adapt`.

    Raises:
        BadInput: no such run, or its data are gone, or no unit is held out.
        DigestMismatch: the heads on disk are not those that were sent.
    """
    run_id = run_id or find_last_run(site)
    joined = joined_run(site, run_id)
    run, tasks = joined.run, open_on_stored(site, joined)
    device = torch.device("cpu")
    train, test = (open_units(joined.folder / "data", side, list(tasks), device) for side in ("train", "test"))
    if test.num_units == 0:
        raise BadInput("split: expected held-out units to evaluate on, got none; set split.test_fraction")
    sizes = run.parameter_group_sizes({name: site.config.tasks[name].public_size for name in tasks})
    backbones = {name: site.backbones().open(digest) for name, digest in joined.digests(tasks).items()}

    def train_here(solver: Solver, privacy: Privacy | None, purpose: str, rounds: int = run.rounds) -> Heads:
        plan = solver.plan(privacy, site.config.unit, run.rounds)
        asked = run if privacy is not None else run.model_copy(update={"privacy": "non_private"})
        training = LocalTraining(asked, solver, plan, rounds, tasks, train, sizes)
        modules = create_modules(run, tasks, backbones)
        steps = make_local_steps(asked, sizes)
        return train_alone(training, modules, entropy=site.entropy, purpose=purpose, apply_update=steps)

    solver = open_solver(run.solver, "solver")
    final = load_final_heads(joined.folder)
    modules = {FEDERATED: load_modules(site, joined, tasks, final)}
    if site.config.personal != "none":
        modules[PERSONAL] = {**modules[FEDERATED], **adapt(site, run_id, lenient=lenient)}
        if any(isinstance(head, AlignedHead) for head in modules[PERSONAL].values()):
            modules[PERSONAL_UNIFORM] = serve_equal_classes(modules[PERSONAL])
    if run.requested_privacy is not None:
        alone = train_here(solver, run.training_privacy, f"home/{run_id}")
        modules[ALONE] = load_modules(site, joined, tasks, alone)
    alone = train_here(solver.without_privacy(), None, f"home/{run_id}/not-private")
    modules[ALONE_NOT_PRIVATE] = load_modules(site, joined, tasks, alone)
    if site.config.personal == "fit":
        start = train_here(solver.without_privacy(), None, f"home/{run_id}/adapted", rounds=0)
        untrained = load_modules(site, joined, tasks, start)
        own = adapt_heads("fit", untrained, tasks, train.passed(untrained))
        modules[ALONE_ADAPTED] = {**untrained, **own}
    outputs = predict_held_out(modules, tasks, test)
    alignments = list_alignments(modules.get(PERSONAL, {}))
    return HomePredictions(run_id, site.config.personal, test.num_units, tasks, outputs, alignments)


def predict_held_out(
    modules: Mapping[str, Mapping[str, torch.nn.Module]], tasks: Mapping[str, Task], test: Units
) -> dict[str, dict[str, Predictions]]:
    """Returns task -> kind of heads -> outputs for held-out units; tasks without a labelled one are left out.

    Args:
        modules: kind of heads -> heads and trunks by name.
        tasks: task -> its definition.
        test: the held-out units.
    """
    outputs: dict[str, dict[str, Predictions]] = {}
    for kind, own in modules.items():
        held_out = test.passed(own)
        for name, task in tasks.items():
            predictions = predict(task, own[name], name, held_out)
            if predictions is not None:
                outputs.setdefault(name, {})[kind] = predictions
    return outputs


def adapt(site: Site, run_id: str | None = None, *, lenient: bool = False) -> dict[str, torch.nn.Module]:
    """Adapts a run's final heads to the site as its file says, saves and returns them; nothing is sent or spent.

    Args:
        site: the site that took part in the run.
        run_id: id of the run; by default the run whose final heads arrived last.
        lenient: with `personal: adapt` keeps the run's head where the site's labels do not say its class mix.

    Raises:
        BadInput: no such run, or its data are gone, or the site file's `personal` is none or does not suit the run.
        DigestMismatch: the heads on disk are not those that were sent.
    """
    mode = site.config.personal
    if mode == "none":
        raise BadInput("personal: expected prior, fit, tied or adapt in the site file, got none")
    joined = joined_run(site, run_id or find_last_run(site))
    tasks, final = open_on_stored(site, joined), load_final_heads(joined.folder)
    if mode == "tied":
        heads = {**final, **tie_heads(site, joined, tasks, final)}
        modules = load_modules(site, joined, tasks, heads)
        adapted = {name: modules[name] for name in tasks}
    else:
        modules = load_modules(site, joined, tasks, final)
        units = open_units(joined.folder / "data", "train", list(tasks), torch.device("cpu")).passed(modules)
        if mode == "adapt":
            released = _read_released(joined, tasks, modules)
            aligned = adapt_tasks(site.config, released, units, lenient=lenient)
            adapted = {name: aligned.get(name, modules[name]) for name in tasks}
        else:
            adapted = adapt_heads(mode, modules, tasks, units)
    kept = {name: list_head_parameters(head) for name, head in adapted.items()}
    save_personal_heads(joined.folder, PersonalHeads(mode, heads_digest(final), mode == "tied", kept))
    return adapted


def _read_released(
    joined: Joined, tasks: Mapping[str, Task], modules: Mapping[str, torch.nn.Module]
) -> dict[str, ReleasedTask]:
    """Returns what a run released of those of its tasks that have classes. Raises BadInput where there is nothing."""
    request = load_final_request(joined.folder)
    _, moments = split_class_moments(request.heads)
    released = {}
    for name, task in select_adaptable(tasks).items():
        num_classes = len(task.labels)  # type: ignore[attr-defined]
        own = unpack_class_moments(moments, name, joined.run.backbone_of(name), num_classes)
        released[name] = ReleasedTask(task, modules[name], own, request.temperatures.get(name))
    return released


def load_final_heads(folder: Path) -> Heads:
    """Returns the final heads in a run's folder. Raises as `load_final_request`."""
    return split_class_moments(load_final_request(folder).heads)[0]


def load_final_request(folder: Path) -> messages.FinishRequest:
    """Returns what arrived at a run's end: its final heads, verified, and their temperatures.

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
    heads, _ = split_class_moments(request.heads)
    if heads_digest(heads) != request.digest:
        raise DigestMismatch(f"{path}: the heads differ from the digest they were sent with")
    return request


def find_last_run(site: Site) -> str:
    """Returns the id of the run whose final heads arrived last. Raises BadInput where none has."""
    ended = sorted(site.config.coordinator_dir.glob(f"runs/*/{FINAL_HEADS}"), key=lambda path: path.stat().st_mtime)
    if not ended:
        raise BadInput(
            "expected a run that has ended, but this site has received no final heads yet; a site that took "
            "part in no run names a model's folder: `--model MODEL`, or `headwater predict MODEL`"
        )
    return ended[-1].parent.name
