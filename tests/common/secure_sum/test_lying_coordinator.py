"""A coordinator that lies: each site refuses, and nothing more of its vector is revealed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.secure_sum.attempt import (
    Member,
    SiteAttempt,
    accept_keys,
    accept_shares,
    accept_survivors,
    make_keys,
    make_shares,
    mask_vector,
    reveal_shares,
    sign_survivors,
)
from common.secure_sum.identity import format_public_key
from common.secure_sum.masks import SignedKeys
from common.secure_sum.terms import SumTerms, hash_terms
from common.secure_sum.unmasking import select_shares
from common.types import BadInput
from tests.common.secure_sum.members import HEADS, Group, add_modulo, draw_values, make_members, make_terms

SITES = [f"site-{i:02d}" for i in range(5)]


def advance(step: str, *, colluding: int = 0) -> Group:
    """Returns five sites of one attempt, honest up to a step."""
    group = Group(make_members(5), make_terms(3, colluding))
    group.advertise()
    for name, act in {
        "share": group.share,
        "mask": lambda: group.mask(draw_values(SITES)),
        "confirm": group.confirm,
    }.items():
        if name == step:
            break
        act()
    return group


def test_an_invented_site_is_refused() -> None:
    group = advance("share")
    stranger = Ed25519PrivateKey.generate()
    member = Member("site-99", stranger, {"site-99": format_public_key(stranger)})
    keys = {**group.keys, "site-99": make_keys(member, SiteAttempt(group.terms, "site-99", b"s" * 32))}
    with pytest.raises(BadInput, match="not in the roster"):
        accept_keys(group.members["site-00"], group.states["site-00"], keys)


def test_keys_that_a_site_did_not_sign_are_refused() -> None:
    group = advance("share")
    forged = make_keys(group.members["site-02"], SiteAttempt(group.terms, "site-01", b"s" * 32))
    with pytest.raises(BadInput, match="not signed"):
        accept_keys(group.members["site-00"], group.states["site-00"], {**group.keys, "site-01": forged})


@pytest.mark.parametrize(
    "terms", [make_terms(round_=2), make_terms(attempt=2), make_terms(4), make_terms(3, 1)], ids=str
)
def test_keys_of_another_round_attempt_or_rule_are_refused(terms: SumTerms) -> None:
    """A replayed round, and sites whose files state other rules."""
    group = advance("share")
    other = replace(group.states["site-01"], terms=terms)
    keys = {**group.keys, "site-01": make_keys(group.members["site-01"], other)}
    with pytest.raises(BadInput, match="not signed for this attempt"):
        accept_keys(group.members["site-00"], group.states["site-00"], keys)


def test_a_site_whose_own_keys_were_exchanged_refuses() -> None:
    group = advance("share")
    own = make_keys(group.members["site-00"], SiteAttempt(group.terms, "site-00", b"s" * 32))
    for keys in ({**group.keys, "site-00": own}, {name: group.keys[name] for name in SITES[1:]}):
        with pytest.raises(BadInput, match="own keys"):
            accept_keys(group.members["site-00"], group.states["site-00"], keys)


def test_a_site_that_took_another_ones_public_key_is_refused() -> None:
    group = advance("share")
    taken = SignedKeys.parse(group.keys["site-02"])
    mallory = group.members["site-01"]
    message = hash_terms(group.terms, "keys", "site-01", taken.mask_key.hex(), taken.share_key.hex())
    copied = SignedKeys(taken.mask_key, taken.share_key, mallory.identity.sign(message)).format()
    with pytest.raises(BadInput, match="one twice"):
        accept_keys(group.members["site-00"], group.states["site-00"], {**group.keys, "site-01": copied})


@pytest.mark.parametrize("point", [0, 1, 2**255 - 20, 2**255 - 19], ids=hex)
@pytest.mark.parametrize("place", ["mask_key", "share_key"])
def test_a_key_with_which_every_key_agrees_on_zero_is_refused_before_anything_is_charged(
    place: str, point: int
) -> None:
    """Points of low order (RFC 7748, section 7): signed by a site that colludes, they would end every attempt."""
    group = advance("share")
    honest = SignedKeys.parse(group.keys["site-01"])
    chosen = replace(honest, **{place: point.to_bytes(32, "little")})
    message = hash_terms(group.terms, "keys", "site-01", chosen.mask_key.hex(), chosen.share_key.hex())
    signed = replace(chosen, signature=group.members["site-01"].identity.sign(message)).format()
    with pytest.raises(BadInput, match="X25519"):
        accept_keys(group.members["site-00"], group.states["site-00"], {**group.keys, "site-01": signed})


def test_too_few_sites_are_refused_at_every_step() -> None:
    group = advance("share")
    few = {name: group.keys[name] for name in SITES[:2]}
    with pytest.raises(BadInput, match="keys of 3 to"):
        accept_keys(group.members["site-00"], group.states["site-00"], few)
    group.share()
    with pytest.raises(BadInput, match="shares of at least 3"):
        accept_shares(group.states["site-00"], select_shares({"site-01": group.encrypted["site-01"]}, "site-00"), HEADS)
    group.mask(draw_values(SITES))
    with pytest.raises(BadInput, match="at least 3 survivors"):
        accept_survivors(group.states["site-00"], SITES[:2])


def test_the_threshold_grows_with_the_sites_that_may_collude() -> None:
    group = advance("confirm", colluding=1)
    with pytest.raises(BadInput, match="at least 4 survivors"):
        accept_survivors(group.states["site-00"], SITES[:3])


def test_a_second_list_of_keys_is_refused() -> None:
    group = advance("mask")
    again = accept_keys(group.members["site-00"], group.states["site-00"], group.keys)
    assert again == group.states["site-00"]
    assert make_shares(again) == group.encrypted["site-00"]
    with pytest.raises(BadInput, match="second list of keys"):
        accept_keys(group.members["site-00"], group.states["site-00"], {name: group.keys[name] for name in SITES[:4]})


def test_a_second_list_of_shares_or_other_parameters_are_refused() -> None:
    group = advance("confirm")
    state, inbox = group.states["site-00"], select_shares(group.encrypted, "site-00")
    again = accept_shares(state, inbox, HEADS)
    assert mask_vector(again, draw_values(SITES)["site-00"]) == group.masked["site-00"]
    for shares, heads in ((inbox, "cd" * 32), ({name: inbox[name] for name in SITES[1:4]}, HEADS)):
        with pytest.raises(BadInput, match="second list of shares"):
            accept_shares(state, shares, heads)


def test_shares_that_were_changed_or_meant_for_another_site_are_refused() -> None:
    group = advance("mask")
    inbox = select_shares(group.encrypted, "site-00")
    changed = f"{(int(inbox['site-01'], 16) ^ 1):0{len(inbox['site-01'])}x}"
    meant_for_another = group.encrypted["site-01"]["site-02"]
    for share in (changed, meant_for_another, inbox["site-02"], ""):
        with pytest.raises(BadInput, match="expected a share"):
            accept_shares(group.states["site-00"], {**inbox, "site-01": share}, HEADS)
    for extra in ("site-00", "site-77"):
        with pytest.raises(BadInput, match="another site"):
            accept_shares(group.states["site-00"], {**inbox, extra: inbox["site-01"]}, HEADS)


def test_other_parameters_for_one_site_do_not_cancel() -> None:
    """Masks are bound to the parameters that were sent: a coordinator that sends one site others learns nothing."""
    group = advance("mask")
    values = draw_values(SITES)
    for name in SITES:
        heads = "cd" * 32 if name == "site-00" else HEADS
        group.states[name] = accept_shares(group.states[name], select_shares(group.encrypted, name), heads)
        group.masked[name] = mask_vector(group.states[name], values[name])
    group.confirm()
    # Four sites signed one view, one another: those four go on, the one with other parameters does not.
    with pytest.raises(BadInput, match="got 1"):
        reveal_shares(group.members["site-00"], group.states["site-00"], group.signatures)
    for name in SITES[1:]:
        group.revealed[name] = reveal_shares(group.members[name], group.states[name], group.signatures)
    assert group.unmask().tolist() != add_modulo(list(values.values()))


def test_a_second_list_of_survivors_is_refused() -> None:
    group = advance("confirm")
    group.confirm(without=SITES[3:])
    again = accept_survivors(group.states["site-00"], [*reversed(SITES)])
    assert sign_survivors(group.members["site-00"], again) == group.signatures["site-00"]
    with pytest.raises(BadInput, match="second list of survivors"):
        accept_survivors(group.states["site-00"], SITES[:4])


def test_a_list_without_this_site_or_with_sites_that_sent_no_shares_is_refused() -> None:
    group = advance("share")
    group.share(without=["site-04"])
    group.mask(draw_values(SITES))
    for survivors in (SITES[1:4], SITES, [*SITES[:4], "site-77"]):
        with pytest.raises(BadInput, match="list of survivors with this site"):
            accept_survivors(group.states["site-00"], survivors)


def test_shares_are_revealed_only_once_enough_survivors_have_signed_this_very_list() -> None:
    group = advance("confirm")
    state = group.states["site-00"]
    with pytest.raises(BadInput, match="list of survivors first"):
        reveal_shares(group.members["site-00"], state, {})
    for name in SITES:
        # The coordinator showed the others a shorter list.
        listed = SITES if name == "site-00" else SITES[:4] if name != "site-04" else SITES
        group.states[name] = accept_survivors(group.states[name], listed)
        group.signatures[name] = sign_survivors(group.members[name], group.states[name])
    with pytest.raises(BadInput, match="signatures of at least 3 survivors.*got 2"):
        reveal_shares(group.members["site-00"], group.states["site-00"], group.signatures)


def test_signatures_of_others_or_of_nobody_do_not_count() -> None:
    group = advance("confirm")
    group.confirm()
    own = {name: group.signatures["site-00"] for name in SITES}
    for signatures in (own, {}, dict.fromkeys(SITES, ""), {f"site-{i}": "00" * 64 for i in range(70, 90)}):
        with pytest.raises(BadInput, match="signatures of at least 3"):
            reveal_shares(group.members["site-00"], group.states["site-00"], signatures)


def test_the_signature_of_a_site_that_is_no_survivor_does_not_count() -> None:
    """A colluding site whose vector is not in the sum signs the list all the same."""
    group = advance("mask")
    group.mask(draw_values(SITES), without=["site-04"])
    group.confirm(without=["site-02", "site-03"])
    signature = sign_survivors(group.members["site-04"], group.states["site-00"])
    signatures = {**group.signatures, "site-04": signature}
    with pytest.raises(BadInput, match="got 2"):
        reveal_shares(group.members["site-00"], group.states["site-00"], signatures)


def test_a_site_that_left_the_roster_in_the_middle_does_not_count() -> None:
    group = advance("reveal")
    member = group.members["site-00"]
    left = replace(member, roster={name: member.roster[name] for name in SITES[:3]})
    assert set(reveal_shares(left, group.states["site-00"], group.signatures)) == set(SITES)
    left = replace(member, roster={name: member.roster[name] for name in SITES[:2]})
    with pytest.raises(BadInput, match="got 2"):
        reveal_shares(left, group.states["site-00"], group.signatures)


def test_a_site_reveals_one_secret_of_each_other_site_and_never_both() -> None:
    """Both shares of one site are never given: whatever is asked a second time gets the same answer."""
    group = advance("mask")
    group.mask(draw_values(SITES), without=["site-04"])
    group.confirm()
    state = group.states["site-00"]
    revealed = reveal_shares(group.members["site-00"], state, group.signatures)
    assert reveal_shares(group.members["site-00"], state, dict(reversed(group.signatures.items()))) == revealed
    assert set(revealed) == set(SITES)
    with pytest.raises(BadInput, match="second list"):
        accept_survivors(state, SITES[:3])


def test_a_site_that_was_killed_goes_on_with_the_same_keys() -> None:
    """Between any two steps: what it wrote to its disk says all that it needs."""
    group = advance("share")
    values = draw_values(SITES)
    for act in (group.share, lambda: group.mask(values), group.confirm, group.reveal):
        group.states = {name: SiteAttempt.from_bytes(state.to_bytes()) for name, state in group.states.items()}
        act()
    assert group.unmask().tolist() == add_modulo(list(values.values()))


def test_what_is_shown_of_a_state_holds_no_secret() -> None:
    """A log or a debugger shows values."""
    state = advance("share").states["site-00"]
    shown = repr(state)
    assert "site-00" in shown
    for secret in (state.seed, state.mask_secret, state.self_secret):
        assert secret.hex() not in shown and repr(secret)[2:-1] not in shown


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"terms": 3}'])
def test_a_damaged_state_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="state of a secure sum"):
        SiteAttempt.from_bytes(data)


def test_steps_out_of_order_are_refused() -> None:
    group = advance("share")
    state = group.states["site-00"]
    for ask in (lambda: make_shares(state), lambda: accept_shares(state, {}, HEADS)):
        with pytest.raises(BadInput, match="keys of all sites first"):
            ask()
    group.share()
    with pytest.raises(BadInput, match="shares of the other sites first"):
        accept_survivors(group.states["site-00"], SITES)


@pytest.mark.parametrize("text", ["", "zz" * 128, "ab" * 127, "ab" * 129])
def test_keys_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="expected keys|expected two keys"):
        SignedKeys.parse(text)
