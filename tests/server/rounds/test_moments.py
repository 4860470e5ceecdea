"""Round 0 in whole runs: its sums reach the heads, are paid for once, and bad ones cost their sender alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from client.protocol.join import join
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import measure
from common import messages
from common.events import MomentsMeasured, RunEvent, SiteRejected, select_events
from common.privacy.noise import os_entropy
from server.reports.summary import summarize
from server.rounds.checkpoint import load_checkpoint
from server.rounds.loop import Outcome
from tests.server.rounds.test_loop import federate
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

HEAD = {"bias": False, "centre": True, "prior": True}
MEASURED: dict[str, Any] = {
    "tasks": {name: {**task, "head": HEAD} for name, task in TASKS.items()},
    "solver": {"kind": "head_sum", "clip_norm": 1.0},
    "aggregation": {"kind": "heavy_ball", "rounds": 2, "noise": 2.0},
    "moments": {"means": 0.2, "counts": 0.2},
}


def charges(site: Any) -> list[tuple[int, int]]:
    """Round and number of releases of each charge, in order."""
    ledger = Ledger.find(locate_ledgers(site), site.registry)
    assert ledger is not None
    return [(charge.round, charge.mechanism.steps) for charge in ledger.charges()]


def run_once(folder: Path, sites: list[Any], run_id: str = "run-1", **changes: Any) -> tuple[Outcome, list[RunEvent]]:
    return federate(folder / run_id, sites, run_id=run_id, **{**MEASURED, **changes})


def direction(outcome: Outcome, task: str) -> Any:
    centre_D = outcome.heads[task]["fixed.centre"].astype(np.float64)
    return centre_D / np.linalg.norm(centre_D)


def test_heads_train_with_what_was_measured_and_are_handed_out_for_equal_frequencies(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north", "west")]
    outcome, events = run_once(tmp_path, sites)
    (measured,) = select_events(events, MomentsMeasured)
    assert set(measured.noise_multipliers) == {"east", "north", "west"}
    assert dict(measured.num_sums) == {"backbone.mean": 3, "colour": 3, "size": 3}
    # The coordinator knows of the first release what the ledger was charged.
    known = summarize(events).sites["east"].epsilon
    assert known == pytest.approx(Site(sites[0], os_entropy).ledger().compute_run_epsilon("run-1"), rel=1e-6)
    trained = load_checkpoint(tmp_path / "run-1" / "checkpoint.safetensors").heads
    for task in TASKS:
        assert np.any(trained[task]["fixed.centre"]) and not np.any(outcome.heads[task]["fixed.offset"])
        assert np.array_equal(trained[task]["fixed.centre"], outcome.heads[task]["fixed.centre"])
        # One mean for both: a task with a rare label subtracts less of it.
        np.testing.assert_allclose(direction(outcome, task), direction(outcome, "colour"), rtol=1e-5)
        assert np.array_equal(trained[task]["layers.weight"], outcome.heads[task]["layers.weight"])
    assert [charges(site) for site in sites] == [[(0, 1), (1, 1), (2, 1)]] * 3


def test_what_was_measured_is_sent_again_to_later_runs_for_nothing_and_only_what_is_new_is_paid(
    tmp_path: Path,
) -> None:
    sites = [site_config(tmp_path, "east")]
    only = {"tasks": {"size": MEASURED["tasks"]["size"]}}
    first, _ = run_once(tmp_path, sites, "run-1", **only)
    second, _ = run_once(tmp_path, sites, "run-2", **only)
    assert charges(sites[0]) == [(0, 1), (1, 1), (2, 1), (1, 1), (2, 1)]
    assert np.array_equal(first.heads["size"]["fixed.centre"], second.heads["size"]["fixed.centre"])
    third, _ = run_once(tmp_path, sites, "run-3")
    np.testing.assert_allclose(direction(first, "size"), direction(third, "colour"), rtol=1e-5)
    ledger = Site(sites[0], os_entropy).ledger()
    (again,) = [each.mechanism for each in ledger.charges() if each.run == "run-3" and each.round == 0]
    (paid,) = [each.mechanism for each in ledger.charges() if each.run == "run-1" and each.round == 0]
    assert again.noise_multiplier > paid.noise_multiplier and (again.sensitivity or 1.0) < (paid.sensitivity or 0.0)


def change_sums(change: Callable[[dict[str, Any], dict[str, float]], None]) -> Any:
    def distort(records: Any) -> Any:
        reply = messages.decode(records, messages.MomentsReply)
        sums, deviations = {part: dict(each) for part, each in reply.sums.items()}, dict(reply.deviations)
        change(sums, deviations)
        return messages.encode(messages.MomentsReply(sums, deviations))

    return distort


def make_long(sums: dict[str, Any], deviations: dict[str, float]) -> None:
    sums["size"] = {"sum": np.array([1e6, 0.0], np.float32)}


def make_short(sums: dict[str, Any], deviations: dict[str, float]) -> None:
    sums["size"] = {"sum": np.zeros(1, np.float32)}


def leave_out(sums: dict[str, Any], deviations: dict[str, float]) -> None:
    del sums["backbone.mean"], deviations["backbone.mean"]


def state_much_noise(sums: dict[str, Any], deviations: dict[str, float]) -> None:
    """A sum of any length then is within the noise, and the mean of all sites is mostly noise."""
    make_long(sums, deviations)
    deviations["size"] = 1e200


def state_no_noise(sums: dict[str, Any], deviations: dict[str, float]) -> None:
    deviations["size"] = 5e-324


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (state_much_noise, "noise of deviation"),
        (state_no_noise, "noise of deviation"),
        (make_long, "expected a sum of norm at most"),
        (make_short, "2 values"),
        (leave_out, "expected sums of"),
    ],
)
def test_a_bad_sum_costs_its_sender_its_place_and_nothing_else(
    tmp_path: Path, change: Callable[..., None], said: str
) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    outcome, events = federate(
        tmp_path / "run", sites, faulty_site="north", distort=change_sums(change), kind=messages.MOMENTS, **MEASURED
    )
    (rejected,) = [event for event in select_events(events, SiteRejected) if event.stage == "moments"]
    assert rejected.site == "north" and said in rejected.reason
    assert set(select_events(events, MomentsMeasured)[0].noise_multipliers) == {"east"}
    assert np.any(outcome.heads["size"]["fixed.centre"])


def test_a_site_that_is_asked_for_what_the_run_does_not_measure_declines(tmp_path: Path) -> None:
    site = Site(site_config(tmp_path, "east"), os_entropy)
    join(site, offered("run-1", run_config(), backbone()))
    give_backbone(site, "run-1", backbone())
    with pytest.raises(SiteDeclined, match="measures nothing"):
        measure(site, messages.MomentsRequest("run-1"))


@pytest.mark.parametrize(("budget", "joins"), [(3.0, True), (2.9, False)])
def test_a_site_that_joins_holds_the_price_of_the_first_release_too(tmp_path: Path, budget: float, joins: bool) -> None:
    site = Site(site_config(tmp_path, "east", budget={"epsilon": budget, "delta": 1e-5}), os_entropy)
    run = run_config(**{**MEASURED, "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0}})
    left = run.training_privacy
    assert left is not None and left.target_epsilon is not None and left.target_epsilon < 2.9  # The rounds alone fit.
    if joins:
        join(site, offered("run-1", run, backbone()))
        return
    with pytest.raises(SiteDeclined, match="whole price"):
        join(site, offered("run-1", run, backbone()))
