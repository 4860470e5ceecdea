"""Tied heads follow from what a site released, and from nothing else."""

from __future__ import annotations

import contextlib
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.app import make_app
from client.config import SiteConfig
from client.personal.evaluate import adapt, compare, load_final_heads
from client.personal.personal_heads import load_personal_heads
from client.personal.tied import tie_heads
from client.protocol.site import Site, joined_run
from common import messages
from common.events import PERSONAL, FileJournal
from common.privacy.noise import SeededEntropy, os_entropy
from common.tasks import LabelPrior, open_task
from common.types import BadInput, DigestMismatch
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests.tiny import TASKS, backbone, run_config, site_config

PLAIN = {name: {**task, "head": {"bias": False}} for name, task in TASKS.items()}
ROUNDS, NOISE, SIZE = 4, 0.5, 40
SUMS: dict[str, Any] = {
    "tasks": PLAIN,
    "solver": {"kind": "head_sum", "clip_norm": 1.0},
    "aggregation": {"kind": "heavy_ball", "rounds": ROUNDS, "step": 2.0, "noise": NOISE},
    "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": NOISE},
    "rounds": ROUNDS,
}


def federated(folder: Path, **changes: Any) -> SiteConfig:
    """A site with `personal: tied` after a run of two sites."""
    held_out = {"test_fraction": 0.3}
    sites = [site_config(folder, name, split=held_out, personal="tied") for name in ("east", "north")]
    (folder / "run-1").mkdir()
    run_federation(
        InProcessGrid(
            make_app(lambda context: sites[int(context.node_config["partition-id"])], SeededEntropy(0)), len(sites)
        ),
        run_config(**{**SUMS, **changes}),
        {"backbone": backbone()},
        run_id="run-1",
        folder=folder / "run-1",
        journal=FileJournal(folder / "run-1" / "journal.jsonl"),
        executor="in_process",
    )
    return sites[0]


def read_updates(config: SiteConfig) -> list[dict[str, np.ndarray]]:
    paths = (config.state_dir / "runs/run-1/replies").iterdir()
    replies = [messages.decode(messages.from_bytes(path.read_bytes()), messages.TrainReply) for path in paths]
    return [{name: reply.delta.heads[name]["weight"] for name in PLAIN} for reply in replies]


def test_the_heads_are_one_step_along_the_site_s_own_noised_gradients(tmp_path: Path) -> None:
    config = federated(tmp_path)
    before = Site(config, os_entropy).ledger().lines()
    adapt(Site(config, os_entropy), "run-1")
    assert Site(config, os_entropy).ledger().lines() == before, "nothing is charged"
    folder = config.state_dir / "runs/run-1"
    kept, final, updates = load_personal_heads(folder, purpose="export"), load_final_heads(folder), read_updates(config)
    assert len(updates) == ROUNDS
    # A step whose noise adds .2 to the logit of a unit of length 1.
    step = 0.2 / (NOISE / (SIZE * math.sqrt(ROUNDS)))
    for name in PLAIN:
        expected = final[name]["weight"] + step * np.mean([each[name] for each in updates], axis=0)
        assert kept.heads[name]["weight"] == pytest.approx(expected, abs=1e-5)


def test_no_record_is_read(tmp_path: Path) -> None:
    """The site's records, features and labels are gone: the same heads follow all the same."""
    config = federated(tmp_path)
    folder = config.state_dir / "runs/run-1"
    adapt(Site(config, os_entropy), "run-1")
    first = load_personal_heads(folder, purpose="export").heads
    shutil.rmtree(folder / "data")
    shutil.rmtree(config.state_dir / "features")
    (tmp_path / "east.npz").unlink()
    adapt(Site(config, os_entropy), "run-1")
    again = load_personal_heads(folder, purpose="export").heads
    assert all(np.array_equal(first[name]["weight"], again[name]["weight"]) for name in PLAIN)


def test_the_offsets_follow_the_noised_counts_that_the_site_released(tmp_path: Path) -> None:
    """The exact counts would be a release that nobody paid for."""
    tasks = {name: {**task, "head": {"bias": False, "prior": True}} for name, task in TASKS.items()}
    config = federated(tmp_path, tasks=tasks, moments={"counts": 0.05})
    adapt(Site(config, os_entropy), "run-1")
    folder = config.state_dir / "runs/run-1"
    kept = load_personal_heads(folder, purpose="export").heads
    released = []
    for path in (folder / "replies").iterdir():
        with contextlib.suppress(BadInput):
            released.append(messages.decode(messages.from_bytes(path.read_bytes()), messages.MomentsReply))
    assert len(released) == 1
    for name in tasks:
        task = open_task(tasks[name], name)
        assert isinstance(task, LabelPrior)
        counts = released[0].sums[name]["sum"].astype(np.float64)
        expected = task.compute_offset(counts, released[0].deviations[name])
        assert kept[name]["fixed.offset"] == pytest.approx(expected, abs=1e-6)
        assert kept[name]["fixed.offset"].any(), "those of the federated heads are zero"


def test_they_stand_beside_the_others(tmp_path: Path) -> None:
    result = compare(Site(federated(tmp_path), os_entropy))
    assert result.tasks["colour"][PERSONAL]["accuracy"].value is not None


def test_updates_that_are_no_noised_gradients_get_a_sentence(tmp_path: Path) -> None:
    solver = {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}
    config = federated(tmp_path, solver=solver, aggregation={"kind": "mean"})
    with pytest.raises(BadInput, match=r"personal: tied: expected a run .* got solver dp_gd"):
        adapt(Site(config, os_entropy), "run-1")


def test_updates_that_were_private_in_their_sum_alone_get_a_sentence(tmp_path: Path) -> None:
    """In a secure sum a site's own vector has only a part of the noise: nothing computed from it may leave."""
    site = Site(federated(tmp_path), os_entropy)
    joined = joined_run(site, "run-1")
    summed = replace(joined, run=joined.run.model_copy(update={"trust": "secure_sum"}))
    final = load_final_heads(joined.folder)
    with pytest.raises(BadInput, match="sums them securely"):
        tie_heads(site, summed, joined.tasks(site.config), final)


def test_replies_that_are_gone_or_damaged_are_named(tmp_path: Path) -> None:
    config = federated(tmp_path)
    replies = config.state_dir / "runs/run-1/replies"
    one = next(replies.iterdir())
    one.write_bytes(one.read_bytes()[:-1] + b"x")
    with pytest.raises(DigestMismatch, match="damaged"):
        adapt(Site(config, os_entropy), "run-1")
    shutil.rmtree(replies)
    with pytest.raises(BadInput, match="got none"):
        adapt(Site(config, os_entropy), "run-1")
