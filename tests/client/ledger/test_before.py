"""Ledgers, approvals and offers written by the code of commit 755df00 open unchanged and mean the same.

`before/` was made by that code, with its own commands: a site of the tests' tiny federation, where the run `first` was
offered, approved (`client approve`), joined and trained for two rounds with one evaluation; a charge was refused and
one left open (`early-registry` is a copy of the ledger at this point); then a line of the ledger was edited by hand,
`client recover` and `client amend` were used, `second` was approved and trained, a torn line was sealed, a charge was
refused and one left open; `third` was approved and not trained, and a fourth offer waits. `epsilons.json` is what that
code's `Ledger.spent` and `Ledger.run_epsilon` returned, `budget.json` what its `client budget --json` printed. The keys
of these ledgers are made up and protect nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.protocol.approvals import Approvals
from client.protocol.balance import as_json, balance
from client.protocol.site import Site, check_approved, joined_run
from common.privacy.accounting import Mechanism
from common.privacy.noise import os_entropy
from common.types import Unit
from common.yaml import load

BEFORE = Path(__file__).parent / "before"
EPSILONS: dict[str, Any] = json.loads((BEFORE / "epsilons.json").read_text(encoding="utf-8"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """The site of `before/`, in a folder that may be written."""
    shutil.copytree(BEFORE, tmp_path / "site")
    return Site(load(SiteConfig, tmp_path / "site" / "site.yaml"), os_entropy)


def test_a_recovered_and_amended_ledger_has_the_epsilon_it_had(site: Site) -> None:
    spent = site.ledger().spent()
    # Exponentials of two machines' libraries may differ in their last bit.
    expected = pytest.approx([EPSILONS["spent_epsilon"], EPSILONS["reserved_epsilon"]], rel=1e-14)
    assert [spent.spent_epsilon, spent.reserved_epsilon] == expected
    epsilons = {run: site.ledger().compute_run_epsilon(run) for run in EPSILONS["runs"]}
    assert epsilons == pytest.approx(EPSILONS["runs"], rel=1e-14)


def test_a_ledger_that_was_never_damaged_has_the_epsilon_it_had(site: Site) -> None:
    ledger = Ledger.open(
        site.config.state_dir / "ledgers", population="early-registry", unit=Unit.EXAMPLE, epsilon_cap=100.0, delta=1e-5
    )
    spent = ledger.spent()
    assert {"spent_epsilon": spent.spent_epsilon, "reserved_epsilon": spent.reserved_epsilon} == EPSILONS["early"]


def test_the_balance_is_the_one_that_was_printed(site: Site) -> None:
    # The filter came later; it is stricter than the accountant by which this ledger counted its affordable rounds.
    now, then = as_json(balance(site.config)), json.loads((BEFORE / "budget.json").read_text(encoding="utf-8"))
    assert now.pop("filter").startswith("renyi")
    assert (now.pop("earmarks"), now.pop("held_share")) == ([], 0.0)
    assert 0.0 < now.pop("used_share") < 1.0
    assert now.pop("affordable")["rounds"] <= then.pop("affordable")["rounds"]
    assert now == then


def test_reading_changes_no_byte_and_a_charge_only_adds_one_line_in_the_same_form(site: Site) -> None:
    chain = site.config.state_dir / "ledgers" / "north-registry" / "ledger.jsonl"
    ledger = site.ledger()
    ledger.spent()
    assert chain.read_bytes() == (BEFORE / "state/ledgers/north-registry/ledger.jsonl").read_bytes()
    ledger.reserve(Mechanism("gaussian", 4.0, 0.5, 3, 1.0), run="second-1", round=3, request="00")
    *old, again = chain.read_text(encoding="utf-8").splitlines()
    assert "\n".join(old) + "\n" == (BEFORE / "state/ledgers/north-registry/ledger.jsonl").read_text(encoding="utf-8")
    # The charge that the old code left open was this very one.
    was, now = json.loads(old[-1]), json.loads(again)
    assert list(was) == list(now)
    different = {"n", "time", "mac"}
    assert {key: was[key] for key in was.keys() - different} == {key: now[key] for key in now.keys() - different}


def test_an_approval_still_covers_its_run_and_no_other(site: Site) -> None:
    approvals = Approvals(site.config.state_dir)
    digests = {approval.run: approval.digest for approval in approvals.all()}
    assert list(digests) == ["first", "second", "third"]
    for run in ("first", "second"):
        assert joined_run(site, f"{run}-1").run.name == run
        check_approved(site, f"{run}-1", digests[run], use=True)
        assert not approvals.covers(digests[run], f"{run}-2")
    assert approvals.use(digests["third"], "third-1")


def test_a_waiting_offer_can_still_be_approved(site: Site) -> None:
    approvals = Approvals(site.config.state_dir)
    [offer] = approvals.waiting()
    assert offer.run_config().name == "fourth"
    approvals.approve(offer)
    assert approvals.waiting() == []
    assert approvals.covers(offer.digest, "fourth-1")
