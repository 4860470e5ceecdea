"""The way out of a damaged ledger: explicit, logged, and never cheaper than the worst that may have left."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import chain
from client.ledger.events import LedgerRecovered, Terms
from client.ledger.ledger import Ledger, amend
from client.ledger.recovery import Recovery, recover
from common.privacy.accounting import Mechanism, compute_epsilon
from common.types import BadInput, BudgetExhausted, LedgerDamaged, Unit

CAP, DELTA = 3.0, 1e-5
TERMS = Terms(Unit.PATIENT, CAP, DELTA)
TINY = Mechanism("gaussian", 1000.0, 1.0, 1, 1.0)


def opened(folder: Path, cap: float = CAP, delta: float = DELTA) -> Ledger:
    return Ledger.open(folder, population="oncology", unit=Unit.PATIENT, epsilon_cap=cap, delta=delta)


def gaussian(sigma: float) -> Mechanism:
    return Mechanism("gaussian", sigma, 1.0, 1, 1.0)


def charge(ledger: Ledger, mechanism: Mechanism, round_: int = 1) -> None:
    ledger.commit(ledger.reserve(mechanism, run="run", round=round_, request="00ff"))


def recovered(folder: Path, *, noiseless: bool = False, used: bool = True, **assume: object) -> Recovery:
    return recover(folder, "oncology", TERMS, reason="fire", noiseless_possible=noiseless, was_used=used, **assume)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ledgers of which one holds three charges and is then damaged in its last."""
    ledger = opened(tmp_path)
    for number in (1, 2, 3):
        charge(ledger, gaussian(4.0), number)
    damage(tmp_path)
    return tmp_path


def damage(folder: Path) -> None:
    path = folder / "oncology" / "ledger.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:-2], rows[-2].replace(b'"round":3', b'"round":9'), rows[-1]]))


def amended(folder: Path, cap: float, delta: float) -> Ledger:
    amend(folder, population="oncology", unit=Unit.PATIENT, epsilon_cap=cap, delta=delta, reason="the board agreed")
    return opened(folder, cap, delta)


def test_until_the_recovery_every_use_stops(folder: Path) -> None:
    with pytest.raises(LedgerDamaged, match="line 6 of 6 was edited"):
        opened(folder)
    with pytest.raises(LedgerDamaged):
        amended(folder, 9.0, DELTA)


def test_the_whole_cap_counts_as_spent_and_nothing_more_is_afforded(folder: Path) -> None:
    done = recovered(folder)
    spent = opened(folder).spent()
    assert (done.epsilon, spent.reserved_epsilon, spent.left_epsilon) == (CAP, CAP, 0.0)
    with pytest.raises(BudgetExhausted):
        charge(opened(folder), TINY)


def test_what_verifies_is_kept_and_the_recovery_is_logged_first(folder: Path) -> None:
    before = (folder / "oncology" / "ledger.jsonl").read_bytes()
    done = recovered(folder)
    events = [line.event for line in opened(folder).lines()]
    assert [event.event for event in events] == ["recovered", *["reserved", "committed"] * 2, "assumed"]
    assert isinstance(events[0], LedgerRecovered) and (events[0].reason, events[0].seen) == ("fire", done.seen)
    assert (done.num_kept, done.num_damaged) == (2, 2)
    assert [(each.round, each.committed) for each in opened(folder).charges()] == [(1, True), (2, True)]
    assert opened(folder).compute_run_epsilon("run") == compute_epsilon([gaussian(4.0)] * 2, DELTA)
    assert done.aside is not None
    assert done.aside.name.startswith("oncology.damaged-")
    assert (done.aside / "ledger.jsonl").read_bytes() == before


def test_the_new_chain_has_a_new_key(folder: Path) -> None:
    old = (folder / "oncology" / "ledger.key").read_bytes()
    recovered(folder)
    assert (folder / "oncology" / "ledger.key").read_bytes() != old


def test_a_bare_epsilon_adds_up_in_epsilon_and_in_delta(folder: Path) -> None:
    """Basic composition: (3, 1e-5) and then e at 1e-5 are (3 + e, 2e-5)."""
    recovered(folder)
    assert not amended(folder, 9.0, DELTA).affords([TINY])
    ledger = amended(folder, 9.0, 2 * DELTA)
    charge(ledger, gaussian(2.0))
    assert ledger.spent().reserved_epsilon == pytest.approx(CAP + compute_epsilon([gaussian(2.0)], DELTA), rel=1e-6)
    with pytest.raises(BudgetExhausted):
        charge(ledger, gaussian(0.7))


def test_a_delta_below_the_assumed_one_leaves_nothing(folder: Path) -> None:
    recovered(folder)
    assert amended(folder, 9.0, DELTA / 2).spent().left_epsilon == 0.0


def test_a_stated_run_composes_exactly_and_needs_a_higher_cap_only(folder: Path) -> None:
    stated = gaussian(1.0)
    recovered(folder, assume_mechanism=stated)
    assert not opened(folder).affords([TINY])
    ledger = amended(folder, 9.0, DELTA)
    assert ledger.spent().reserved_epsilon == compute_epsilon([gaussian(4.0)] * 2 + [stated], DELTA)
    assert ledger.affords([gaussian(2.0)])


@pytest.mark.parametrize(
    "assume", [{"assume_epsilon": 2.9}, {"assume_epsilon": float("nan")}, {"assume_mechanism": gaussian(50.0)}], ids=str
)
def test_less_than_the_worst_case_is_refused_and_changes_nothing(folder: Path, assume: dict) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(BadInput, match="whole cap"):
        recovered(folder, **assume)
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(LedgerDamaged):
        opened(folder)


def test_a_larger_epsilon_may_be_stated(folder: Path) -> None:
    assert recovered(folder, assume_epsilon=5.0).epsilon == 5.0


def test_a_cap_that_only_a_damaged_line_names_still_counts(folder: Path) -> None:
    path = folder / "oncology" / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event":"amended","epsilon_cap":20.0,"delta":1e-5}\n')
    assert recovered(folder).epsilon == 20.0


@pytest.mark.parametrize("where", ["the site allows it", "a legible line"])
def test_a_release_without_noise_that_may_be_lost_is_infinite(folder: Path, where: str) -> None:
    path = folder / "oncology" / "ledger.jsonl"
    if where == "a legible line":
        path.write_bytes(path.read_bytes() + b'{"event":"reserved","mechanism":{"kind":"none"}}\n')
    assert recovered(folder, noiseless=where == "the site allows it").epsilon == float("inf")
    assert not amended(folder, 9.0, 2 * DELTA).affords([TINY])


def lose_key(folder: Path) -> None:
    (folder / "oncology" / "ledger.key").unlink()


def lose_lock(folder: Path) -> None:
    (folder / "oncology" / "lock").unlink()


def lose_folder(folder: Path) -> None:
    shutil.rmtree(folder / "oncology")


def cut_in_half(folder: Path) -> None:
    path = folder / "oncology" / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("lose", [lose_key, lose_lock, lose_folder, cut_in_half], ids=lambda f: f.__name__)
def test_each_kind_of_loss_stops_the_site_and_can_be_recovered_once(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    charge(opened(tmp_path), gaussian(4.0))
    lose(tmp_path)
    with pytest.raises(LedgerDamaged):
        opened(tmp_path)
    assert recovered(tmp_path).epsilon == CAP
    assert opened(tmp_path).spent().left_epsilon == 0.0
    with pytest.raises(BadInput, match="nothing to recover"):
        recovered(tmp_path)


def test_a_recovery_that_dies_between_its_two_renames_leaves_a_damaged_ledger_not_a_new_one(folder: Path) -> None:
    (folder / "oncology").rename(folder / "oncology.damaged-20260101-000000")
    with pytest.raises(LedgerDamaged, match="missing"):
        opened(folder)
    assert recovered(folder).epsilon == CAP


def test_a_recovered_ledger_that_is_damaged_again_still_counts_what_was_assumed(folder: Path) -> None:
    recovered(folder, assume_epsilon=7.0)
    (folder / "oncology" / "anchor.json").write_text("{")
    assert recovered(folder).epsilon == 7.0


def test_a_sound_or_unused_ledger_is_not_recovered(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="never had"):
        recovered(tmp_path, used=False)
    charge(opened(tmp_path), gaussian(4.0))
    with pytest.raises(BadInput, match="verifies"):
        recovered(tmp_path)


@settings(max_examples=25, deadline=None)
@given(position=st.integers(min_value=0), sigma=st.floats(2.5, 30.0))
def test_wherever_a_ledger_is_cut_recovery_never_shows_less_than_what_left(
    position: int, sigma: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("ledgers")
    ledger = opened(place)
    for number in (1, 2):
        charge(ledger, gaussian(sigma), number)
    truth = ledger.spent().reserved_epsilon
    path = place / "oncology" / "ledger.jsonl"
    data = path.read_bytes()
    kept = data[: position % len(data)]
    path.write_bytes(kept)
    if len(kept) > data.rindex(b"\n", 0, -1):
        # Only the note that the last reply is stored is gone: a power cut may do that, and the price is the same.
        assert opened(place).spent().reserved_epsilon == truth
    else:
        assert recovered(place).epsilon >= max(truth, CAP)


def test_a_writer_that_waited_while_the_chain_was_replaced_does_not_write_to_either(tmp_path: Path) -> None:
    """The lock it gets is that of the files kept aside: another process may hold the new one's."""
    place = tmp_path / "chain"
    chain.create(place, "created", {})
    seen: list[str] = []

    def write() -> None:
        try:
            with chain.exclusive(place) as late:
                late.append("late", {})
        except LedgerDamaged as error:
            seen.append(str(error))

    waiting = threading.Thread(target=write)
    with chain.exclusive(place):
        waiting.start()
        waiting.join(timeout=0.2)
        assert waiting.is_alive()
        chain.replace(place, tmp_path / "aside", [("recovered", {})])
    waiting.join(timeout=60)
    assert len(seen) == 1 and "replaced by a recovery" in seen[0]
    with chain.exclusive(place) as now:
        assert [json.loads(body)["event"] for body in now.bodies] == ["recovered"]
