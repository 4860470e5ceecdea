"""A site's metrics and status page, from real files: journal, ledger, offers and the authority's certificate."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.config import Coordinator, SiteConfig
from client.monitoring.monitor import SiteMonitor
from client.monitoring.page import list_verdicts
from client.monitoring.state import Presence
from client.protocol.approvals import Approvals
from client.protocol.balance import balance
from client.protocol.site import Site
from common.events import FileJournal, HeadsReceived, ReplyResent, ReplySent, RequestDeclined, RunJoined
from common.offers import encode_offer, make_offer, parse_offer
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.noise import os_entropy
from tests.federation import DAY, ROOT, Authority
from tests.tiny import backbone, run_config, site_config

HOSTILE = "<script>alert('1')</script>\"&"


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    ca = Authority.new("hearts").write(tmp_path / "ca.crt")
    coordinator = {"address": "localhost:1", "ca": str(ca), "key": str(tmp_path / "key")}
    config = site_config(tmp_path, "north", coordinator=coordinator)
    config.state_dir.mkdir(parents=True, exist_ok=True)
    return config


def make_monitor(config: SiteConfig, *, joined: bool = True) -> SiteMonitor:
    presence = Presence()
    if joined:
        presence.note(True)
    coordinator: Coordinator | None = config.coordinator
    assert coordinator is not None
    return SiteMonitor(config, coordinator, Path("site.yaml"), presence)


def read_metrics(monitor: SiteMonitor) -> dict[str, dict[tuple[str, ...], float]]:
    text = monitor.list_pages()["/metrics"]().body.decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name.removeprefix("headwater_"), {})[tuple(sample.labels.values())] = sample.value
    return found


def read_page(monitor: SiteMonitor) -> str:
    return monitor.list_pages()["/"]().body.decode()


def spend(config: SiteConfig, run: str, round_: int = 1, *, rate: float = 1.0, commit: bool = True) -> None:
    ledger = Site(config, os_entropy).ledger()
    reserved = ledger.reserve(Mechanism("gaussian", 4.0, rate, 1, 1.0), run=run, round=round_, request="00")
    if commit:
        ledger.commit(reserved)


def test_the_account_is_that_of_the_command_budget(config: SiteConfig) -> None:
    spend(config, "one")
    spend(config, "one", 2, commit=False)
    Site(config, os_entropy).ledger().earmark(Mechanism("gaussian", 4.0, 1.0, 3, 1.0), run="two", rounds=3)
    account, found = balance(config), read_metrics(make_monitor(config))
    assert found["site_budget_epsilon"] == {(): account.terms.epsilon_cap}
    assert found["site_epsilon_spent"] == {(): account.reserved_epsilon}
    assert found["site_epsilon_left"] == {(): account.left_epsilon}
    assert found["site_budget_used_ratio"] == {(): account.used_share}
    assert found["site_budget_held_ratio"][()] == pytest.approx(account.held_share)
    assert account.held_share > 0
    assert found["site_charges_open"] == found["site_runs_charged"] == found["site_runs_held"] == {(): 1}


def test_every_metric_is_in_the_documentation(config: SiteConfig) -> None:
    spend(config, "one")
    FileJournal(config.state_dir / "site.jsonl").write(ReplySent(run_id="one", round=1, size_bytes=100))
    FileJournal(config.state_dir / "site.jsonl").write(RequestDeclined(reason="budget", detail=""))
    text = (ROOT / "docs/monitoring.md").read_text()
    assert not [name for name in read_metrics(make_monitor(config)) if f"`{name}`" not in text]


def test_a_sampled_account_is_never_shown_smaller_than_it_is(config: SiteConfig) -> None:
    spend(config, "one", rate=0.1)
    found = read_metrics(make_monitor(config))
    exact = balance(config)
    assert exact.reserved_epsilon <= found["site_epsilon_spent"][()] <= 3 * exact.reserved_epsilon
    assert found["site_budget_used_ratio"] == {(): exact.used_share}


def test_counters_are_what_the_journal_says(config: SiteConfig) -> None:
    journal = FileJournal(config.state_dir / "site.jsonl")
    monitor = make_monitor(config)
    assert read_metrics(monitor)["site_replies_resent_total"] == {(): 0}
    for event in (
        RunJoined(run_id="one"),
        ReplySent(run_id="one", round=1, size_bytes=100, seconds=0.5),
        ReplySent(run_id="one", round=1, size_bytes=50, purpose="evaluation"),
        ReplyResent(run_id="one", round=1, size_bytes=100),
        RequestDeclined(reason="budget", detail="all of it"),
        RequestDeclined(reason="<word>", detail=""),
        HeadsReceived(run_id="one", heads="0"),
    ):
        journal.write(event)
    found = read_metrics(monitor)
    assert found["site_replies_total"] == {("training",): 1, ("evaluation",): 1}
    assert found["site_replies_resent_total"] == found["site_runs_joined_total"] == {(): 1}
    assert found["site_requests_declined_total"] == {("budget",): 1, ("other",): 1}
    assert found["site_bytes_sent_total"] == {(): 250}
    assert found["site_answer_seconds_total"] == {(): 0.5}
    assert found["site_joined"] == {(): 1}
    assert abs(found["site_last_contact_timestamp_seconds"][()] - time.time()) < 30


def test_a_site_that_never_joined_says_so_first(config: SiteConfig) -> None:
    monitor = make_monitor(config, joined=False)
    found = read_metrics(monitor)
    assert found["site_joined"] == {(): 0}
    assert "site_last_contact_timestamp_seconds" not in found
    level, what, first = list_verdicts(monitor.look())[0]
    assert (level, what.split(",")[0]) == ("bad", "The site is not joined")
    assert first.startswith("`headwater site check site.yaml`")


def test_a_damaged_ledger_is_named_and_nothing_is_shown_as_left(config: SiteConfig) -> None:
    spend(config, "one")
    monitor = make_monitor(config)
    (file,) = config.state_dir.parent.rglob("ledger.jsonl")
    file.write_bytes(file.read_bytes().replace(b'"00"', b'"01"'))
    found = read_metrics(monitor)
    assert found["site_ledger_readable"] == {(): 0}
    assert not {"site_epsilon_left", "site_epsilon_spent"} & set(found)
    assert "The ledger cannot be read, and nothing is answered" in read_page(monitor)


def test_a_missing_ledger_of_a_site_that_answered_is_not_a_fresh_budget(config: SiteConfig) -> None:
    FileJournal(config.state_dir / "site.jsonl").write(ReplySent(run_id="one", round=1, size_bytes=1))
    assert read_metrics(make_monitor(config))["site_ledger_readable"] == {(): 0}


def test_the_last_decline_and_waiting_runs_ask_for_a_person(config: SiteConfig) -> None:
    frozen = backbone()
    offer = parse_offer(
        encode_offer(make_offer(run_config(), {"backbone": frozen}), {"backbone": frozen.digest}), "test"
    )
    assert Approvals(config.coordinator_dir).wait(offer)
    FileJournal(config.state_dir / "site.jsonl").write(RequestDeclined(reason="not_approved", detail="secret detail"))
    monitor = make_monitor(config)
    assert read_metrics(monitor)["site_offers_waiting"] == {(): 1}
    matters = [what for _, what, _ in list_verdicts(monitor.look())]
    assert [what.split(":")[0] for what in matters] == [
        f"Run {run_config().name} waits for a decision.",
        "The last request was declined 0 s ago",
    ]
    assert "secret detail" not in read_page(monitor)


def test_a_scarce_budget_and_other_terms_are_said(config: SiteConfig) -> None:
    cap = 1.02 * compute_epsilon([Mechanism("gaussian", 4.0, 1.0, 1, 1.0)], config.budget.delta)
    scarce = config.model_copy(update={"budget": config.budget.model_copy(update={"epsilon": cap})})
    Site(scarce, os_entropy).ledger()
    assert not list_verdicts(make_monitor(scarce).look())
    spend(scarce, "one")
    [(level, what, _)] = list_verdicts(make_monitor(scarce).look())
    assert (level, what.split("% of the budget")[1]) == ("attention", " is used and 0.0 % held.")
    [*_, (_, what, _)] = list_verdicts(make_monitor(config).look())
    assert what.startswith("The site file states another unit, budget or delta than the ledger")


def test_every_text_on_the_page_is_escaped(config: SiteConfig) -> None:
    journal = FileJournal(config.state_dir / "site.jsonl")
    journal.write(RunJoined(run_id=HOSTILE))
    journal.write(RequestDeclined(reason=HOSTILE, detail=HOSTILE))
    spend(config, HOSTILE)
    page = read_page(make_monitor(config.model_copy(update={"name": HOSTILE, "registry": HOSTILE})))
    assert "<script" not in page
    page = read_page(make_monitor(config))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&quot;&amp;") >= 4
    for word in ("src=", "href=", "url(", "@import", "style=", "<form", "<iframe", "http:", "https:"):
        assert word not in page, word


def test_an_authority_that_expires_soon_is_said(config: SiteConfig, tmp_path: Path) -> None:
    assert read_metrics(make_monitor(config))["site_authority_days_left"][()] > 60
    soon, _ = Authority.new("hearts").issue(tmp_path / "soon", valid=(-DAY, 9 * DAY))
    (tmp_path / "ca.crt").write_bytes(soon.read_bytes())
    assert read_metrics(make_monitor(config))["site_authority_days_left"][()] in (8, 9)
    assert "expires in 8 day(s)" in read_page(make_monitor(config))


def test_the_process_that_serves_the_pages_needs_no_torch(config: SiteConfig) -> None:
    spend(config, "one", rate=0.1)
    script = f"""
import sys
from pathlib import Path
from client.monitoring.monitor import SiteMonitor
from client.monitoring.state import Presence
from client.config import SiteConfig
config = SiteConfig.model_validate_json({config.model_dump_json()!r})
pages = SiteMonitor(config, config.coordinator, Path("site.yaml"), Presence()).list_pages()
assert b"site_epsilon_spent" in pages["/metrics"]().body and pages["/"]().body
print(sorted({{"torch", "opacus", "flwr", "grpc"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("[]", "['flwr']", "['flwr', 'grpc']"), done.stderr
