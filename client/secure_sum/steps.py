"""The five answers of a site in one attempt at a secure sum. docs/secure-sum.md has the protocol and its promise.

Each step takes what came into the state, keeps the state on the disk, and then answers from it: a request that is sent
again gets the same bytes, and another one in its place is declined. Records are read in the third step alone, after its
charge; what leaves then is stored as every reply is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import RecordDict

from client.ledger.events import TRAINING
from client.ledger.ledger import Ledger, Reservation
from client.protocol.answer import answer_once, open_request
from client.protocol.site import (
    FINAL_HEADS,
    Joined,
    Site,
    SiteDeclined,
    check_approved,
    claim_sums,
    find_sum_rules,
    joined_run,
    make_plan,
    open_member,
)
from client.secure_sum.store import AttemptStore
from client.solvers import SummingSolver
from common import messages
from common.privacy.lattice import Lattice
from common.privacy.noise import open_stream
from common.process.threads import steady_time
from common.secure_sum.attempt import (
    Member,
    SiteAttempt,
    accept_keys,
    accept_shares,
    accept_survivors,
    make_keys,
    make_shares,
    mask_vector,
    reveal_shares,
    sign_survivors,
)
from common.secure_sum.terms import SumTerms
from common.secure_sum.vectors import choose_lattice, flatten_whole, make_mechanism
from common.types import BadInput, DeclineReason, Plan, heads_digest

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Step:
    """Everything that a step needs: who takes part, in which attempt, and with which public numbers."""

    joined: Joined
    member: Member
    terms: SumTerms
    plan: Plan
    lattice: Lattice


def make_sum_keys(site: Site, request: messages.SumKeysRequest) -> messages.SumKeysReply:
    """Returns this site's signed keys for an attempt, which begins with them.

    Raises:
        SiteDeclined: the run has no secure sums that this site takes part in, or it or the attempt is over.
    """
    step = _open_step(site, request)
    if not 1 <= request.round <= step.joined.run.rounds:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the round is outside the run")
    if (step.joined.folder / FINAL_HEADS).exists():
        # Not OVERTAKEN: no later attempt would be answered either.
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run's final heads are here, and its secrets are gone")
    with AttemptStore.exclusive(step.joined.folder) as store:
        kept = store.find(step.terms)
        if kept is None:
            purpose = f"{step.joined.run.name}/{site.config.name}/{request.round}/{request.attempt}/keys"
            kept = SiteAttempt(step.terms, site.config.name, site.entropy(purpose))
            store.keep(kept)
    assert site.config.secure_sum is not None  # `find_sum_rules` has looked.
    return messages.SumKeysReply(make_keys(step.member, kept), site.config.secure_sum.digest)


def share_secrets(site: Site, request: messages.SumSharesRequest) -> messages.SumSharesReply:
    """Returns the encrypted shares of this site's secrets, once the keys of all sites are signed and known.

    Raises:
        SiteDeclined: the attempt is over or has not begun, or a key is not in order.
    """
    step = _open_step(site, request)
    kept = _advance(step, lambda kept: accept_keys(step.member, kept, request.keys))
    return messages.SumSharesReply(make_shares(kept))


def train_masked(site: Site, request: messages.MaskedRequest) -> RecordDict:
    """Returns this site's noised sum under all masks, charged, or the stored one.

    Raises:
        SiteDeclined: the attempt is over or has not begun, a share cannot be read, heads that do not fit, or a budget
            that does not cover the plan.
    """
    step = _open_step(site, request)
    kept = _advance(step, lambda kept: accept_shares(kept, request.shares, heads_digest(request.heads)))
    joined = step.joined

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        # Again: several runs may have joined under one approval, before any of them was charged.
        check_approved(site, joined.run_id, joined.offer_digest, use=True)
        opened = open_request(site, joined, request, "train")
        solver = joined.solver
        assert isinstance(solver, SummingSolver)  # `find_sum_rules` has looked.
        # Again: the site file may name another ledger since the site joined.
        claim_sums(site.config, joined, ledger)
        reservation = ledger.reserve(
            make_mechanism(step.plan, step.terms.rules),
            run=site.config.name_charge(joined.run_id),
            round=request.round,
            request=digest,
            allow_infinite=False,
            evaluation_budget=site.share,
        )
        release = f"{request.round}/{request.attempt}/secure sum"
        stream = open_stream(site.entropy, joined.run.name, site.config.name, release)
        with steady_time():
            whole = solver.release_whole(
                opened.modules, opened.tasks, opened.units, plan=step.plan, lattice=step.lattice, stream=stream
            )
        masked = mask_vector(kept, flatten_whole(whole))
        return messages.MaskedReply(masked, step.plan, reservation.witness), reservation, step.plan.steps

    return answer_once(site, joined, request, TRAINING, answer)


def confirm_survivors(site: Site, request: messages.SurvivorsRequest) -> messages.SurvivorsReply:
    """Returns this site's signature of the one list of survivors that it confirms.

    Raises:
        SiteDeclined: it confirmed another list, or this one is too short or has not this site in it.
    """
    step = _open_step(site, request)
    kept = _advance(step, lambda kept: accept_survivors(kept, request.survivors))
    return messages.SurvivorsReply(sign_survivors(step.member, kept))


def unmask(site: Site, request: messages.UnmaskRequest) -> messages.UnmaskReply:
    """Returns this site's shares of what removes the masks from the sum of the survivors that it confirmed.

    Raises:
        SiteDeclined: too few survivors signed that list.
    """
    step = _open_step(site, request)
    with AttemptStore.exclusive(step.joined.folder) as store:
        kept = store.read(step.terms)
    return messages.UnmaskReply(_refuse(lambda: reveal_shares(step.member, kept, request.signatures)))


# --- parts -----------------------------------------------------------------------------------------------------------


def _open_step(site: Site, request: messages.SumRequest) -> _Step:
    joined = joined_run(site, request.run_id)
    rules = find_sum_rules(site.config, joined)
    if rules is None:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run has no secure sums")
    plan = make_plan(site.config, joined)
    lattice = choose_lattice(plan, rules)
    terms = SumTerms(joined.run_id, request.round, request.attempt, rules, lattice.log2_deviation)
    return _Step(joined, open_member(site.config), terms, plan, lattice)


def _advance(step: _Step, accept: Callable[[SiteAttempt], SiteAttempt]) -> SiteAttempt:
    """Returns the state with what came in, once it is on the disk."""
    with AttemptStore.exclusive(step.joined.folder) as store:
        kept = store.read(step.terms)
        after = _refuse(lambda: accept(kept))
        if after != kept:
            store.keep(after)
        return after


def _refuse(check: Callable[[], _T]) -> _T:
    try:
        return check()
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, f"secure sum: {error}") from error
