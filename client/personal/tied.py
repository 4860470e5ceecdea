"""Heads tied to the federated ones, from what the site released in the run, and from nothing else.

Mean-regularised multi-task learning (Liu et al. 2022, arXiv 2206.07902) where sites' concepts differ: a site's own
loss, plus lambda / 2 |W - W_federated|^2. Here the loss is taken as linear, with the mean of the site's own noised
gradients of all rounds as its slope, and the proximal step comes after the noise:

    W = W_federated - mean gradient / lambda

with lambda such that the noise of the step adds `_RHO` to a logit. The offsets follow the noised label counts that the
site released before the first round. Records are not read: the result is post-processing of releases that were charged,
so that it costs nothing and may leave the site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from google.protobuf.message import DecodeError

from client.ledger.events import TRAINING
from client.protocol.replies import Replies, ReplyDamaged
from client.protocol.site import Joined, Site, plan_measurement
from common import messages
from common.model.moments import NoisedSum, fix_heads
from common.model.momentum import read_momentum
from common.tasks import Task
from common.types import BadInput, DigestMismatch, Heads, Params, select_trained

_RHO = 0.2
"""Noise that the step adds to a logit; how it was found stands in docs/personal.md."""


def tie_heads(site: Site, joined: Joined, tasks: Mapping[str, Task], final: Heads) -> Heads:
    """Returns the parameters of the site's own heads.

    Args:
        site: the site.
        joined: the run.
        tasks: task -> its definition, for the tasks of this site.
        final: the run's final heads.

    Raises:
        BadInput: the run's updates are no noised gradients, or not the site's own, or none is stored.
        DigestMismatch: a stored update is damaged.
    """
    run, sizes = joined.run, joined.sizes(site.config)
    if run.trust == "secure_sum":
        raise BadInput(
            "personal: tied: expected updates that left with noise of their own, got a run that sums them securely; "
            "`personal: fit` takes any run"
        )
    noises = {}
    for name in tasks:
        momentum = read_momentum(run, name)
        if momentum is None or not momentum.noise:
            raise BadInput(
                "personal: tied: expected a run with privacy whose sites send one noised gradient a round, as with "
                f"`solver: {{kind: auto}}`, got solver {run.solver.kind}; `personal: fit` takes any run"
            )
        noises[name] = momentum.noise
    updates = _read_updates(site, joined)
    heads: dict[str, Params] = {}
    for name in tasks:
        deviation = noises[name] / (sizes[name] * math.sqrt(len(updates)))
        step = _RHO / deviation
        moved = {
            key: np.asarray(value + step * np.mean([each[name][key] for each in updates], axis=0), np.float32)
            for key, value in select_trained(final[name]).items()
        }
        heads[name] = {**final[name], **moved}
    measured = plan_measurement(site.config, joined).stored
    counts = {
        name: NoisedSum(np.asarray(measured[name].values, np.float64), measured[name].deviation, float(sizes[name]))
        for name in tasks
        if name in measured
    }
    return fix_heads(heads, run, tasks, counts)


def _read_updates(site: Site, joined: Joined) -> list[Heads]:
    """Returns the updates that the site released in a run, one for each round that it answered."""
    charged = site.config.name_charge(joined.run_id)
    charges = [each for each in site.ledger().charges() if each.run == charged and each.purpose == TRAINING]
    requests = {each.round: each.request for each in charges if each.committed and each.round > 0}
    updates = []
    try:
        with Replies.exclusive(joined.folder) as replies:
            for _, request in sorted(requests.items()):
                data = replies.find(request)
                if data is not None:
                    updates.append(messages.decode(messages.from_bytes(data), messages.TrainReply).delta.heads)
    except ReplyDamaged as error:
        raise DigestMismatch(str(error)) from error
    except (DecodeError, BadInput, messages.OtherVersion) as error:
        raise BadInput(
            f"personal: tied: expected stored updates that are private by themselves, got others ({error})"
        ) from error
    if not updates:
        raise BadInput("personal: tied: expected stored updates of the run, got none")
    return updates
