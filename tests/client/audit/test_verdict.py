"""A run that requires an audit: each site audits its own solver before it agrees, and declines what fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.ledger.log import statement
from client.protocol.join import join
from client.protocol.requirements import MAX_PARAMETERS
from client.protocol.site import Site, SiteDeclined
from common import messages
from common.model.backbones import Backbone
from common.offers import make_offer
from common.privacy.noise import SeededEntropy, os_entropy
from common.types import DeclineReason, RunFailed
from server.reports.summary import summarize
from tests.server.rounds.test_loop import federate
from tests.tiny import TASKS, backbone, offered, run_config, site_config

REQUIRED: dict[str, Any] = {"audit": "required", "cohort": {"min_sites": 1, "timeout_s": 120, "join_timeout_s": 1}}


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def offer(frozen: Backbone, run_id: str = "run-1", **changes: Any) -> messages.JoinRequest:
    return offered(run_id, run_config(**{**REQUIRED, **changes}), frozen)


def declined(call: Callable[[], object]) -> SiteDeclined:
    with pytest.raises(SiteDeclined) as caught:
        call()
    return caught.value


def verdicts(site: Site) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((site.config.state_dir / "audits").glob("*"))]


def test_a_site_audits_itself_once_and_joins(tmp_path: Path, frozen: Backbone) -> None:
    site = Site(site_config(tmp_path, "north"), SeededEntropy(1))
    assert join(site, offer(frozen)).site == "north"
    (verdict,) = verdicts(site)
    assert verdict["passed"]
    assert any(
        each.event == "audited" and "run run-1: passed" in each.detail for each in statement(site.config).changes
    )
    # The verdict is kept: another run of the same content is joined with an entropy that would fail an audit.
    started = time.monotonic()
    join(Site(site.config, lambda purpose: bytes(32)), offer(frozen, "run-2"))
    assert time.monotonic() - started < 1.0 and len(verdicts(site)) == 1


def test_a_site_whose_noise_repeats_itself_declines_before_anything_is_spent(tmp_path: Path, frozen: Backbone) -> None:
    site = Site(site_config(tmp_path, "north"), lambda purpose: bytes(32))
    for _ in range(2):
        refusal = declined(lambda: join(site, offer(frozen, rounds=8)))
        assert refusal.reason is DeclineReason.AUDIT and "released noise repeats itself" in refusal.detail
    assert [verdict["passed"] for verdict in verdicts(site)] == [False]
    assert site.ledger().charges() == [] and not (site.config.state_dir / "runs" / "run-1").exists()


def test_other_settings_and_other_sizes_are_audited_anew(tmp_path: Path, frozen: Backbone) -> None:
    site = Site(site_config(tmp_path, "north"), SeededEntropy(1))
    join(site, offer(frozen))
    join(site, offer(frozen, "run-2", rounds=1))
    smaller = {task: {"source": "records", "label": task, "missing": "refuse", "public_size": 20} for task in TASKS}
    join(Site(site_config(tmp_path, "north", tasks=smaller), SeededEntropy(1)), offer(frozen, "run-3"))
    assert len(verdicts(site)) == 3


def test_an_audit_that_would_outlast_the_coordinators_patience_is_given_up(tmp_path: Path, frozen: Backbone) -> None:
    site = Site(site_config(tmp_path, "north"), os_entropy)
    hasty = {"min_sites": 1, "timeout_s": 0.01, "join_timeout_s": 1}
    refusal = declined(lambda: join(site, offer(frozen, cohort=hasty)))
    assert refusal.reason is DeclineReason.AUDIT and "after 0.01 s" in refusal.detail
    assert verdicts(site) == []


def test_without_the_requirement_no_audit_runs(tmp_path: Path, frozen: Backbone) -> None:
    site = Site(site_config(tmp_path, "north"), lambda purpose: bytes(32))
    join(site, offer(frozen, audit="on_request"))
    assert verdicts(site) == []


def test_a_run_in_which_every_audit_fails_trains_nothing_and_exports_nothing(tmp_path: Path) -> None:
    """Through the coordinator, outside of any simulation file; what it learns is one word."""
    site = site_config(tmp_path, "north")
    with pytest.raises(RunFailed, match="declined: audit"):
        federate(tmp_path / "run", [site], entropy=lambda purpose: bytes(32), rounds=8, **REQUIRED)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert Site(site, os_entropy).ledger().charges() == []


def test_a_run_of_audited_sites_says_so(tmp_path: Path) -> None:
    _, events = federate(tmp_path / "run", [site_config(tmp_path, "north")], **REQUIRED)
    found = summarize(events).audit
    assert found.required and found.passed is None  # Each site's own result stays there.


# --- size ------------------------------------------------------------------------------------------------------------


def wide(hidden: int) -> dict[str, Any]:
    return {**TASKS, "colour": {**TASKS["colour"], "head": {"hidden": hidden}}}


def test_heads_too_large_for_the_site_are_declined_at_the_door(tmp_path: Path, frozen: Backbone) -> None:
    """65,536 hidden units on 4 features are small; on the million that this offer names, 65 billion weights."""
    site = Site(site_config(tmp_path, "north"), os_entropy)
    run = make_offer(run_config(tasks=wide(65_536)), {"backbone": frozen})
    join(site, messages.JoinRequest("run-1", run, {"backbone": frozen.digest}))
    run["backbone"] = {"kind": "identity", "dim": 1_000_000}
    refusal = declined(lambda: join(site, messages.JoinRequest("run-2", run, {"backbone": "0" * 64})))
    assert refusal.reason is DeclineReason.BAD_REQUEST
    assert f"parameters, expected at most {MAX_PARAMETERS}" in refusal.detail
    assert site.ledger().charges() == [] and not (site.config.state_dir / "runs" / "run-2").exists()


def test_an_evaluation_of_too_many_classes_is_declined_at_the_door(tmp_path: Path, frozen: Backbone) -> None:
    site = Site(site_config(tmp_path, "north"), os_entropy)
    labels = {**TASKS, "colour": {"kind": "classification", "labels": [f"c{number}" for number in range(5000)]}}
    for evaluation, accepted in ((None, True), ({"every": 1}, False)):
        run = make_offer(run_config(tasks=labels, evaluation=evaluation), {"backbone": frozen})
        asked = messages.JoinRequest(f"run-{accepted}", run, {"backbone": frozen.digest})
        if accepted:
            join(site, asked)
        else:
            assert "statistics, expected at most" in declined(lambda asked=asked: join(site, asked)).detail
