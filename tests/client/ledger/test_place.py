"""A population has one ledger, wherever its site files lie; one of an earlier version is used where it lies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from client.config import SiteConfig
from client.ledger.place import find_default_ledger_dir, list_populations, locate_ledgers
from client.protocol.balance import balance
from client.protocol.site import Site, find_ledger
from common.events import ReplySent
from common.privacy.accounting import Mechanism
from common.privacy.noise import os_entropy
from common.types import BadInput, LedgerDamaged
from tests.tiny import site_config

BEFORE = Path(__file__).parent / "before"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of ledgers by default."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "headwater" / "ledgers"


def make_site(folder: Path, name: str, **changes: Any) -> SiteConfig:
    """A site whose file names no ledger_dir."""
    return site_config(folder, name, **{"ledger_dir": None, **changes})


def spend(config: SiteConfig, run: str) -> None:
    Site(config, os_entropy).ledger().reserve(Mechanism("gaussian", 4.0, 1.0, 1, 1.0), run=run, round=1, request="00")


def make_old(config: SiteConfig) -> None:
    """A ledger where earlier versions kept it, with one charge."""
    spend(config.model_copy(update={"ledger_dir": config.state_dir / "ledgers"}), "old")


def test_two_site_files_of_one_population_share_one_budget(tmp_path: Path, home: Path) -> None:
    first = make_site(tmp_path / "a", "north", registry="ours")
    second = make_site(tmp_path / "b", "south", registry="ours")
    spend(first, "one")
    assert balance(second).reserved_epsilon == balance(first).reserved_epsilon > 0
    assert locate_ledgers(first) == locate_ledgers(second) == home
    assert list_populations(home) == ["ours"]
    spend(second, "two")
    assert [run.run for run in balance(first).runs] == ["one", "two"]


def test_ledger_dir_names_another_place(tmp_path: Path, home: Path) -> None:
    config = make_site(tmp_path, "north", ledger_dir="./budgets")
    spend(config, "one")
    assert list_populations(tmp_path / "budgets") == ["north-registry"]
    assert not home.exists()


def test_a_relative_data_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_default_ledger_dir() == tmp_path / ".local" / "share" / "headwater" / "ledgers"


def test_a_ledger_of_an_earlier_version_goes_on_where_it_lies(tmp_path: Path, home: Path) -> None:
    config = make_site(tmp_path, "north")
    make_old(config)
    assert locate_ledgers(config) == config.state_dir / "ledgers"
    spend(config, "new")
    assert [run.run for run in balance(config).runs] == ["old", "new"]
    assert not home.exists()


def test_the_ledger_written_by_older_code_is_found(tmp_path: Path) -> None:
    shutil.copytree(BEFORE, tmp_path / "site")
    from common.yaml import load

    config = load(SiteConfig, tmp_path / "site" / "site.yaml")
    assert locate_ledgers(config) == tmp_path / "site" / "state" / "ledgers"
    assert balance(config).reserved_epsilon > 0


def test_a_ledger_that_was_lost_at_the_old_place_is_not_begun_anew_elsewhere(tmp_path: Path, home: Path) -> None:
    config = make_site(tmp_path, "north")
    make_old(config)
    shutil.rmtree(config.state_dir / "ledgers" / "north-registry")
    with pytest.raises(LedgerDamaged, match="its folder is missing"):
        Site(config, os_entropy).ledger()
    assert not home.exists()


def test_two_ledgers_of_one_population_stop_a_site(tmp_path: Path, home: Path) -> None:
    config = make_site(tmp_path / "a", "north")
    other = make_site(tmp_path / "b", "north")
    spend(other, "elsewhere")
    make_old(config)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="expected one ledger, got two") as raised:
        Site(config, os_entropy).ledger()
    assert str(home) in str(raised.value) and str(config.state_dir / "ledgers") in str(raised.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    # As the sentence says: one is moved away.
    shutil.move(home / "north-registry", tmp_path / "aside")
    (home / ".north-registry.created").unlink()
    assert [run.run for run in balance(config).runs] == ["old"]


def test_a_new_ledger_dir_cannot_leave_an_old_ledger_behind(tmp_path: Path) -> None:
    config = make_site(tmp_path, "north")
    make_old(config)
    moved = config.model_copy(update={"ledger_dir": tmp_path / "budgets"})
    with pytest.raises(BadInput, match=r"ledger_dir: the ledger of registry north-registry lies in .*state/ledgers"):
        Site(moved, os_entropy).ledger()
    # As the sentence says: the folder is moved, hidden files too.
    (config.state_dir / "ledgers").rename(tmp_path / "budgets")
    assert [run.run for run in balance(moved).runs] == ["old"]


def test_another_home_than_yesterdays_is_not_a_fresh_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that starts with another XDG_DATA_HOME than before finds no ledger, and its site has answered."""
    config = make_site(tmp_path, "north")
    spend(config, "one")
    replies = config.state_dir / "runs" / "one" / "replies"
    replies.mkdir(parents=True)
    (replies / "00").write_bytes(b"")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    with pytest.raises(LedgerDamaged, match=f"missing in {tmp_path}/other"):
        find_ledger(config)
    with pytest.raises(LedgerDamaged):
        balance(config)
    assert not (tmp_path / "other").exists()


def test_a_sent_reply_in_the_journal_alone_tells_that_a_ledger_is_missing(tmp_path: Path, home: Path) -> None:
    """Stored replies may have been removed: else a fresh ledger would be begun at the wrong place."""
    config = make_site(tmp_path, "north")
    sent = ReplySent(run_id="one", round=1, purpose="training", num_releases=1, size_bytes=9)
    Site(config, os_entropy).journal.write(sent)
    with pytest.raises(LedgerDamaged, match="at a site that has answered before"):
        Site(config, os_entropy).ledger()
    assert not list(home.rglob("ledger.jsonl"))
