"""A coordinator that wants the sums before the first round again, or cleaner: what it gets, and what each costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.config import SiteConfig
from client.ledger.measured import find_measured
from client.protocol.join import join
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import measure
from common import messages
from common.model.backbones import Backbone
from common.privacy.accounting import compute_epsilon
from common.privacy.noise import os_entropy
from tests.server.rounds.test_moments import MEASURED
from tests.tiny import backbone, give_backbone, offered, run_config, site_config


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def ask(config: SiteConfig, frozen: Backbone, run_id: str, noise: float = 8.0, **changes: Any) -> messages.MomentsReply:
    site = Site(config, os_entropy)
    privacy = {"unit": "example", "delta": 1e-5, "noise_multiplier": noise}
    join(site, offered(run_id, run_config(**{**MEASURED, "privacy": privacy, **changes}), frozen))
    give_backbone(site, run_id, frozen)
    return ask_again(config, run_id)


def ask_again(config: SiteConfig, run_id: str) -> messages.MomentsReply:
    answer = measure(Site(config, os_entropy), messages.MomentsRequest(run_id))
    return messages.decode(answer, messages.MomentsReply)


def count_charges(config: SiteConfig) -> int:
    return len(Site(config, os_entropy).ledger().charges())


def is_same(first: messages.MomentsReply, second: messages.MomentsReply) -> bool:
    return all(np.array_equal(first.sums[part]["sum"], second.sums[part]["sum"]) for part in first.sums)


def test_every_cleaner_release_is_charged_and_a_noisier_one_is_never_made(tmp_path: Path, frozen: Backbone) -> None:
    config = site_config(tmp_path, "north")
    noises = (30.0, 10.0, 3.0)
    replies = [ask(config, frozen, f"run-{noise:g}", noise) for noise in noises]
    assert count_charges(config) == 3 and not is_same(replies[0], replies[1])
    ledger = Site(config, os_entropy).ledger()
    charges = ledger.charges()
    # What the noise in the reply is worth is what was charged.
    for reply, charge in zip(replies, charges, strict=True):
        worth = sum(1.0 / each**2 for each in reply.deviations.values())
        assert (charge.mechanism.noise_multiplier) ** -2 == pytest.approx(worth, rel=1e-6)
    assert ledger.spent().reserved_epsilon == pytest.approx(compute_epsilon([each.mechanism for each in charges], 1e-5))
    for noise in noises:
        again = ask(config, frozen, f"later-{noise:g}", noise)
        assert is_same(again, replies[-1]) and again.deviations == replies[-1].deviations
    assert count_charges(config) == 3


def test_another_meaning_of_a_label_is_another_sum_and_the_features_are_not_paid_for_twice(
    tmp_path: Path, frozen: Backbone
) -> None:
    config = site_config(tmp_path, "north")
    first = ask(config, frozen, "run-1")
    swapped = {"small": "large", "large": "small"}
    task = config.tasks["size"].model_copy(update={"values": swapped})
    changed = config.model_copy(update={"tasks": {**config.tasks, "size": task}})
    second = ask(changed, frozen, "run-2")
    assert np.array_equal(first.sums["backbone.mean"]["sum"], second.sums["backbone.mean"]["sum"])
    assert not np.array_equal(first.sums["size"]["sum"], second.sums["size"]["sum"])
    whole, part = (each.mechanism for each in Site(changed, os_entropy).ledger().charges())
    assert part.noise_multiplier > whole.noise_multiplier and whole.sensitivity > part.sensitivity > 0.0  # type: ignore[operator]


def test_what_was_lost_is_made_anew_at_its_price_a_few_times_and_then_no_more(tmp_path: Path, frozen: Backbone) -> None:
    config = site_config(tmp_path, "north")
    first = ask(config, frozen, "run-1")
    replies = config.state_dir / "runs" / "run-1" / "replies"
    measured = Site(config, os_entropy).ledger().folder / "measured"
    # Either of the two is enough.
    kept = measured.rename(tmp_path / "measured")
    assert is_same(ask_again(config, "run-1"), first)
    kept.rename(measured)
    shutil.rmtree(replies)
    assert is_same(ask_again(config, "run-1"), first) and count_charges(config) == 1
    for number in (2, 3):
        shutil.rmtree(measured)
        shutil.rmtree(replies, ignore_errors=True)
        assert not is_same(ask_again(config, "run-1"), first)
        assert count_charges(config) == number
    shutil.rmtree(measured)
    shutil.rmtree(replies)
    with pytest.raises(SiteDeclined, match="charged 3 times already"):
        ask_again(config, "run-1")


def test_a_sum_that_was_paid_for_before_a_key_was_renamed_is_found_again(tmp_path: Path, frozen: Backbone) -> None:
    config = site_config(tmp_path, "north")
    columns = {"source": "records", "column": "size", "values": None, "missing": "refuse", "unmapped": "refuse"}
    about = {
        "counts": "size",
        "task": {"kind": "classification", "labels": ["small", "large"]},
        "columns": {**columns, "public_size": 40, "min_units": 1},
        "unit": "example",
    }
    ask(config, frozen, "run-1")
    assert find_measured(Site(config, os_entropy).ledger().folder, about) is not None
