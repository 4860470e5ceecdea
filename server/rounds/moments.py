"""The release before the first round: sites send noised sums of features and labels, and heads are set by them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from common import messages
from common.events import MomentsMeasured
from common.model.class_moments import pack_class_moments
from common.model.moments import (
    MEAN,
    NoisedSum,
    compute_noise_multiplier,
    count_units,
    count_values,
    fix_heads,
    get_subject,
    list_parts,
    select_parts,
)
from common.privacy.shares import plan_moments
from common.serving.means import MEANS, FeatureMean, write_means
from common.tasks import open_tasks
from common.types import RunInterrupted, Unit, heads_digest
from server.rounds.checkpoint import Checkpoint
from server.rounds.inquiry import Quorum, Waiting
from server.rounds.messenger import Answers, Messenger, Participant, Request, map_groups, map_names
from server.rounds.replies import check_moments, describe_reasons


class AnswersAtHand(Protocol):
    """Sites beside the coordinator, in one process, that answer without messages (`server.rounds.loop.SitesAtHand`)."""

    def send(self, messenger: Messenger, request: Request[messages.MomentsReply]) -> Answers[messages.MomentsReply]:
        """Returns the answers to a request; see `Messenger.send`.

        Args:
            messenger: connection to the sites, with the run and its journal.
            request: the request, whose check is made of every answer.
        """


def measure_moments(
    messenger: Messenger,
    participants: list[Participant],
    state: Checkpoint,
    *,
    folder: Path,
    digests: Mapping[str, str],
    at_hand: AnswersAtHand | None = None,
) -> Checkpoint:
    """Asks every participant for the sums that the run measures, and sets the heads' fixed numbers by them.

    It is asked again where a run is resumed before its first round ended: sites send the same sums again.

    Args:
        messenger: connection to the sites, with the run and its journal.
        participants: sites that joined.
        state: state before the first round.
        folder: folder of the run, which receives each site's means of features.
        digests: backbone -> its digest.
        at_hand: the sites, where they are in this process and asked without messages.

    Raises:
        RunInterrupted: the sums did not reach the quorum of a round in time.
    """
    run, started, names = messenger.run, time.monotonic(), map_names(participants)
    tasks = open_tasks(run)
    parts = list_parts(run, tasks)
    own = {
        each.node_id: list(select_parts(parts, run, {name: tasks[name] for name in each.tasks}))
        for each in participants
    }
    asked = [each for each in participants if own[each.node_id]]
    lengths = {part: count_values(part, run, tasks, state.heads) for part in parts}
    plan = plan_moments(run, Unit.EXAMPLE)  # Of any unit: the noise is the same.
    deviations = {part: 0.0 if plan is None else plan.noise_multiplier / factor for part, factor in parts.items()}

    def check(node: int, reply: messages.MomentsReply) -> None:
        messenger.witnesses.keep({names[node]: reply.witness})
        check_moments(reply, {part: lengths[part] for part in own[node]}, units[node], deviations)

    units = {each.node_id: count_units(own[each.node_id], run, each.tasks) for each in asked}
    quorum = Quorum.of(run, map_groups(asked), {})
    request = messages.MomentsRequest(messenger.run_id)
    sent = Request(
        messages.MOMENTS,
        messenger.witnesses.show({each.node_id: request for each in asked}, names),
        messages.MomentsReply,
        Waiting.of(run, quorum),
        names=names,
        check=check,
    )
    answers = messenger.send(sent) if at_hand is None else at_hand.send(messenger, sent)
    messenger.write_rejected(answers.rejected, names, "moments")
    missing = quorum.describe_missing(answers.accepted)
    if missing is not None:
        raise RunInterrupted(f"before round 1: {missing}: {describe_reasons(answers.rejected, names)}")
    released: dict[str, list[NoisedSum]] = {}
    means: list[FeatureMean] = []
    for node, (reply, _) in sorted(answers.accepted.items(), key=lambda item: names[item[0]]):
        for part in own[node]:
            values = reply.sums[part]["sum"].astype(np.float64)
            total = NoisedSum(values, reply.deviations[part], units[node][part])
            released.setdefault(part, []).append(total)
            if part.endswith(MEAN):
                means.append(_divide(total, names[node], digests[get_subject(part)]))
    if means:
        write_means(folder / MEANS, means)
    totals = {part: NoisedSum.add(sums) for part, sums in released.items()}
    heads = fix_heads(state.heads, run, tasks, totals)
    messenger.journal.write(
        MomentsMeasured(
            noise_multipliers={
                names[node]: compute_noise_multiplier(reply.deviations.values())
                for node, (reply, _) in answers.accepted.items()
            },
            num_sums={part: len(sums) for part, sums in sorted(released.items())},
            heads=heads_digest(heads),
            seconds=round(time.monotonic() - started, 4),
        )
    )
    return replace(
        state, heads=heads, moments=pack_class_moments(totals, {name: run.backbone_of(name) for name in tasks})
    )


def _divide(total: NoisedSum, site: str, digest: str) -> FeatureMean:
    """Returns a site's mean of features, as it is kept to compare sites: it was charged when the sum was released."""
    deviation = total.deviation / total.units
    return FeatureMean(site, digest, total.values / total.units, deviation, total.units, "training records, noised")
