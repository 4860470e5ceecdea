"""One site's promise: refusals spend nothing, repeats cost nothing, and no text of its own leaves."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.config import SiteConfig
from client.protocol.join import join
from client.protocol.prepare import finish, keep_part, prepare_run
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import train
from common import messages
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.privacy.noise import SeededEntropy, os_entropy
from common.serving.network import open_model
from common.tasks import open_task
from common.types import BadInput, DeclineReason, Heads, LedgerDamaged, heads_digest
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield Site(site_config(tmp_path, "north"), os_entropy)


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def offer(frozen: Backbone, **changes: Any) -> messages.JoinRequest:
    return offered("run-1", run_config(**changes), frozen)


def heads(frozen: Backbone, names: tuple[str, ...] = ("colour", "size")) -> Heads:
    tasks = {name: open_task(TASKS[name], name) for name in names}
    modules = create_heads(tasks, {name: frozen.feature_dim for name in names}, 0)
    return {name: parameters(module) for name, module in modules.items()}


def ready(site: Site, frozen: Backbone, **changes: Any) -> None:
    join(site, offer(frozen, **changes))
    give_backbone(site, "run-1", frozen)


def spent(site: Site) -> float:
    return site.ledger().spent().reserved_epsilon


def test_a_round_is_charged_and_its_reply_fits_the_request(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    reply = messages.decode(train(site, messages.TrainRequest("run-1", 1, heads(frozen))), messages.TrainReply)
    assert {
        task: {name: array.shape for name, array in params.items()} for task, params in reply.delta.heads.items()
    } == {task: {name: array.shape for name, array in params.items()} for task, params in heads(frozen).items()}
    assert spent(site) > 0


def test_an_answer_reads_its_ledger_where_somebody_touched_it_and_only_then(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    given = heads(frozen)
    train(site, messages.TrainRequest("run-1", 1, given))
    opened: list[str] = []
    watching = True

    def note(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(args[0]).endswith("ledger.jsonl") and args[1] == "r":
            opened.append(str(args[0]))

    sys.addaudithook(note)  # It cannot be removed.
    try:
        train(site, messages.TrainRequest("run-1", 2, given))
        assert not opened
        (site.ledger().folder / "ledger.jsonl").touch()
        assert len(site.ledger().charges()) == 2
    finally:
        watching = False
    assert len(opened) == 1


def test_float16_contributions_are_the_noised_ones_rounded_and_cost_the_same(tmp_path: Path, frozen: Backbone) -> None:
    """Post-processing: from the same noise the same release, rounded; the ledger cannot tell the two apart."""
    replies, charges = {}, {}
    for precision in ("float32", "float16"):
        site = Site(site_config(tmp_path, "north", state_dir=str(tmp_path / precision)), SeededEntropy(4))
        ready(site, frozen, delta_precision=precision)
        request = messages.TrainRequest("run-1", 1, heads(frozen))
        records = train(site, request)
        assert messages.to_bytes(train(site, request)) == messages.to_bytes(records)  # What is stored is what was sent.
        replies[precision] = messages.decode(records, messages.TrainReply).delta.heads
        charges[precision] = [(charge.mechanism, charge.committed) for charge in site.ledger().charges()]
    assert charges["float16"] == charges["float32"]
    for task, params in replies["float32"].items():
        for name, values in params.items():
            rounded = values.astype(np.float16).astype(np.float32)
            assert np.array_equal(replies["float16"][task][name], rounded) and not np.array_equal(values, rounded)


def test_a_repeated_request_gets_identical_bytes_and_costs_nothing(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    request = messages.TrainRequest("run-1", 1, heads(frozen))
    first = messages.to_bytes(train(site, request))
    after = spent(site)
    assert messages.to_bytes(train(site, request)) == first
    assert spent(site) == after
    # Anything else is a new charge with new noise.
    other = messages.to_bytes(train(site, messages.TrainRequest("run-1", 2, heads(frozen))))
    assert other != first
    assert spent(site) > after


def test_a_round_before_one_that_was_charged_costs_nothing_and_its_stored_reply_is_sent(
    site: Site, frozen: Backbone
) -> None:
    """The coordinator went on, and came back to a round: nobody will use a new answer to it."""
    ready(site, frozen, rounds=4)
    first = messages.TrainRequest("run-1", 1, heads(frozen))
    stored = messages.to_bytes(train(site, first))
    train(site, messages.TrainRequest("run-1", 3, heads(frozen)))
    after = site.ledger().charges()
    with pytest.raises(SiteDeclined) as caught:
        train(site, messages.TrainRequest("run-1", 2, heads(frozen)))
    assert caught.value.reason == DeclineReason.OVERTAKEN
    assert "round 3 was charged already" in caught.value.detail
    assert messages.to_bytes(train(site, first)) == stored
    assert site.ledger().charges() == after


def test_after_the_final_heads_no_round_is_charged(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    final = heads(frozen)
    finish(site, messages.FinishRequest("run-1", final, heads_digest(final)))
    with pytest.raises(SiteDeclined) as caught:
        train(site, messages.TrainRequest("run-1", 2, heads(frozen)))
    assert caught.value.reason == DeclineReason.OVERTAKEN
    assert len(site.ledger().charges()) == 1


def refused(site: Site, frozen: Backbone, **changes: Any) -> DeclineReason:
    with pytest.raises(SiteDeclined) as caught:
        join(site, offer(frozen, **changes))
    return caught.value.reason


SGD = {"kind": "sgd", "sampling_rate": 1.0, "steps": 1, "learning_rate": 1.0}
PATIENT = {"unit": "patient", "delta": 1e-5, "noise_multiplier": 2.0}
DEEP = {"size": {"kind": "regression", "range": [0, 1], "head": {"hidden": 4}}}
CLOSED = {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}
LOUD = {"unit": "example", "delta": 1e-5, "noise_multiplier": 0.01}


@pytest.mark.parametrize(
    ("site_changes", "run_changes", "reason"),
    [
        ({"allow": {"tasks": [], "backbones": "any", "solvers": "any"}}, {}, DeclineReason.TASK_NOT_ALLOWED),
        ({"allow": {"tasks": "any", "backbones": [], "solvers": "any"}}, {}, DeclineReason.BACKBONE_NOT_ALLOWED),
        ({"allow": {"tasks": "any", "backbones": "any", "solvers": []}}, {}, DeclineReason.SOLVER_NOT_ALLOWED),
        ({}, {"solver": SGD, "privacy": "non_private"}, DeclineReason.SOLVER_NOT_ALLOWED),
        ({}, {"solver": SGD}, DeclineReason.BAD_REQUEST),
        ({}, {"privacy": PATIENT}, DeclineReason.UNIT_DIFFERS),
        ({}, {"privacy": LOUD}, DeclineReason.BUDGET),
        ({}, {"rounds": 100_000}, DeclineReason.BUDGET),
        ({}, {"solver": {"kind": "dp_sgd"}}, DeclineReason.BAD_REQUEST),
        ({}, {"solver": CLOSED, "tasks": DEEP}, DeclineReason.BAD_REQUEST),
        ({}, {"solver": {"kind": "../../evil"}}, DeclineReason.BAD_REQUEST),
    ],
)
def test_a_run_that_is_not_acceptable_is_declined_and_spends_nothing(
    tmp_path: Path,
    frozen: Backbone,
    site_changes: dict[str, Any],
    run_changes: dict[str, Any],
    reason: DeclineReason,
) -> None:
    site = Site(site_config(tmp_path, "north", **site_changes), os_entropy)
    assert refused(site, frozen, **run_changes) is reason
    assert spent(site) == 0


@pytest.mark.parametrize("run_id", ["", "../run", "a/b", "a" * 200, "run\x00"])
def test_a_run_id_that_is_not_a_plain_name_is_declined(site: Site, frozen: Backbone, run_id: str) -> None:
    with pytest.raises(SiteDeclined) as caught:
        join(site, offered(run_id, run_config(), frozen))
    assert caught.value.reason is DeclineReason.BAD_REQUEST


def bad_shape(good: Heads) -> Heads:
    return {**good, "size": {name: np.zeros((7,), np.float32) for name in good["size"]}}


def not_finite(good: Heads) -> Heads:
    return {**good, "size": {name: array * np.float32("nan") for name, array in good["size"].items()}}


@pytest.mark.parametrize(
    ("change", "round_", "reason"),
    [
        (lambda good: good, 0, DeclineReason.BAD_REQUEST),
        (lambda good: good, 3, DeclineReason.BAD_REQUEST),
        (lambda good: {"size": good["size"]}, 1, DeclineReason.TASK_NOT_ALLOWED),
        (lambda good: {**good, "x": good["size"]}, 1, DeclineReason.TASK_NOT_ALLOWED),
        (bad_shape, 1, DeclineReason.BAD_REQUEST),
        (not_finite, 1, DeclineReason.BAD_REQUEST),
    ],
)
def test_a_bad_train_request_is_declined_and_spends_nothing(
    site: Site, frozen: Backbone, change: Any, round_: int, reason: DeclineReason
) -> None:
    ready(site, frozen)
    with pytest.raises(SiteDeclined) as caught:
        train(site, messages.TrainRequest("run-1", round_, change(heads(frozen))))
    assert caught.value.reason is reason
    assert spent(site) == 0


def test_training_before_preparing_is_declined_and_spends_nothing(site: Site, frozen: Backbone) -> None:
    with pytest.raises(SiteDeclined) as caught:
        train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    assert caught.value.reason is DeclineReason.UNKNOWN_RUN
    join(site, offer(frozen))
    with pytest.raises(SiteDeclined) as caught:
        train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    assert caught.value.reason is DeclineReason.NOT_PREPARED
    assert spent(site) == 0


def test_a_backbone_that_is_not_the_agreed_one_is_refused_and_not_kept(site: Site, frozen: Backbone) -> None:
    join(site, offer(frozen))
    blob = frozen.blob()
    flipped = blob.weights[:-1] + bytes([blob.weights[-1] ^ 1])
    for weights, spec in ((blob.weights, blob.spec.replace('"dim":4', '"dim":5')), (flipped, blob.spec)):
        keep_part(site, messages.PartRequest("run-1", frozen.digest, 0, 1, weights))
        with pytest.raises(SiteDeclined) as caught:
            prepare_run(site, messages.PrepareRequest("run-1", {frozen.digest: spec}))
        assert caught.value.reason is DeclineReason.BACKBONE_NOT_ALLOWED
    assert not site.backbones().has(frozen.digest)


def test_final_heads_that_differ_from_their_digest_are_refused(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    with pytest.raises(SiteDeclined):
        finish(site, messages.FinishRequest("run-1", heads(frozen), "0" * 64))
    finish(site, messages.FinishRequest("run-1", heads(frozen), heads_digest(heads(frozen))))


def test_equal_run_seeds_give_different_noise(tmp_path: Path, frozen: Backbone) -> None:
    """Two sites with the same records and the same run differ in their noise alone."""
    replies = []
    for name in ("first", "second"):
        records = site_config(tmp_path, "north").sources
        config: SiteConfig = site_config(
            tmp_path, name, sources=json.loads(json.dumps({k: v.model_dump() for k, v in records.items()}))
        )
        own = Site(config, os_entropy)
        ready(own, frozen)
        replies.append(messages.to_bytes(train(own, messages.TrainRequest("run-1", 1, heads(frozen)))))
    assert replies[0] != replies[1]


def test_a_second_offer_under_the_same_run_id_is_declined_and_an_identical_one_is_not(
    site: Site, frozen: Backbone
) -> None:
    """With other labels than the prepared ones, a round would fail or not as a record has it: an exact bit for free."""
    ready(site, frozen)
    fewer = {**TASKS, "colour": {"kind": "classification", "labels": ["red", "green"]}}
    assert refused(site, frozen, tasks=fewer) is DeclineReason.BAD_REQUEST
    assert join(site, offer(frozen)).site == "north"
    train(site, messages.TrainRequest("run-1", 1, heads(frozen)))


def test_data_prepared_for_another_offer_are_not_trained_on(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    kept = site.config.state_dir / "runs" / "run-1" / "offer.json"
    kept.write_text(kept.read_text().replace('"rounds": 2', '"rounds": 3'))
    with pytest.raises(SiteDeclined) as caught:
        train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    assert caught.value.reason is DeclineReason.NOT_PREPARED
    assert spent(site) == 0


def test_no_label_that_an_offer_names_stops_a_preparation(site: Site, frozen: Backbone) -> None:
    """Else a coordinator could bisect a label's values with one free question after another."""
    assert site.config.on_bad_record == "stop"
    fewer = {**TASKS, "colour": {"kind": "classification", "labels": ["red", "green"]}}
    for name, tasks in (("run-1", fewer), ("run-2", TASKS)):
        join(site, offered(name, run_config(tasks=tasks), frozen))
        give_backbone(site, name, frozen)


def test_a_run_of_absurdly_many_steps_is_declined_however_loud_its_noise(site: Site, frozen: Backbone) -> None:
    solver = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 10**9, "clip_norm": 1.0, "learning_rate": 1.0}
    loud = {"unit": "example", "delta": 1e-5, "noise_multiplier": 1e9}
    assert refused(site, frozen, solver=solver, privacy=loud) is DeclineReason.BAD_REQUEST


def test_a_round_is_refused_by_the_largest_declared_size_and_the_steps_before_anything_is_charged(
    tmp_path: Path, frozen: Backbone
) -> None:
    """With much noise steps are nearly free, and many of them make one unit's part of the time measurable."""
    sizes = {name: {"source": "records", "label": name, "missing": "refuse", "public_size": 10**7} for name in TASKS}
    budget = {"epsilon": 100.0, "delta": 1e-8}
    large = Site(site_config(tmp_path, "large", tasks=sizes, budget=budget), os_entropy)
    faint = {"unit": "example", "delta": 1e-8, "noise_multiplier": 1e5}
    solver = {"kind": "dp_sgd", "sampling_rate": 0.01, "steps": 1000, "clip_norm": 1.0, "learning_rate": 1.0}
    with pytest.raises(SiteDeclined, match=r"a round draws 10000025000 random numbers, expected at most 8589934592"):
        join(large, offer(frozen, solver=solver, privacy=faint))
    with pytest.raises(SiteDeclined, match=r"a round has 1001 steps, expected at most 1000; take more rounds"):
        join(large, offer(frozen, solver={**solver, "steps": 1001}, privacy=faint))
    join(large, offer(frozen, solver={**solver, "steps": 100}, privacy=faint))


def test_a_run_whose_delta_is_large_for_the_declared_sizes_is_declined(site: Site, frozen: Backbone) -> None:
    """The noise of such a run would be computed for a promise that a unit may well fall out of."""
    asked = {"unit": "example", "delta": 1 / 400, "noise_multiplier": 9.0}
    join(site, offer(frozen, privacy=asked))
    assert refused(site, frozen, privacy={**asked, "delta": 1 / 399}) is DeclineReason.BAD_REQUEST


def test_another_registry_at_a_site_that_has_answered_is_no_fresh_budget(
    tmp_path: Path, site: Site, frozen: Backbone
) -> None:
    ready(site, frozen)
    train(site, messages.TrainRequest("run-1", 1, heads(frozen)))
    renamed = Site(site_config(tmp_path, "north", registry="another"), os_entropy)
    with pytest.raises(LedgerDamaged, match="missing in .* a site that has answered"):
        renamed.ledger()


def test_temperatures_of_other_tasks_are_refused(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    final = heads(frozen)
    with pytest.raises(SiteDeclined, match="temperatures"):
        finish(site, messages.FinishRequest("run-1", final, heads_digest(final), {"evil": 2.0}))
    finish(site, messages.FinishRequest("run-1", final, heads_digest(final), {"size": 2.0}))


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_a_temperature_that_makes_outputs_no_numbers_is_refused(
    site: Site, frozen: Backbone, temperature: float
) -> None:
    ready(site, frozen)
    final = heads(frozen)
    with pytest.raises(SiteDeclined, match="temperature"):
        finish(site, messages.FinishRequest("run-1", final, heads_digest(final), {"size": temperature}))
    assert not (site.config.state_dir / "runs" / "run-1" / "final_heads.bin").exists()


def test_final_heads_are_kept_where_staff_removed_the_backbone(site: Site, frozen: Backbone) -> None:
    ready(site, frozen)
    site.backbones().locate_weights(frozen.digest).unlink()
    final = heads(frozen)
    finish(site, messages.FinishRequest("run-1", final, heads_digest(final)))
    run = site.config.state_dir / "runs" / "run-1"
    assert (run / "final_heads.bin").exists()
    with pytest.raises(BadInput, match="expected the weights of backbone backbone"):
        open_model(run / "model")


def test_a_model_on_another_disk_than_the_backbone_is_a_private_copy(
    site: Site, frozen: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(site, frozen)
    monkeypatch.setattr(os, "link", refuse_link)
    final = heads(frozen)
    finish(site, messages.FinishRequest("run-1", final, heads_digest(final)))
    (copy,) = site.config.state_dir.glob("runs/run-1/model/backbones/*")
    assert copy.read_bytes() == site.backbones().locate_weights(frozen.digest).read_bytes()
    assert copy.stat().st_mode & 0o077 == 0


def refuse_link(*paths: object) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("change", [not_finite, bad_shape, lambda good: {**good, "evil": good["size"]}])
def test_final_heads_that_do_not_fit_are_refused(site: Site, frozen: Backbone, change: Any) -> None:
    ready(site, frozen)
    wrong = change(heads(frozen))
    with pytest.raises(SiteDeclined):
        finish(site, messages.FinishRequest("run-1", wrong, heads_digest(wrong)))
    assert not (site.config.state_dir / "runs" / "run-1" / "final_heads.bin").exists()
