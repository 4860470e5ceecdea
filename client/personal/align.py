"""Domain adaptation at a site: a run's head behind an alignment that its own labels have not spoken against.

Nothing leaves. What the run is sent stays sums of features as the backbone gives them: a site that standardised them by
its own statistics first would let one record move all others, and epsilon 3 would be 4.7 or more.

# Shapes: C classes, D features, R records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from client.aligners import Aligner, Array, SourceMoments, TargetRecords
from client.aligners.parts.guard import choose_guarded, compare_hits
from client.aligners.parts.head import AlignedHead, keep_head, place_head
from client.aligners.parts.linear import make_discriminant
from client.aligners.parts.mix import estimate_mix
from client.data.units import TaskRecords
from common.types import BadInput

SERVED = "served"
"""Name of the head that is taken where labels at home veto every alignment."""


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


def align_head(
    head: nn.Module,
    source: SourceMoments,
    records: TaskRecords,
    aligners: Mapping[str, Aligner],
    mix_C: Array | None = None,
) -> Adaptation:
    """Returns a run's head adapted to a site's records.

    Args:
        head: the run's head, as it is served; not modified.
        source: the moments that the run released.
        records: the site's training records with the features that the head reads; labels are class indices, and are
            used where the mask has them.
        aligners: kind -> aligner, in the order in which they are tried.
        mix_C: the site's class mix, where it is declared.

    Raises:
        BadInput: no mix is declared, and the site has no labels, or of one class only.
    """
    labelled = records.labelled()
    weight_R = labelled.weight_R.double().numpy()
    counts_C: Array = np.zeros(len(source.shares_C))
    np.add.at(counts_C, labelled.labels.numpy(), weight_R)
    if mix_C is None:
        mix_C = choose_mix(counts_C, source)
    rows_RD = nn.functional.normalize(records.features_RD.double(), dim=1).numpy()
    target = TargetRecords(rows_RD, records.weight_R.double().numpy())
    heads = [(SERVED, keep_head(head, source))]
    heads += [
        (kind, place_head(head, source, each.align(source, target, mix_C), mix_C)) for kind, each in aligners.items()
    ]

    def compare(one: tuple[str, AlignedHead], other: tuple[str, AlignedHead]) -> float:
        hit_R, other_R = (find_hits(own, labelled) for _, own in (one, other))
        return compare_hits(hit_R, other_R, labelled.unit_R.numpy(), weight_R)

    kind, chosen = choose_guarded(heads[0], heads[1:], compare)
    return Adaptation(chosen, kind, mix_C)


def choose_mix(counts_C: Array, source: SourceMoments) -> Array:
    """Returns a site's class mix from its labelled units. Raises BadInput where they do not tell it."""
    known = int((counts_C > 0).sum())
    if known < 2:
        got = "no label" if known == 0 else "labels of one class only"
        raise BadInput(
            f"expected labelled training records of two classes at least, got {got}; "
            "declare the site's class mix in its file, as `mix: {LABEL: SHARE}` of the task"
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
