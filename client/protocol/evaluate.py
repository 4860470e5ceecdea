"""Evaluation of heads on held-out units as one noised release.

Every record has a row of bounded statistics for each task (`Task.statistic`), divided by the task's public bound, so
that it has length 1 at most; a unit's records are averaged; sums over units are released with Gaussian noise, all
tasks at once and without sampling.

Guarantee: one unit moves the released vector of T tasks by at most sqrt(T), whatever its records, labels and features
are and however many it has; missing labels only make its part smaller.

# Shapes: R records, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from client.data.quantised import QuantisedRows
from client.data.units import TaskRecords, Units
from client.ledger.events import EVALUATION
from client.ledger.ledger import Ledger, Reservation
from client.protocol.answer import answer_once, open_request
from client.protocol.site import (
    Site,
    SiteDeclined,
    check_approved,
    joined_run,
)
from client.solvers.parts.closed_form import compute_outputs, get_affine, round_weights
from common import messages
from common.privacy.accounting import Mechanism
from common.privacy.lattice import MAX_UNITS, Lattice, bound_norms, check_unit_count
from common.privacy.noise import NoiseStream, open_stream
from common.process.threads import steady_time
from common.tasks import NOISED_BUCKETS, WRITTEN_AT_ONCE, Statistic, Task, WritesTexts, predict_outputs
from common.tasks.parts.adjusted import AdjustedHead
from common.tasks.parts.calibration import make_released_statistic
from common.types import (
    DeclineReason,
    Heads,
)

SUMS = "sums"


_CHUNK_VALUES = 2**20
"""Statistics held at once (8 MiB)."""


_BLOCK_RECORDS = 256
"""Records that pass a head which is no affine map at once; the last block is filled up."""


def evaluate(site: Site, request: messages.EvaluateRequest) -> RecordDict:
    """Noised statistics of held-out units under these heads, or the stored ones; charged to the share for evaluations.

    Raises:
        SiteDeclined: not joined or prepared, a round the run does not evaluate, heads that do not fit, a share that
            does not cover it, or a site that evaluates locally only.
    """
    joined = joined_run(site, request.run_id)
    share, asked = site.share, joined.run.evaluation
    if share is None:
        raise SiteDeclined(
            DeclineReason.EVALUATION_LOCAL, "this site's file says: nothing about held-out units is sent"
        )
    if asked is None or not asked.due(request.round, joined.run.rounds):
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run does not evaluate after this round")

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        check_approved(site, joined.run_id, joined.offer_digest, use=True)
        opened = open_request(site, joined, request, "test")
        _check_offsets(request.offsets, opened.modules)
        reservation, mechanism = ledger.reserve_evaluation(
            share,
            len(opened.tasks),
            run=site.config.name_charge(joined.run_id),
            round=request.round,
            request=digest,
            allow_infinite=site.config.allow.non_private,
        )
        stream = open_stream(site.entropy, joined.run.name, site.config.name, f"evaluation/{request.round}")
        with steady_time():
            sums = noised_sums(
                opened.modules,
                opened.tasks,
                opened.units.passed(opened.modules),
                mechanism=mechanism,
                stream=stream,
                calibrate=asked.calibrate,
                offsets=request.offsets,
            )
        reply = messages.EvaluateReply(sums, mechanism.noise_multiplier, reservation.witness)
        return reply, reservation, mechanism.steps

    return answer_once(site, joined, request, EVALUATION, answer)


def _check_offsets(offsets: Mapping[str, Sequence[float]], modules: Mapping[str, nn.Module]) -> None:
    """Raises SiteDeclined where offsets are not those of heads that have one."""
    for name, offset in offsets.items():
        head = modules.get(name)
        own_K = head.offset_K if isinstance(head, AdjustedHead) else None
        if own_K is None or len(own_K) != len(offset):
            raise SiteDeclined(DeclineReason.BAD_REQUEST, "an offset is not one of this site's heads")


def noised_sums(
    heads: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    units: Units,
    *,
    mechanism: Mechanism,
    stream: NoiseStream,
    calibrate: bool = False,
    offsets: Mapping[str, Sequence[float]] | None = None,
) -> Heads:
    """Returns task -> "sums" -> float32 vector, with noise.

    Args:
        heads: heads to evaluate; those of the tasks are used.
        tasks: task -> its definition, with the heads' keys.
        units: held-out units; there may be none. Their features are what the heads read (`Units.passed`).
        mechanism: the charged mechanism, whose noise is added.
        stream: source of the noise.
        calibrate: whether the statistics tell the heads' overconfidence too.
        offsets: task -> the offset of its outputs in training, where its head is served with another one.
    """
    assert mechanism.sensitivity is not None and mechanism.sensitivity**2 >= len(tasks) * (1.0 - 1e-9)
    check_unit_count(units.num_units)
    lattice = Lattice.of(mechanism.sensitivity, mechanism.noise_multiplier)
    noised = {}
    for name in sorted(tasks):
        statistic = make_released_statistic(tasks[name], calibrate=calibrate, offset=(offsets or {}).get(name))
        total_S = sum_statistics(heads[name], tasks[name], units.tasks[name], lattice, statistic)
        noise = stream.rounded_gaussian(len(total_S), lattice.log2_deviation)
        noised[name] = {SUMS: lattice.release(total_S, noise, stream).numpy().astype(np.float32)}
    return noised


def sum_statistics(
    head: nn.Module, task: Task, records: TaskRecords, lattice: Lattice, statistic: Statistic | None = None
) -> Tensor:
    """Returns the exact sum over units (int64, on the CPU), without noise, in steps of the lattice.

    A unit's part is the sum of its records' rows, each divided by the unit's number of records and truncated toward
    zero; its norm is at most 1, whatever the rows are.

    Args:
        head: the task's head.
        task: the task.
        records: its held-out records.
        lattice: of the release.
        statistic: what is summed; by default the task's own statistic.
    """
    everyone_R = torch.zeros(len(records.unit_R), dtype=torch.int64)
    return sum_statistics_each(head, task, records, lattice, everyone_R, 1, statistic)[0]


def sum_statistics_each(
    head: nn.Module,
    task: Task,
    records: TaskRecords,
    lattice: Lattice,
    site_R: Tensor,
    num_sites: int,
    statistic: Statistic | None = None,
) -> Tensor:
    """Returns what `sum_statistics` returns for the records of each of some sites, one site a row.

    A record's row follows from that record alone: so it does not matter whose records stand beside it.

    Args:
        head: the task's head.
        task: the task.
        records: the held-out records of all of them.
        lattice: of the releases.
        site_R: int64, on the CPU, the site of each record, from 0.
        num_sites: number of the sites.
        statistic: what is summed; by default the task's own statistic.
    """
    statistic = statistic or task.statistic(NOISED_BUCKETS)
    total_NS = torch.zeros(num_sites, statistic.size, dtype=torch.int64)
    labelled, site_R = records.labelled(), site_R[records.mask_R.cpu()]
    # A mask has a label at each of its places, for which outputs are refined.
    values = max([statistic.size, *(each.numel() for each in labelled.labels[:1])])
    block = _count_block(task, labelled.features_RD)
    at_once = min(MAX_UNITS, max(1, _CHUNK_VALUES // values // block) * block)
    for rows in torch.split(torch.arange(len(labelled.unit_R)), at_once):
        with torch.inference_mode():
            outputs, labels = _compute_outputs(task, head, labelled.features_RD[rows]), labelled.labels[rows]
            missing = len(outputs) - len(labels)
            padded = torch.cat([labels, labels[:1].expand(missing, *labels.shape[1:])])
            rows_RS = statistic.rows(outputs, padded)[: len(labels)].double() / statistic.bound
            # A row that is not finite counts as none; one that breaks its task's bound is shortened.
            factor_R = (1.0 / bound_norms(rows_RS).clamp(min=1.0)).nan_to_num(nan=0.0) * (1.0 - 2.0**-36)
            weight_R = 1.0 / (1.0 / labelled.weight_R[rows].double()).round()
            parts_RS = lattice.truncate(rows_RS, factor_R * weight_R).long().cpu()
            total_NS.index_add_(0, site_R[rows], parts_RS)
    return total_NS


def _compute_outputs(task: Task, head: nn.Module, features_RD: Tensor) -> Tensor:
    """Returns a head's outputs for whole blocks of records: those of each record, and some more behind them.

    An affine head's outputs are exact integers before anything is rounded; other heads compute in blocks of one shape.
    """
    block = _count_block(task, features_RD)
    missing = -len(features_RD) % block
    padded_RD = torch.cat([features_RD, features_RD.new_zeros((missing, *features_RD.shape[1:]))])
    affine, offset_K = get_affine(head), None
    if isinstance(affine, nn.Linear) and padded_RD.dim() == 2:
        if isinstance(head, AdjustedHead):
            padded_RD, offset_K = head.adjust(padded_RD), head.offset_K
        bias_K = None if affine.bias is None else affine.bias.double()
        outputs = compute_outputs(QuantisedRows.of(padded_RD), round_weights(affine.weight), bias_K)
        return outputs if offset_K is None else outputs + offset_K.double()
    return torch.cat([predict_outputs(task, head, own) for own in torch.split(padded_RD, block)])


def _count_block(task: Task, features_RD: Tensor) -> int:
    """Returns the number of records in a block, whose rows are places where features are those of places."""
    if isinstance(task, WritesTexts):
        return WRITTEN_AT_ONCE
    places = math.prod(features_RD.shape[1:-1]) if features_RD.dim() > 2 else 1
    return max(1, _BLOCK_RECORDS // max(1, places))
