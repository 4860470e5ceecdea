"""Domain adaptation at a site: a run's head behind an alignment that the site's own labels have not spoken against.

Nothing leaves. What the run is sent stays sums of features as the backbone gives them: a site that standardised them by
its own statistics first would let one record move all others, and epsilon 3 would be 4.7 or more.

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from client.aligners import Aligner, Array, SourceMoments, TargetRecords, open_aligners
from client.aligners.parts.guard import LIMIT, MOST_NOISE, choose_guarded, compare_hits
from client.aligners.parts.head import AlignedHead, keep_head, place_head
from client.aligners.parts.linear import make_discriminant
from client.aligners.parts.mix import estimate_mix, lift_shares, read_mix
from client.config import SiteConfig
from client.data.units import TaskRecords, Units
from client.personal.adapt import OwnHead, fit_tied, try_ties
from common.model.class_moments import ClassMoments
from common.model.moments import has_classes
from common.tasks import Task
from common.tasks.parts.rates import shrink_counts
from common.types import BadInput

SERVED = "served"
"""Name of the head that is taken where labels at home veto every alignment."""


class MixUnknown(BadInput):
    """A site's labels do not say its class mix."""


@dataclass(frozen=True)
class Adaptation:
    """A head that a site adapted to its domain.

    Attributes:
        head: the head.
        aligner: kind of the alignment; `SERVED` where there is none.
        mix_C: the site's class mix.
    """

    head: AlignedHead
    aligner: str
    mix_C: Array = field(repr=False)


@dataclass(frozen=True)
class ReleasedTask:
    """A task of a finished run as a site holds it, all of it from charged releases.

    Attributes:
        task: its definition.
        head: its head, as it is served.
        moments: what the run released of its classes.
        temperature: number by which the head's outputs are divided; None where none is known.
    """

    task: Task
    head: nn.Module
    moments: ClassMoments
    temperature: float | None


def adapt_tasks(
    config: SiteConfig, released: Mapping[str, ReleasedTask], units: Units, *, lenient: bool = False
) -> dict[str, AlignedHead]:
    """Returns the head of each task, adapted to a site's training units.

    Args:
        config: the site's settings.
        released: task -> what the run released of it; tasks with classes alone.
        units: the site's training units.
        lenient: keeps the run's head where labels do not say the site's class mix, instead of refusing.

    Raises:
        BadInput: the moments do not fit, or the site's class mix is not known.
    """
    aligners = open_aligners(config.aligners, "aligners")
    adapted: dict[str, AlignedHead] = {}
    for name, own in released.items():
        records, declared = units.tasks[name], config.tasks[name].mix
        source = read_source(own.moments, name, records.features_RD.shape[1])
        labels: list[str] = own.task.labels  # type: ignore[attr-defined]
        mix_C = None if declared is None else read_mix(declared, labels, f"tasks.{name}.mix")
        try:
            found = align_head(own.head, source, records, aligners, mix_C, temperature=own.temperature, task=own.task)
            adapted[name] = found.head
        except MixUnknown as error:
            if not lenient:
                raise BadInput(f"task {name}: {error}") from error
            adapted[name] = keep_head(own.head, source)
    return adapted


def select_adaptable(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Returns the tasks whose records have one class each. Raises BadInput where there is none."""
    found = {name: task for name, task in tasks.items() if has_classes(task)}
    if not found:
        kinds = ", ".join(dict.fromkeys(task.kind for task in tasks.values()))
        raise BadInput(
            f"personal: adapt: expected a task of kind classification, got {kinds}; `personal: fit` takes any task"
        )
    return found


def read_source(moments: ClassMoments, task: str, num_features: int) -> SourceMoments:
    """Returns released moments as aligners read them.

    Args:
        moments: what the run released of the task's classes.
        task: name of the task.
        num_features: number of features of the site's records.

    Raises:
        BadInput: they lack products of features, or are of another backbone.
    """
    # Where labels are equally frequent, noise alone is not to make some frequent.
    moments = replace(moments, counts_C=shrink_counts(moments.counts_C, moments.counts_deviation))
    within_DD = moments.within_DD()
    if within_DD is None:
        raise BadInput(
            f"task {task}: expected a run that released products of features (`moments.scatter` of its run file), got "
            "one without"
        )
    if within_DD.shape[0] != num_features:
        raise BadInput(
            f"task {task}: expected moments of {num_features} features, got {within_DD.shape[0]}: they are of another "
            "backbone"
        )
    noise_C = moments.sums_deviation / moments.counts_C
    return SourceMoments(moments.means_CD(), within_DD, lift_shares(moments.shares_C()), noise_C)


def align_head(
    head: nn.Module,
    source: SourceMoments,
    records: TaskRecords,
    aligners: Mapping[str, Aligner],
    mix_C: Array | None = None,
    *,
    temperature: float | None = None,
    task: Task | None = None,
) -> Adaptation:
    """Returns a run's head adapted to a site's records.

    Args:
        head: the run's head, as it is served; not modified.
        source: the moments that the run released.
        records: the site's training records with the features that the head reads; labels are class indices, and are
            used where the mask has them.
        aligners: kind -> aligner, in the order in which they are tried.
        mix_C: the site's class mix, where it is declared.
        temperature: number by which the head's outputs are divided; None where none is known.
        task: the task, to fit the head behind the first alignment to the labels; None leaves its weights as they are.

    Raises:
        MixUnknown: no mix is declared, and the site has no labels, or of one class only.
    """
    labelled = records.labelled()
    weight_R = labelled.weight_R.double().numpy()
    if mix_C is None:
        counts_C: Array = np.zeros(len(source.shares_C))
        np.add.at(counts_C, labelled.labels.numpy(), weight_R)
        mix_C = choose_mix(counts_C, source)
    rows_RD = nn.functional.normalize(records.features_RD.double(), dim=1).numpy()
    target = TargetRecords(rows_RD, records.weight_R.double().numpy())
    heads = [(SERVED, keep_head(head, source))]
    for kind, aligner in aligners.items():
        alignment = aligner.align(source, target, mix_C)
        placed = place_head(head, source, alignment, mix_C, temperature=temperature or 1.0, aligner=kind)
        heads.append((kind, placed))

    def compare(one: tuple[str, AlignedHead], other: tuple[str, AlignedHead]) -> float:
        hit_R, other_R = (find_hits(own, labelled) for _, own in (one, other))
        return compare_hits(hit_R, other_R, labelled.unit_R.numpy(), weight_R)

    kind, chosen = choose_guarded(heads[0], heads[1:], compare, noise=source.compute_noise(mix_C))
    start = heads[1] if source.compute_noise(mix_C) <= MOST_NOISE else heads[0]
    fitted = None if task is None or start[1].weights_CD is not None else fit_behind(start[1], task, labelled, mix_C)
    if fitted is not None:
        hit_R = (fitted[1].argmax(dim=1) == labelled.labels).double().numpy()
        if compare_hits(hit_R, find_hits(chosen, labelled), labelled.unit_R.numpy(), weight_R) > LIMIT:
            kind, chosen = f"{start[0]}, then fit", fitted[0]
    return Adaptation(chosen, kind, mix_C)


def fit_behind(
    aligned: AlignedHead, task: Task, labelled: TaskRecords, mix_C: Array
) -> tuple[AlignedHead, Tensor] | None:
    """Returns a head behind an alignment, fitted to labelled records, and what such heads say of each fifth of them.

    Each fifth is classified by a head that was fitted to the others. None where there are too few records to try.

    Args:
        aligned: the head behind the alignment; not modified.
        task: the task.
        labelled: the site's labelled training records.
        mix_C: the site's class mix.
    """
    tie, outputs_RC = try_ties(aligned, task, labelled)
    if outputs_RC is None:
        return None
    own = fit_tied(aligned, task, labelled, tie)
    assert isinstance(own, OwnHead) and isinstance(own.head, AlignedHead)
    fitted = own.head
    # What the fit makes are outputs for the site's mix: those for equal classes are without it.
    log_mix_C = torch.from_numpy(np.log(mix_C)).float()
    fitted.log_shares_C = fitted.log_shares_C - own.offset_K - fitted.log_mix_C + log_mix_C
    fitted.log_mix_C = log_mix_C
    fitted.aligner = f"{aligned.aligner or SERVED}, then fit"
    return fitted, outputs_RC


def choose_mix(counts_C: Array, source: SourceMoments) -> Array:
    """Returns a site's class mix from its labelled units. Raises MixUnknown where they do not tell it."""
    known = int((counts_C > 0).sum())
    if known < 2:
        got = "no label" if known == 0 else "labels of one class only"
        raise MixUnknown(
            f"expected labelled training records of two classes at least, got {got}; declare the site's class mix in "
            "its file, as `mix: {LABEL: SHARE}` of the task"
        )
    return estimate_mix(counts_C, source.shares_C)


def find_hits(head: nn.Module, records: TaskRecords) -> Array:
    """Returns 1.0 for each record whose class a head finds, else 0.0."""
    with torch.no_grad():
        found_R = head(records.features_RD).argmax(dim=1)
    hits_R: Array = (found_R == records.labels).double().numpy()
    return hits_R


def make_discriminant_head(source: SourceMoments) -> nn.Linear:
    """Returns the linear discriminant of released moments as a head for the released shares of the classes."""
    weights_CD, bias_C = make_discriminant(source)
    head = nn.Linear(weights_CD.shape[1], len(weights_CD))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights_CD))
        head.bias.copy_(torch.from_numpy(bias_C + np.log(source.shares_C)))
    return head
