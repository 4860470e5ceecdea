"""The coordinator's side of a choice: sites join, receive the candidates, vote once, and hear what was chosen.

Invariant: nothing is kept but the journal and the result. A choice that is continued before there is a result asks the
same sites the same again: they answer from stored replies, and no vote is paid for twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.serverapp import Grid

from common import messages
from common.events import BackboneFacts, FeaturesReady, Journal, RunEnded, RunStarted, VotesCounted
from common.offers import SentBackbone
from common.privacy.accounting import Mechanism
from common.privacy.filters import choose_filter
from common.run import Name, RunConfig
from common.scorers import Scorer, compute_min_epsilon, compute_min_size, open_scorer
from common.types import BadInput, RunFailed, RunInterrupted, heads_digest
from server.choice.outcome import RESULT, count_votes, read_choice
from server.rounds.inquiry import Quorum, Waiting
from server.rounds.join import RollCall, join_sites, prepare_sites
from server.rounds.messenger import Messenger, Observe, Participant, Request, map_groups, map_names
from server.rounds.replies import describe_reasons
from server.rounds.witnesses import Witnesses


def run_choice(
    grid: Grid,
    run: RunConfig,
    backbones: Mapping[str, SentBackbone],
    *,
    run_id: str,
    folder: Path,
    journal: Journal,
    executor: str,
    observe: Observe = lambda phase, done, total: None,
    node_ids: Mapping[int, str] | None = None,
    witnesses: Path | None = None,
) -> Name:
    """Returns the candidate that the sites behind a grid choose.

    Args:
        grid: Flower's connection to the sites.
        run: the choice's settings.
        backbones: the candidates by name; they are sent to sites that lack them.
        run_id: unique id of the choice, a plain name.
        folder: folder of the choice.
        journal: journal that receives its events.
        executor: name of what carries the messages, for the report.
        observe: called with the progress.
        node_ids: node id -> name of every admitted site; None where names are not known beforehand.
        witnesses: file of the witnesses of sites' ledgers, which outlives runs; None keeps none.

    Raises:
        RunFailed: too few sites joined, declare enough units or could be prepared.
        RunInterrupted: too few votes came in time; sites keep theirs.
    """
    messenger = Messenger(grid, run, run_id, journal, observe, Witnesses(witnesses))
    facts = {name: _describe_candidate(backbone) for name, backbone in backbones.items()}
    journal.write(
        RunStarted(run_id=run_id, name=run.name, executor=executor, path=str(folder), rounds=0, backbones=facts)
    )
    roll_call = RollCall()
    joined = join_sites(messenger, backbones, node_ids, roll_call=roll_call, waits_for_all=True)
    if (folder / RESULT).exists():
        chosen = read_choice(folder).chosen  # It stands: sites are told again, and nobody votes.
    else:
        chosen = _hold_vote(messenger, backbones, joined, roll_call)
    missing = _send_chosen(messenger, joined, chosen)
    journal.write(
        RunEnded(
            updates={},
            heads=heads_digest({}),
            num_received=len(joined) - len(missing),
            num_sites=len(joined),
            missing=missing,
        )
    )
    return chosen


def _hold_vote(
    messenger: Messenger, backbones: Mapping[str, SentBackbone], joined: Sequence[Participant], roll_call: RollCall
) -> Name:
    """Has the sites that declare enough units prepare and vote, and returns what they choose."""
    run, journal = messenger.run, messenger.journal
    assert run.choice is not None and run.requested_privacy is not None
    scorer, epsilon = open_scorer(run.choice.scorer, "choice.scorer"), run.requested_privacy.target_epsilon
    assert epsilon is not None  # The run file's own check.
    (task,), least = run.tasks, compute_min_size(scorer, epsilon)
    large = [each for each in joined if each.tasks[task] >= least]
    if len(large) < run.cohort.min_sites:
        sizes = sorted((each.tasks[task] for each in joined), reverse=True)
        needed = compute_min_epsilon(scorer, sizes[run.cohort.min_sites - 1])
        raise RunFailed(
            f"a vote of epsilon {epsilon:g} needs at least {least} declared units, below which noise decides: expected "
            f"{run.cohort.min_sites} such site(s) of the {len(joined)} that joined, got {len(large)}; epsilon "
            f"{needed:g} is enough{_explain_budgets(joined, scorer, needed)}; no site was asked to vote, and "
            "nothing was charged"
        )
    started = time.monotonic()
    voting = prepare_sites(messenger, large, backbones, roll_call)
    journal.write(FeaturesReady(seconds=round(time.monotonic() - started, 3)))
    started = time.monotonic()
    votes = _collect_votes(messenger, voting)
    chosen = count_votes(votes.values(), list(run.backbone_specs))
    journal.write(
        VotesCounted(
            task=task,
            votes=votes,
            chosen=chosen,
            epsilon=epsilon,
            sensitivity=scorer.sensitivity,
            min_size=least,
            abstained=tuple(each.site for each in joined if each not in large),
            seconds=round(time.monotonic() - started, 4),
        )
    )
    return chosen


def _describe_candidate(backbone: SentBackbone) -> BackboneFacts:
    settings = backbone.public_spec()
    return BackboneFacts(kind=settings["kind"], model=settings.get("model"), digest=backbone.digest)


def _explain_budgets(joined: Sequence[Participant], scorer: Scorer, epsilon: float) -> str:
    """Returns how many sites' declared budgets a vote of some epsilon would fit; what is left of one is not known."""
    vote = Mechanism.of_choice(epsilon, scorer.sensitivity)
    covering = sum(choose_filter(vote, None, each.budget_epsilon, each.delta).covers([vote]) for each in joined)
    return f" (the whole budget of {covering} of these sites covers it)"


def _collect_votes(messenger: Messenger, voting: Sequence[Participant]) -> dict[str, Name]:
    """Returns site -> the candidate that it voted for, by site."""
    run, names = messenger.run, map_names(voting)
    quorum = Quorum.of(run, map_groups(voting), {})

    def check(node: int, reply: messages.VoteReply) -> None:
        messenger.witnesses.keep({names[node]: reply.witness})
        if reply.vote not in run.backbone_specs:
            raise BadInput("voted for something that is no candidate")

    request = messages.VoteRequest(messenger.run_id)
    answers = messenger.send(
        Request(
            messages.VOTE,
            messenger.witnesses.show({each.node_id: request for each in voting}, names),
            messages.VoteReply,
            Waiting.of(run, quorum),
            names=names,
            check=check,
        )
    )
    messenger.write_rejected(answers.rejected, names, "vote")
    missing = quorum.describe_missing(answers.accepted)
    if missing is not None:
        raise RunInterrupted(f"the vote: {missing}: {describe_reasons(answers.rejected, names)}")
    return {each.site: answers.accepted[each.node_id][0].vote for each in voting if each.node_id in answers.accepted}


def _send_chosen(messenger: Messenger, joined: Sequence[Participant], chosen: Name) -> dict[str, str]:
    """Tells every site that joined what was chosen; returns name of each that did not confirm it -> the reason."""
    names = map_names(joined)
    request = messages.FinishRequest(messenger.run_id, {}, heads_digest({}), chosen=chosen)
    requests: dict[int, messages.Request] = dict.fromkeys(names, request)
    waiting = Waiting.of(messenger.run)
    answers = messenger.send(Request(messages.FINISH, requests, messages.Ready, waiting, names=names))
    messenger.write_rejected(answers.rejected, names, "finish")
    return {names[item.node_id]: item.reason for item in answers.rejected if item.node_id in names}
