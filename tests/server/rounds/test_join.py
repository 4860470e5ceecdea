"""Joining: a run starts when its quorum is ready, or ends with every site's reason, and nothing is spent before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from client.app import make_app
from client.config import SiteConfig
from client.protocol.approvals import Approvals
from client.protocol.site import Site
from common import messages
from common.events import FileJournal, RunEvent, SiteJoined, SiteRejected, read_run_journal, select_events
from common.model.backbones import Backbone, open_random
from common.privacy.noise import os_entropy
from common.types import RunFailed
from server.rounds.loop import run_federation
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from tests.tiny import backbone, run_config, site_config

ONLY_SIZE = {"size": {"source": "records", "label": "size", "missing": "refuse", "public_size": 40}}


class LateGrid(InProcessGrid):
    """A grid whose nodes connect one after the other."""

    def __init__(self, app: Callable[[Message, Context], Message], num_sites: int, delay_s: float) -> None:
        InProcessGrid.__init__(self, app, num_sites)
        self._started = time.monotonic()
        self._delay_s = delay_s

    def get_node_ids(self) -> list[int]:
        there = 1 + int((time.monotonic() - self._started) / self._delay_s)
        return InProcessGrid.get_node_ids(self)[:there]


def federate(
    folder: Path,
    sites: list[SiteConfig],
    *,
    cohort: dict[str, Any],
    grid: Callable[[Any, int], InProcessGrid] = InProcessGrid,
    node_ids: dict[int, str] | None = None,
    **changes: Any,
) -> list[RunEvent]:
    app = make_app(lambda context: sites[int(context.node_config["partition-id"])])
    folder.mkdir(parents=True, exist_ok=True)
    journal = FileJournal(folder / "journal.jsonl")
    run_federation(
        grid(app, len(sites)),
        run_config(cohort={"timeout_s": 5, **cohort}, **changes),
        {"backbone": backbone()},
        run_id="run-1",
        folder=folder,
        journal=journal,
        executor="in_process",
        node_ids=node_ids,
    )
    return read_run_journal(journal.path)


def joined(events: Iterable[RunEvent]) -> list[str]:
    return [event.site for event in select_events(events, SiteJoined)]


def test_a_run_waits_for_sites_that_connect_late(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, name) for name in ("east", "north")]
    cohort = {"min_sites": 2, "join_timeout_s": 30}
    events = federate(tmp_path / "run", sites, cohort=cohort, grid=lambda app, n: LateGrid(app, n, 0.5))
    assert joined(events) == ["east", "north"]


def test_a_run_whose_quorum_never_comes_ends_at_its_deadline_and_spends_nothing(tmp_path: Path) -> None:
    site = site_config(tmp_path, "east")
    started = time.monotonic()
    with pytest.raises(RunFailed, match=r"at least 2 site\(s\) to join, got 1: north: not connected"):
        federate(
            tmp_path / "run",
            [site],
            cohort={"min_sites": 2, "join_timeout_s": 1},
            node_ids={FIRST_NODE_ID: "east", 7: "north"},
        )
    assert 1.0 <= time.monotonic() - started < 10.0
    assert Site(site, os_entropy).ledger().charges() == []


def test_a_run_ends_at_once_where_nobody_is_left_to_wait_for(tmp_path: Path) -> None:
    poor = site_config(tmp_path, "north", budget={"epsilon": 0.1, "delta": 1e-5})
    started = time.monotonic()
    with pytest.raises(RunFailed, match="north: declined: budget"):
        federate(
            tmp_path / "run",
            [site_config(tmp_path, "east"), poor],
            cohort={"min_sites": 2, "join_timeout_s": 60},
            node_ids={FIRST_NODE_ID: "east", FIRST_NODE_ID + 1: "north"},
        )
    assert time.monotonic() - started < 20.0


def test_a_task_without_its_quorum_of_sites_stops_the_run_before_anything_is_spent(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, "east"), site_config(tmp_path, "north", tasks=ONLY_SIZE)]
    with pytest.raises(RunFailed, match=r"at least 2 site\(s\) with task colour to join, got 1"):
        federate(tmp_path / "run", sites, cohort={"min_sites": 2, "min_replies_per_task": 2, "join_timeout_s": 0.5})
    assert all(Site(site, os_entropy).ledger().charges() == [] for site in sites)


def test_a_site_under_another_name_than_it_was_admitted_with_is_kept_out(tmp_path: Path) -> None:
    sites = [site_config(tmp_path, "east"), site_config(tmp_path, "west")]
    events = federate(
        tmp_path / "run",
        sites,
        cohort={"min_sites": 1, "join_timeout_s": 5},
        node_ids={FIRST_NODE_ID: "east", FIRST_NODE_ID + 1: "north"},
    )
    assert joined(events) == ["east"]
    [rejected] = select_events(events, SiteRejected)
    assert rejected.site == "north"
    assert "another name" in rejected.reason


def test_a_run_waits_while_a_sites_staff_decides(tmp_path: Path) -> None:
    site = site_config(tmp_path, "east", approval="required")
    approvals = Approvals(site.state_dir)

    def decide() -> None:
        for _ in range(100):
            if approvals.waiting():
                approvals.approve(approvals.find("tiny"))
                return
            time.sleep(0.1)

    staff = threading.Thread(target=decide)
    staff.start()
    events = federate(tmp_path / "run", [site], cohort={"min_sites": 1, "join_timeout_s": 30})
    staff.join()
    reasons = [(event.site, event.reason) for event in select_events(events, SiteRejected)]
    assert reasons == [("east", "declined: not_approved")]
    assert joined(events) == ["east"]


def test_only_the_parts_of_a_backbone_that_a_site_lacks_are_sent_again(tmp_path: Path) -> None:
    """A transfer that broke off after its first parts goes on where it stopped."""
    site = site_config(tmp_path, "east", device="cpu")
    big = three_parts()
    weights = big.blob().weights
    total = -(-len(weights) // messages.PART_BYTES)
    assert total == 3
    store = Site(site, os_entropy).backbones()
    for index in (0, 1):
        start = index * messages.PART_BYTES
        store.put_part(big.digest, index, total, weights[start : start + messages.PART_BYTES])
    sent: list[str] = []
    app = make_app(lambda context: site)

    def counting(message: Message, context: Context) -> Message:
        sent.append(message.metadata.message_type)
        return app(message, context)

    folder = tmp_path / "run"
    folder.mkdir()
    # Its vectors are not this backbone's images, so no record is used; that ends no run.
    run_federation(
        InProcessGrid(counting, 1),
        run_config(backbone=big.public_spec()),
        {"backbone": big},
        run_id="run-1",
        folder=folder,
        journal=FileJournal(folder / "journal.jsonl"),
        executor="in_process",
    )
    assert sent.count(messages.PART) == 1
    assert store.has(big.digest)
    assert store.held_parts(big.digest) == ()
    assert store.open(big.digest).digest == big.digest


def three_parts() -> Backbone:
    """A real backbone whose weights need that many parts."""
    spec = {
        "kind": "torchvision",
        "model": "mobilenet_v3_large",
        "num_classes": 2,
        "preprocess": {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    return open_random(spec, "backbone", seed=0)
