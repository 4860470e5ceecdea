"""The file of candidates for a choice."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from common.plugins import Frozen, Spec
from common.run import AggregationSpec, ChoiceSettings, Name, Privacy, RunConfig, SolverSpec, TaskSpec
from common.tasks import LabelPrior, open_task
from common.types import EPSILONS, MAX_BACKBONES, BadInput
from common.yaml import load

MAX_CANDIDATES = 64


class CandidateSpec(Spec):
    """A backbone's settings, and beside them its licence.

    Attributes:
        licence: licence of the weights, as whoever writes the file declares it.
    """

    licence: str | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the kind's own file is given."""
        return self.model_dump(exclude={"licence"})


class CandidateFile(Frozen):
    """Backbones to choose from.

    Attributes:
        candidates: name -> settings of a backbone, in the order that decides ties.
        scorer: what a site's vote minimises.
    """

    model_config = ConfigDict(title="candidate file")

    candidates: Annotated[dict[Name, CandidateSpec], Field(min_length=2, max_length=MAX_CANDIDATES)]
    scorer: Spec = Spec(kind="ridge")


def make_choice_run(run: RunConfig, path: Path, epsilon: float, task: Name | None) -> RunConfig:
    """Returns the run in which sites vote on a backbone for a task of another run; its own backbone is not used.

    Args:
        run: the run for which a backbone is chosen: its task, the unit and delta of its privacy, and its cohort.
        path: file of candidates.
        epsilon: pure epsilon of each site's vote.
        task: name of the task; None where the run has only one.

    Raises:
        BadInput: a setting or the file is wrong, or the task cannot be voted on.
    """
    EPSILONS.check("--epsilon", epsilon)
    if run.requested_privacy is None:
        raise BadInput("privacy: expected the unit and delta of a private run, under which sites vote; got non_private")
    name = task or next(iter(run.tasks))
    if name not in run.tasks or (task is None and len(run.tasks) > 1):
        raise BadInput(f"--task: expected one of {', '.join(run.tasks)}, got {task or 'nothing'}")
    opened = open_task(run.tasks[name], f"tasks.{name}")
    if not isinstance(opened, LabelPrior):
        raise BadInput(f"tasks.{name}: expected a task with classes to vote on, got kind {opened.kind!r}")
    file = load(CandidateFile, path)
    if len(file.candidates) > MAX_BACKBONES:
        raise BadInput(
            f"{path}: expected at most {MAX_BACKBONES} candidates for real sites, each of which receives all of them; "
            f"got {len(file.candidates)}"
        )
    specs = {}
    for key, spec in file.candidates.items():
        specs[key] = Spec(**spec.settings())
        specs[key]._base = spec._base
    return RunConfig(
        name=f"choose-{run.name}"[:64],
        seed=run.seed,
        rounds=1,
        backbones=specs,
        tasks={name: TaskSpec(**run.tasks[name].settings())},
        licences={key: spec.licence[:200] for key, spec in file.candidates.items() if spec.licence},
        # Neither is used: nothing is trained.
        solver=SolverSpec(kind=run.solver.kind),
        aggregation=AggregationSpec(kind="mean"),
        privacy=Privacy(unit=run.requested_privacy.unit, delta=run.requested_privacy.delta, target_epsilon=epsilon),
        choice=ChoiceSettings(scorer=file.scorer),
        cohort=run.cohort,
    )
