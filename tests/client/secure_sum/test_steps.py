"""One site's steps in a secure sum: what it keeps, what it charges, what it declines."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.config import SiteConfig
from client.protocol.join import join
from client.protocol.prepare import finish
from client.protocol.purge import purge
from client.protocol.site import SECURE_SUM, Site, SiteDeclined
from client.protocol.train import train
from client.secure_sum.steps import confirm_survivors, make_sum_keys, share_secrets, train_masked, unmask
from common import messages
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.privacy.noise import os_entropy
from common.run import RunConfig
from common.secure_sum.attempt import (
    Member,
    SiteAttempt,
    accept_keys,
    accept_shares,
    accept_survivors,
    make_keys,
    make_shares,
    sign_survivors,
)
from common.secure_sum.identity import format_public_key, write_identity
from common.secure_sum.terms import SumRules, SumTerms
from common.secure_sum.vectors import choose_lattice
from common.tasks import open_task
from common.types import BadInput, DeclineReason, Heads, Plan, Unit, heads_digest
from common.yaml import parse, write_yaml
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

_NAMES = ("east", "south", "west")
OTHERS = {name: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()) for name in _NAMES}
RULES = SumRules(3, 0)


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def make_run(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "trust": "secure_sum",
        "colluding": 0,
        "cohort": {"min_sites": 3},
        "solver": {"kind": "head_sum", "clip_norm": 1.0},
    }
    return run_config(**{**values, **changes})


def make_site(folder: Path, name: str = "north", **changes: Any) -> Site:
    """Returns the site `north` by default, in a roster with three others that the tests play."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "identity"
    roster = {name: format_public_key(key) for name, key in OTHERS.items()}
    roster[name] = format_public_key(write_identity(path))
    section = {"identity": str(path), "roster": roster, "min_sites": 3, "colluding": 0}
    return Site(site_config(folder, name, **{"secure_sum": section, **changes}), os_entropy)


def make_ready(site: Site, frozen: Backbone, **changes: Any) -> None:
    join(site, offered("run-1", make_run(**changes), frozen))
    give_backbone(site, "run-1", frozen)


def make_heads(frozen: Backbone) -> Heads:
    tasks = {name: open_task(TASKS[name], name) for name in TASKS}
    modules = create_heads(tasks, dict.fromkeys(tasks, frozen.feature_dim), 0)
    return {name: parameters(module) for name, module in modules.items()}


class Attempt:
    """The three other sites of an attempt, and an honest coordinator between them and `north`."""

    def __init__(self, site: Site, heads: Heads, *, round_: int = 1, number: int = 1) -> None:
        assert site.config.secure_sum is not None
        plan = Plan(1.0, 1, 1.0, 2.0, Unit.EXAMPLE)
        self.site, self.heads, self.about = site, heads, ("run-1", round_, number)
        self.terms = SumTerms(*self.about, RULES, choose_lattice(plan, RULES).log2_deviation)
        roster = site.config.secure_sum.roster
        self.members = {name: Member(name, key, roster) for name, key in OTHERS.items()}
        seed = hashlib.sha256(f"{self.about}".encode()).digest()
        self.states = {
            name: SiteAttempt(self.terms, name, hashlib.sha256(seed + name.encode()).digest()) for name in OTHERS
        }
        self.keys = {name: make_keys(self.members[name], state) for name, state in self.states.items()}

    def ask_keys(self) -> None:
        self.keys["north"] = make_sum_keys(self.site, messages.SumKeysRequest(*self.about)).keys

    def ask_shares(self) -> None:
        mine = share_secrets(self.site, messages.SumSharesRequest(*self.about, self.keys)).shares
        self.encrypted = {"north": dict(mine)}
        for name in OTHERS:
            self.states[name] = accept_keys(self.members[name], self.states[name], self.keys)
            self.encrypted[name] = make_shares(self.states[name])

    def masked_request(self) -> messages.MaskedRequest:
        return messages.MaskedRequest(*self.about, {name: self.encrypted[name]["north"] for name in OTHERS}, self.heads)

    def ask_masked(self) -> bytes:
        records = train_masked(self.site, self.masked_request())
        return messages.to_bytes(records)

    def survivors_request(self) -> messages.SurvivorsRequest:
        return messages.SurvivorsRequest(*self.about, ("east", "north", "south", "west"))

    def ask_signature(self) -> None:
        request = self.survivors_request()
        self.signatures = {"north": confirm_survivors(self.site, request).signature}
        for name in OTHERS:
            inbox = {sender: shares[name] for sender, shares in self.encrypted.items() if sender != name}
            state = accept_shares(self.states[name], inbox, heads_digest(self.heads))
            self.states[name] = accept_survivors(state, request.survivors)
            self.signatures[name] = sign_survivors(self.members[name], self.states[name])

    def ask_unmask(self) -> dict[str, str]:
        return dict(unmask(self.site, messages.UnmaskRequest(*self.about, self.signatures)).shares)

    def go(self, steps: int = 5) -> None:
        for ask in [self.ask_keys, self.ask_shares, self.ask_masked, self.ask_signature, self.ask_unmask][:steps]:
            ask()


@pytest.fixture
def site(tmp_path: Path, frozen: Backbone) -> Site:
    made = make_site(tmp_path)
    make_ready(made, frozen)
    return made


def list_charges(site: Site) -> list[Any]:
    return [charge.mechanism for charge in site.ledger().charges()]


def is_declined(reason: DeclineReason, detail: str) -> Any:
    return pytest.raises(SiteDeclined, match=f"^{reason.value}: .*{detail}")


def test_a_round_is_charged_once_as_a_share_of_the_sums_noise(site: Site, frozen: Backbone) -> None:
    attempt = Attempt(site, make_heads(frozen))
    attempt.go()
    (mechanism,) = list_charges(site)
    assert (mechanism.noise_multiplier, mechanism.sensitivity, mechanism.steps) == (2.0, 1.0, 1)
    assert mechanism.noise_share == pytest.approx(3**-0.5)
    assert (mechanism.min_sites, mechanism.colluding) == (3, 0)


def test_every_step_that_is_asked_again_gets_the_same_bytes(site: Site, frozen: Backbone) -> None:
    attempt = Attempt(site, make_heads(frozen))
    attempt.go()
    again = Attempt(site, make_heads(frozen))
    again.go()
    assert (attempt.keys, attempt.encrypted["north"], attempt.signatures) == (
        again.keys, again.encrypted["north"], again.signatures
    )  # fmt: skip
    assert attempt.ask_masked() == again.ask_masked()
    assert attempt.ask_unmask() == again.ask_unmask()
    assert len(list_charges(site)) == 1


def test_an_earlier_attempt_or_round_is_over(site: Site, frozen: Backbone) -> None:
    heads = make_heads(frozen)
    first, second = Attempt(site, heads), Attempt(site, heads, number=2)
    first.go(2)
    second.go(3)
    for ask in (first.ask_keys, first.ask_shares, first.ask_masked):
        with is_declined(DeclineReason.OVERTAKEN, "attempt 2 of round 1 has begun"):
            ask()
    third = Attempt(site, heads, round_=2)
    third.go(1)
    with is_declined(DeclineReason.OVERTAKEN, "attempt 1 of round 2 has begun"):
        second.ask_masked()
    assert len(list_charges(site)) == 1


def test_each_attempt_whose_vector_left_is_charged_and_three_are_the_most(site: Site, frozen: Backbone) -> None:
    vectors = set()
    for number in (1, 2, 3):
        attempt = Attempt(site, make_heads(frozen), number=number)
        attempt.go(2)
        vectors.add(attempt.ask_masked())
        assert len(list_charges(site)) == number
    assert len(vectors) == 3
    fourth = Attempt(site, make_heads(frozen), number=4)
    fourth.go(2)
    with is_declined(DeclineReason.BAD_REQUEST, "charged 3 times already"):
        fourth.ask_masked()


def test_a_vector_that_left_is_not_made_again_under_the_same_masks(site: Site, frozen: Backbone) -> None:
    """The difference of two noised vectors under one mask would be plain."""
    attempt = Attempt(site, make_heads(frozen))
    attempt.go(3)
    folder = site.config.state_dir / "runs" / "run-1"
    for stored in (folder / "replies").iterdir():
        stored.unlink()
    with is_declined(DeclineReason.BAD_REQUEST, "vector left already"):
        attempt.ask_masked()


def test_a_plain_request_of_a_run_of_secure_sums_is_declined(site: Site, frozen: Backbone) -> None:
    with is_declined(DeclineReason.TRUST, "no update of this site alone leaves"):
        train(site, messages.TrainRequest("run-1", 1, make_heads(frozen)))
    assert list_charges(site) == []


def test_a_secure_sum_in_a_plain_run_is_declined(tmp_path: Path, frozen: Backbone) -> None:
    site = make_site(tmp_path)
    join(site, offered("run-1", run_config(), frozen))
    give_backbone(site, "run-1", frozen)
    with is_declined(DeclineReason.BAD_REQUEST, "no secure sums"):
        make_sum_keys(site, messages.SumKeysRequest("run-1", 1, 1))


def test_steps_without_keys_of_their_attempt_are_declined(site: Site, frozen: Backbone) -> None:
    attempt = Attempt(site, make_heads(frozen))
    attempt.go(2)
    later = (attempt.about[0], 1, 2)
    for ask in (
        lambda: share_secrets(site, messages.SumSharesRequest(*later, attempt.keys)),
        lambda: train_masked(site, replace(attempt.masked_request(), attempt=2)),
        lambda: confirm_survivors(site, replace(attempt.survivors_request(), attempt=2)),
        lambda: unmask(site, messages.UnmaskRequest(*later, {})),
    ):
        with is_declined(DeclineReason.BAD_REQUEST, "has not begun here"):
            ask()
    with is_declined(DeclineReason.BAD_REQUEST, "outside the run"):
        make_sum_keys(site, messages.SumKeysRequest("run-1", 3, 1))


def test_what_the_protocol_refuses_is_declined_and_costs_nothing(site: Site, frozen: Backbone) -> None:
    """The refusals themselves: tests/common/secure_sum/test_lying_coordinator.py."""
    attempt = Attempt(site, make_heads(frozen))
    attempt.go(1)
    invented = {**attempt.keys, "invented": attempt.keys["east"]}
    with is_declined(DeclineReason.BAD_REQUEST, "not in the roster"):
        share_secrets(site, messages.SumSharesRequest(*attempt.about, invented))
    attempt.ask_shares()
    few = replace(attempt.masked_request(), shares={"east": attempt.encrypted["east"]["north"]})
    with is_declined(DeclineReason.BAD_REQUEST, "shares of at least 3 sites"):
        train_masked(site, few)
    with is_declined(DeclineReason.BAD_REQUEST, "shares of the other sites first"):
        confirm_survivors(site, attempt.survivors_request())
    assert list_charges(site) == []


def test_a_budget_that_does_not_cover_a_new_attempt_declines_it(tmp_path: Path, frozen: Backbone) -> None:
    # One round of noise 2 is epsilon 1.9 and a little: two rounds' price fits, three charges do not.
    site = make_site(tmp_path, budget={"epsilon": 3.0, "delta": 1e-5})
    make_ready(site, frozen)
    for number in (1, 2, 3):
        attempt = Attempt(site, make_heads(frozen), number=number)
        attempt.go(2)
        if number == 1:
            attempt.ask_masked()
        else:
            with is_declined(DeclineReason.BUDGET, ""):
                attempt.ask_masked()
    assert len(list_charges(site)) == 1


def test_the_secrets_are_the_owners_and_go_with_the_final_heads(site: Site, frozen: Backbone) -> None:
    attempt = Attempt(site, make_heads(frozen))
    attempt.go()
    path = site.config.state_dir / "runs" / "run-1" / SECURE_SUM
    assert path.stat().st_mode & 0o077 == 0
    finish(site, messages.FinishRequest("run-1", attempt.heads, heads_digest(attempt.heads)))
    assert not path.exists()


def test_a_purge_removes_what_opens_the_stored_vector(site: Site, frozen: Backbone) -> None:
    """That vector has this site's part of the noise alone. The run goes on once it is prepared anew."""
    Attempt(site, make_heads(frozen)).go(3)
    purge(site, ["somebody"])
    folder = site.config.state_dir / "runs" / "run-1"
    assert any((folder / "replies").iterdir()) and not (folder / SECURE_SUM).exists()
    with is_declined(DeclineReason.BAD_REQUEST, "has not begun here"):
        confirm_survivors(site, messages.SurvivorsRequest("run-1", 1, 1, ("east", "north", "south")))
    give_backbone(site, "run-1", frozen)
    Attempt(site, make_heads(frozen), number=2).go()
    assert len(list_charges(site)) == 2


def test_nothing_begins_once_the_final_heads_are_here(site: Site, frozen: Backbone) -> None:
    attempt = Attempt(site, make_heads(frozen))
    attempt.go()
    finish(site, messages.FinishRequest("run-1", attempt.heads, heads_digest(attempt.heads)))
    with is_declined(DeclineReason.BAD_REQUEST, "final heads are here"):
        attempt.ask_keys()
    assert not (site.config.state_dir / "runs" / "run-1" / SECURE_SUM).exists()


def test_two_sites_of_one_registry_are_not_in_one_sum(tmp_path: Path, frozen: Backbone) -> None:
    """A unit of both would be in the sum twice, and be charged as if it were in two sums once."""
    shared = {"registry": "people", "ledger_dir": str(tmp_path / "ledgers")}
    first, second = make_site(tmp_path / "first", **shared), make_site(tmp_path / "second", name="south", **shared)
    make_ready(first, frozen)
    with is_declined(DeclineReason.TRUST, "another site of registry people"):
        join(second, offered("run-1", make_run(), frozen))
    assert second.ledger().history().earmarks.keys() == {"run-1"}
    join(second, offered("run-2", make_run(), frozen))
    join(first, offered("run-1", make_run(), frozen))
    with is_declined(DeclineReason.TRUST, "another site of registry people"):
        join(first, offered("run-2", make_run(), frozen))


def test_a_site_file_that_names_another_registry_since_it_joined_is_looked_at_again(
    tmp_path: Path, frozen: Backbone
) -> None:
    shared = {"registry": "people", "ledger_dir": str(tmp_path / "ledgers")}
    make_ready(make_site(tmp_path / "other", name="south", **shared), frozen)
    site = make_site(tmp_path / "own")
    make_ready(site, frozen)
    attempt = Attempt(site, make_heads(frozen))
    attempt.go(2)
    attempt.site = replace(
        site, config=site.config.model_copy(update={"registry": "people", "ledger_dir": tmp_path / "ledgers"})
    )
    with is_declined(DeclineReason.TRUST, "another site of registry people"):
        attempt.ask_masked()
    assert list_charges(site) == []


def test_a_damaged_state_declines_and_a_new_attempt_goes_on_without_it(site: Site, frozen: Backbone) -> None:
    attempt = Attempt(site, make_heads(frozen))
    attempt.go(1)
    path = site.config.state_dir / "runs" / "run-1" / SECURE_SUM
    path.write_bytes(path.read_bytes()[:-9])
    with is_declined(DeclineReason.INTERNAL, "remove it"):
        attempt.ask_shares()
    path.unlink()
    Attempt(site, make_heads(frozen), number=2).go()


def test_another_identity_than_the_rosters_does_not_join(tmp_path: Path, frozen: Backbone) -> None:
    site = make_site(tmp_path)
    assert site.config.secure_sum is not None
    site.config.secure_sum.identity.unlink()
    with is_declined(DeclineReason.TRUST, "secure_sum.identity"):
        join(site, offered("run-1", make_run(), frozen))
    write_identity(site.config.secure_sum.identity)
    with is_declined(DeclineReason.TRUST, "secure_sum.roster.north"):
        join(site, offered("run-1", make_run(), frozen))


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"colluding": 1}, DeclineReason.TRUST, "file says 3 and 0"),
        ({"cohort": {"min_sites": 4}}, DeclineReason.TRUST, "at least 4 sites"),
        (
            {"solver": {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}},
            DeclineReason.SOLVER_NOT_ALLOWED,
            "cannot be summed securely",
        ),
    ],
)
def test_a_run_that_the_file_does_not_cover_is_not_joined(
    site: Site, frozen: Backbone, changes: dict[str, Any], reason: DeclineReason, detail: str
) -> None:
    with is_declined(reason, detail):
        join(site, offered("run-2", make_run(**changes), frozen))


def test_a_site_that_came_after_the_first_round_is_not_summed(tmp_path: Path, frozen: Backbone) -> None:
    with is_declined(DeclineReason.TRUST, "after its first round"):
        join(make_site(tmp_path), replace(offered("run-1", make_run(), frozen), first_round=2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"min_sites": 5}, "at most the 4 sites"),
        ({"min_sites": 2, "colluding": 1}, "do not collude"),
        ({"roster": {"east": "a" * 64, "south": "b" * 64}, "min_sites": 2}, "this site"),
        ({"roster": {"north": "a" * 64, "south": "a" * 64}, "min_sites": 2}, "one twice"),
        ({"roster": {"north": "a" * 63, "south": "b" * 64}, "min_sites": 2}, "roster"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = make_site(tmp_path).config
    values = config.model_dump(mode="json", by_alias=True)
    values["secure_sum"] |= change
    with pytest.raises(BadInput, match=said):
        parse(SiteConfig, values, base=tmp_path)


KILLED = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from client.secure_sum import store
    from tests.client.secure_sum.test_steps import Attempt, Site, backbone, make_heads, os_entropy
    from common.yaml import load
    from client.config import SiteConfig

    site = Site(load(SiteConfig, Path({config!r})), os_entropy)
    attempt = Attempt(site, make_heads(backbone()))
    attempt.go({steps})
    if {inside}:
        from client.protocol import replies
        replies.Replies.store = lambda *given: os.kill(os.getpid(), 9)
        attempt.ask_masked()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("steps", "inside", "charges"),
    [*(pytest.param(steps, False, 1, marks=pytest.mark.slow) for steps in (2, 3, 4)), (2, True, 2)],
)
def test_a_site_that_was_killed_between_steps_goes_on_where_it_was(
    site: Site, frozen: Backbone, tmp_path: Path, steps: int, inside: bool, charges: int
) -> None:
    """kill -9 in another process, also between the charge and the stored reply, where the charge stays."""
    path = tmp_path / "site.yaml"
    write_yaml(path, site.config)
    root = str(Path(__file__).resolve().parents[3])
    code = textwrap.dedent(KILLED.format(root=root, config=str(path), steps=steps, inside=inside))
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120, cwd=root).returncode == -9
    attempt = Attempt(site, make_heads(frozen))
    attempt.go()
    assert len(list_charges(site)) == charges
    assert set(attempt.ask_unmask()) == {"north", *OTHERS}
