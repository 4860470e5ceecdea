"""Any coordinator, with sites that collude: two worlds, several lists, whatever it likes to sign for its own sites.

What it can learn is linear algebra. Each masked vector is an unknown vector plus unknown masks; a combination of
masked vectors says something only if all masks that the coordinator does not know cancel in it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secure_sum.attempt import (
    SiteAttempt,
    accept_keys,
    accept_shares,
    accept_survivors,
    make_keys,
    make_shares,
    reveal_shares,
    sign_survivors,
)
from common.secure_sum.terms import SumRules
from common.types import BadInput
from tests.common.secure_sum.members import make_members, make_terms

MEMBERS = make_members(6)
SITES = sorted(MEMBERS)


@dataclass
class Attack:
    """One attempt between honest sites and a coordinator that knows all that some others know.

    Attributes:
        rules: the rules of all sites.
        colluding: the sites that tell the coordinator everything.
        states: site -> its state.
        shares: honest site -> kind of secret -> the sites whose share of it the coordinator has.
    """

    rules: SumRules
    colluding: frozenset[str]
    states: dict[str, SiteAttempt] = field(default_factory=dict)
    shares: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        terms = make_terms(self.rules.min_sites, self.rules.colluding)
        for name in SITES:
            self.states[name] = SiteAttempt(terms, name, hashlib.sha256(name.encode()).digest())
        self.keys = {name: make_keys(MEMBERS[name], state) for name, state in self.states.items()}
        self.shares = {name: {"mask": set(), "self": set()} for name in self.honest}

    @property
    def honest(self) -> list[str]:
        return [name for name in SITES if name not in self.colluding]

    def show_keys(self, name: str, roster: list[str]) -> None:
        keys = {each: self.keys[each] for each in roster}
        self.states[name] = accept_keys(MEMBERS[name], self.states[name], keys)
        # What it encrypts for colluding sites is known from now on.
        for secrets in self.shares[name].values():
            secrets |= self.colluding & set(roster)

    def show_shares(self, name: str, senders: list[str], heads: str) -> None:
        roster, inbox = list(self.states[name].roster), {}
        for sender in set(senders) - {name}:
            state = self.states[sender]
            if sender in self.colluding:
                state = accept_keys(MEMBERS[sender], state, {each: self.keys[each] for each in roster})
            inbox[sender] = make_shares(state).get(name, "")
        self.states[name] = accept_shares(self.states[name], inbox, heads)

    def show_survivors(self, name: str, survivors: list[str]) -> None:
        self.states[name] = accept_survivors(self.states[name], survivors)

    def collect_signatures(self, name: str) -> dict[str, str]:
        """Returns all that may count at a site: those of honest sites, and what colluding ones sign for it."""
        signed = {each: self.states[each] for each in self.honest if self.states[each].survivors is not None}
        signatures = {each: sign_survivors(MEMBERS[each], state) for each, state in signed.items()}
        return signatures | {each: sign_survivors(MEMBERS[each], self.states[name]) for each in self.colluding}

    def unmask(self, name: str) -> None:
        state = self.states[name]
        for other in reveal_shares(MEMBERS[name], state, self.collect_signatures(name)):
            # Of another list of keys a share is of another polynomial.
            if other not in self.colluding and self.states[other].keys == state.keys:
                self.shares[other]["self" if other in (state.survivors or ()) else "mask"].add(name)

    def knows(self, name: str, kind: str) -> bool:
        return name in self.colluding or len(self.shares[name][kind]) >= self.states[name].threshold

    def list_masks(self, name: str) -> dict[object, int]:
        """Returns the masks of a site's vector that the coordinator does not know -> sign."""
        state = self.states[name]
        masks: dict[object, int] = {} if self.knows(name, "self") else {("self", name): 1}
        for other in set(state.senders) - {name}:
            shared = self.states[other].keys is not None and self.knows(other, "mask")
            if other not in self.colluding and not shared and not self.knows(name, "mask"):
                masks[(state.view, *sorted((name, other)))] = 1 if name < other else -1
        return masks

    def find_readable(self) -> list[list[Fraction]]:
        """Returns a basis of the combinations of masked vectors in which all unknown masks cancel."""
        senders = [name for name in self.honest if self.states[name].shares is not None]
        columns: dict[object, list[Fraction]] = defaultdict(lambda: [Fraction(0)] * len(senders))
        for place, name in enumerate(senders):
            for mask, sign in self.list_masks(name).items():
                columns[mask][place] += sign
        return solve_homogeneous(list(columns.values()), len(senders))


def solve_homogeneous(rows: list[list[Fraction]], width: int) -> list[list[Fraction]]:
    """Returns a basis of all x with row . x = 0 for each row."""
    reduced: list[list[Fraction]] = []
    pivots: list[int] = []
    for column in range(width):
        found = next((row for row in rows if row[column]), None)
        if found is None:
            continue
        rows = [row for row in rows if row is not found]
        pivot = [value / found[column] for value in found]
        rows = [[a - row[column] * b for a, b in zip(row, pivot, strict=True)] for row in rows]
        reduced = [[a - row[column] * b for a, b in zip(row, pivot, strict=True)] for row in reduced]
        reduced.append(pivot)
        pivots.append(column)
    basis = []
    for free in (column for column in range(width) if column not in pivots):
        vector = [Fraction(0)] * width
        vector[free] = Fraction(1)
        for row, pivot_column in zip(reduced, pivots, strict=True):
            vector[pivot_column] = -row[free]
        basis.append(vector)
    return basis


@st.composite
def attacks(draw: st.DrawFn) -> Attack:
    """What a coordinator may try: at each step it divides the sites into groups, and shows each its own version."""
    colluding = draw(st.integers(0, 2))
    rules = SumRules(draw(st.integers(max(3, colluding + 2), 5)), colluding)
    attack = Attack(rules, frozenset(SITES[6 - colluding :]))

    def choose_versions(*counts: int) -> dict[str, list[str]]:
        """Returns honest site -> names: all but some, or those of its group and perhaps others."""
        count = draw(st.sampled_from(counts))
        group = {name: draw(st.integers(0, count - 1)) for name in attack.honest}
        shown = []
        for number in range(count):
            others = draw(st.sets(st.sampled_from(SITES), max_size=2))
            most = count != 2 or draw(st.booleans())
            shown.append(set(SITES) - others if most else others | {name for name in group if group[name] == number})
        # Without the own name nothing is accepted.
        own = {name: {name} if count == 6 else set() for name in group}
        return {name: sorted(shown[group[name]] | attack.colluding | own[name]) for name in attack.honest}

    def attempt(act: str, name: str, *given: object) -> None:
        try:
            getattr(attack, act)(name, *given)
        except BadInput:
            return

    for name, roster in choose_versions(1, 1, 1, 2).items():
        attempt("show_keys", name, roster)
    deceived = draw(st.sampled_from(["", "", "", *attack.honest]))
    for name, senders in choose_versions(1, 1, 1, 2).items():
        attempt("show_shares", name, senders, ("cd" if name == deceived else "ab") * 32)
    for name, survivors in choose_versions(1, 2, 6).items():
        attempt("show_survivors", name, survivors)
    for name in attack.honest:
        attempt("unmask", name)
    return attack


@pytest.mark.slow
@given(attacks())
@settings(max_examples=250, deadline=None)
def test_at_most_one_sum_is_readable_and_enough_honest_sites_are_in_it(attack: Attack) -> None:
    readable = attack.find_readable()
    assert len(readable) <= 1
    for combination in readable:
        used = [value for value in combination if value]
        assert len(set(used)) == 1
        assert len(used) >= attack.rules.honest
