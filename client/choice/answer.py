"""The answer to a coordinator's request for a site's vote: charged once, stored, and sent again as it was."""

from __future__ import annotations

import torch
from flwr.app import RecordDict

from client.choice.vote import cast_vote
from client.ledger.events import TRAINING
from client.ledger.ledger import Ledger, Reservation
from client.protocol.answer import answer_once, open_side
from client.protocol.replies import Replies
from client.protocol.site import (
    CHOSEN,
    Site,
    SiteDeclined,
    check_approved,
    check_prepared,
    joined_run,
    plan_vote,
)
from common import messages
from common.privacy.noise import open_stream
from common.process.threads import steady_time
from common.types import DeclineReason


def vote(site: Site, request: messages.VoteRequest) -> RecordDict:
    """Returns the site's vote, or the stored one if this very request was answered before.

    Raises:
        SiteDeclined: not joined or prepared, no choice, too few declared units, or a budget that does not cover it.
    """
    joined = joined_run(site, request.run_id)
    planned = plan_vote(site.config, joined)
    if planned.public_size < planned.min_size:
        raise SiteDeclined(
            DeclineReason.BAD_REQUEST,
            f"a vote of epsilon {planned.epsilon:g} needs {planned.min_size} declared units, below which noise "
            f"decides; tasks.{planned.name}.public_size is {planned.public_size}",
        )

    def answer(digest: str, ledger: Ledger) -> tuple[messages.Reply, Reservation, int]:
        # Again: several runs may have joined under one approval, before any of them was charged.
        check_approved(site, joined.run_id, joined.offer_digest, use=True)
        if (joined.folder / CHOSEN).exists():
            raise SiteDeclined(DeclineReason.OVERTAKEN, "the votes of this choice were counted; nothing was charged")
        candidates, charged = check_prepared(joined), site.config.name_charge(joined.run_id)
        # Nothing of a vote that was never stored has left: what the site was killed in is not paid for again.
        cut_off = ledger.find_cut_off(planned.mechanism, run=charged, round=request.round, request=digest)
        paid = None if Replies.was_stored(joined.folder, digest) else cut_off
        units = open_side(joined, sorted(candidates), "train", torch.device("cpu"))
        with steady_time():
            name, reservation = cast_vote(
                ledger,
                planned.scorer,
                planned.task,
                units,
                epsilon=planned.epsilon,
                public_size=planned.public_size,
                run=charged,
                round=request.round,
                request=digest,
                stream=open_stream(site.entropy, joined.run.name, site.config.name, "vote"),
                evaluation_budget=site.share,
                paid=paid,
            )
        return messages.VoteReply(name, reservation.witness), reservation, 1

    return answer_once(site, joined, request, TRAINING, answer)
