"""The terms on which gathered sites agree to a run: those on which each would agree by itself, looked at once."""

from __future__ import annotations

from client.protocol.join import accept_training
from client.protocol.site import Joined, Measurement, SiteDeclined, check_allowed, plan_measurement
from common.events import SiteJoined
from common.types import BadInput, Plan
from server.rounds.messenger import Participant
from simulations.executors.alike import Gathering
from simulations.executors.gathered import list_kinds


def accept_run(gathering: Gathering) -> tuple[Plan, list[Measurement]]:
    """Returns the plan of a round, the same at all sites, and for each kind of site what is measured before the first.

    Raises:
        BadInput: a site would decline.
    """
    config, run = gathering.site, gathering.run
    digests = {name: digest for name, (_, digest) in gathering.backbones.items()}
    joined = Joined(gathering.run_id, run, digests, config.state_dir / "runs" / gathering.run_id)
    largest: dict[frozenset[str], dict[str, int]] = {}
    for sizes in {id(each): each for each in gathering.sites.sizes}.values():
        kept = largest.setdefault(frozenset(sizes), dict(sizes))
        kept |= {name: max(size, kept[name]) for name, size in sizes.items()}
    plans, measured = [], []
    for kind in list_kinds(gathering.sites)[0]:
        tasks = {
            name: config.tasks[name].model_copy(update={"public_size": size}) for name, size in largest[kind].items()
        }
        own = config.model_copy(update={"tasks": tasks})
        try:
            check_allowed(own, joined)
            plans.append(accept_training(own, joined))
            measured.append(plan_measurement(own, joined))
        except SiteDeclined as declined:
            raise BadInput(declined.detail) from declined
    return plans[0], measured


def describe_joined(gathering: Gathering, participant: Participant) -> SiteJoined:
    """Returns the journal's line of a site that joined."""
    return SiteJoined(
        site=participant.site,
        tasks=dict(participant.tasks),
        unit=gathering.site.unit,
        delta=participant.delta,
        budget_epsilon=participant.budget_epsilon,
    )
