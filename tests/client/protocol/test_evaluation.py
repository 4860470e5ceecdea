"""Held-out units in noised statistics: bounded per unit, noised once, charged to a share, the same bytes again."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor, nn

from client.audit.attack import SilentStream
from client.data.prepare import open_units
from client.data.units import TaskRecords, Units
from client.protocol.evaluate import SUMS, evaluate, noised_sums, sum_statistics
from client.protocol.join import join
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import train
from common import messages
from common.model.backbones import Backbone
from common.model.parameters import create_heads, parameters
from common.plugins import Plugin
from common.privacy.accounting import Mechanism, compute_epsilon
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream, os_entropy
from common.tasks import SparseRows, Statistic, Task, open_task
from common.types import DeclineReason, Heads
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

ROOT = Path(__file__).resolve().parents[3]
SHARE = {"share": 0.2, "evaluations": 3}
EACH_ROUND = {"every": 1}
KINDS: dict[str, Task] = {
    "type": open_task({"kind": "classification", "labels": ["a", "b", "c"]}, "type"),
    "binary": open_task({"kind": "classification", "labels": ["no", "yes"]}, "binary"),
    "signs": open_task({"kind": "multilabel", "labels": ["x", "y", "z"]}, "signs"),
    "age": open_task({"kind": "regression", "range": [0, 100]}, "age"),
}
DIM = 5


@pytest.fixture(scope="module")
def frozen() -> Backbone:
    return backbone()


def random_label(task: Task, rng: np.random.Generator) -> Tensor:
    match task.kind:
        case "regression":
            return torch.tensor(float(rng.uniform(0, 100)))
        case "multilabel":
            return torch.from_numpy(rng.integers(-1, 2, 3))
        case _:
            return torch.tensor(int(rng.integers(0, 2)))


def random_units(rng: np.random.Generator, records: list[int], scale: float = 1.0) -> Units:
    """Units with these numbers of records; a record may lack any task's label."""
    unit_R = torch.arange(len(records)).repeat_interleave(torch.tensor(records, dtype=torch.long))
    features_RD = torch.from_numpy(scale * rng.normal(size=(len(unit_R), DIM))).float()
    tasks = {}
    for name, task in KINDS.items():
        labels = [random_label(task, rng) for _ in unit_R]
        stacked = torch.stack(labels) if labels else task.codec.missing().unsqueeze(0)[:0]
        mask_R = torch.from_numpy(rng.random(len(unit_R)) < 0.8)
        tasks[name] = TaskRecords.of(features_RD, stacked, mask_R, unit_R, len(records))
    return Units(len(records), tasks)


def without_last(units: Units) -> Units:
    last = units.num_units - 1
    tasks = {}
    for name, records in units.tasks.items():
        keep = records.unit_R < last
        tasks[name] = TaskRecords(
            records.features_RD[keep],
            records.labels[keep],
            records.mask_R[keep],
            records.unit_R[keep],
            records.weight_R[keep],
        )
    return Units(last, tasks)


def random_heads(rng: np.random.Generator) -> dict[str, nn.Module]:
    heads = {name: task.head(DIM) for name, task in KINDS.items()}
    with torch.no_grad():
        for head in heads.values():
            for parameter in head.parameters():
                parameter.copy_(torch.from_numpy(rng.normal(size=tuple(parameter.shape))))
    return heads


LATTICE = Lattice.of(math.sqrt(len(KINDS)), 5.0)


def vector(heads: dict[str, nn.Module], units: Units) -> Tensor:
    """The sums of all tasks as integers, without noise."""
    return torch.cat([sum_statistics(heads[name], KINDS[name], units.tasks[name], LATTICE) for name in sorted(KINDS)])


def unit_sums(head: nn.Module, task: Task, records: TaskRecords) -> Tensor:
    return sum_statistics(head, task, records, LATTICE) * LATTICE.spacing


def square(integers: Tensor) -> int:
    return sum(int(value) ** 2 for value in integers.tolist())


# --- sensitivity and noise -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([1.0, 1e4, 1e30])
)
def test_one_unit_more_moves_all_tasks_together_by_at_most_the_bound(
    seed: int, records: list[int], scale: float
) -> None:
    rng = np.random.default_rng(seed)
    heads, units = random_heads(rng), random_units(rng, records, scale)
    moved = vector(heads, units) - vector(heads, without_last(units))
    assert square(moved) <= int(LATTICE.bound**2), "in integers, with no tolerance"


def test_the_bound_is_reached_so_that_no_noise_is_wasted() -> None:
    rng = np.random.default_rng(0)
    heads = random_heads(rng)
    units = random_units(rng, [1])
    full = {
        name: TaskRecords.of(own.features_RD, own.labels.clamp(min=0), own.mask_R | True, own.unit_R, 1)
        for name, own in units.tasks.items()
    }
    lengths = {name: float(torch.linalg.vector_norm(unit_sums(heads[name], KINDS[name], full[name]))) for name in KINDS}
    assert all(lengths[name] == pytest.approx(1.0, rel=1e-4) for name in ("type", "binary", "signs"))
    assert 0.4 < lengths["age"] <= 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_an_absurd_record_moves_the_sums_by_no_more_and_leaves_them_finite(value: float) -> None:
    rng = np.random.default_rng(1)
    heads, units = random_heads(rng), random_units(rng, [2, 1])
    before = vector(heads, without_last(units))
    for records in units.tasks.values():
        records.features_RD[-1, :] = value
    assert square(vector(heads, units) - before) <= int(LATTICE.bound**2)


class Liar(Plugin):
    """A task whose rows are its head's outputs, which it says have length 1."""

    kind: str = "liar"

    def statistic(self, buckets: int) -> Statistic:
        del buckets

        def entries(outputs: Tensor, labels: Tensor) -> SparseRows:
            return SparseRows(torch.arange(2).expand(len(labels), 2), outputs.double())

        return Statistic(2, 1.0, entries, lambda sums: {}, {})


@pytest.mark.parametrize(
    ("row", "part"), [([3.0, 4.0], [0.6, 0.8]), ([math.nan, 1.0], [0.0, 0.0]), ([0.375, 0.5], [0.375, 0.5])]
)
def test_a_row_longer_than_its_kind_declares_is_cut_and_one_that_is_not_finite_counts_nothing(
    row: list[float], part: list[float]
) -> None:
    yes = torch.ones(1, dtype=torch.bool)
    records = TaskRecords.of(torch.tensor([row]), torch.zeros(1), yes, torch.zeros(1, dtype=torch.long), 1)
    task: Any = Liar()
    assert unit_sums(nn.Identity(), task, records).tolist() == pytest.approx(part, rel=1e-5)


def test_noise_has_the_charged_scale_in_every_statistic_and_comes_from_the_stream() -> None:
    """Also without any unit. 2/3 and 3/2 of it would be noticed."""
    rng = np.random.default_rng(2)
    heads, units = random_heads(rng), random_units(rng, [1, 2, 1])
    mechanism = Mechanism("gaussian", 5.0, 1.0, 1, math.sqrt(len(KINDS)))
    for own in (units, random_units(rng, [])):
        exact = {name: unit_sums(heads[name], KINDS[name], own.tasks[name]).numpy() for name in KINDS}
        noise = []
        for key in range(30):
            released = noised_sums(heads, KINDS, own, mechanism=mechanism, stream=NoiseStream(bytes([key]) * 32))
            noise += [released[name][SUMS] - exact[name] for name in KINDS]
        values = np.concatenate(noise) / (5.0 * math.sqrt(len(KINDS)))
        energy = float((values**2).sum())
        low, high = chi2.ppf(1e-6, len(values)), chi2.isf(1e-6, len(values))
        assert low < energy < high
        assert not low < energy * 2 / 3 < high and not low < energy * 3 / 2 < high


def test_chunks_of_records_add_up() -> None:
    rng = np.random.default_rng(3)
    task = open_task({"kind": "classification", "labels": [f"c{i}" for i in range(120)]}, "many")
    head = task.head(DIM)
    features = torch.from_numpy(rng.normal(size=(700, DIM))).float()
    labels = torch.from_numpy(rng.integers(0, 120, 700))
    records = TaskRecords.of(features, labels, torch.ones(700, dtype=torch.bool), torch.arange(700), 700)
    # 120^2 cells and as many buckets again: several chunks.
    total = unit_sums(head, task, records)
    counted = float(total[: 120**2].sum()) * math.sqrt(2)
    assert 700 * (1 - 1e-4) < counted <= 700, "norms of long rows are rounded up a little, never down"


# --- at a site -------------------------------------------------------------------------------------------------------


def heads_of(frozen: Backbone, scale: float = 0.0) -> Heads:
    tasks = {name: open_task(TASKS[name], name) for name in TASKS}
    modules = create_heads(tasks, dict.fromkeys(tasks, frozen.feature_dim), 0)
    rng = np.random.default_rng(7)
    return {
        name: {
            key: (array + scale * rng.normal(size=array.shape)).astype(np.float32)
            for key, array in parameters(module).items()
        }
        for name, module in modules.items()
    }


def ready(folder: Path, frozen: Backbone, evaluation: Any = SHARE) -> Site:
    site = Site(site_config(folder, "north", evaluation=evaluation), os_entropy)
    run = run_config(evaluation=EACH_ROUND, rounds=4)
    join(site, offered("run-1", run, frozen))
    give_backbone(site, "run-1", frozen)
    return site


def request(frozen: Backbone, round_: int = 1, scale: float = 0.0) -> messages.EvaluateRequest:
    return messages.EvaluateRequest("run-1", round_, heads_of(frozen, scale))


def test_an_evaluation_is_charged_to_the_share_and_its_reply_fits(tmp_path: Path, frozen: Backbone) -> None:
    site = ready(tmp_path, frozen)
    reply = messages.decode(evaluate(site, request(frozen)), messages.EvaluateReply)
    assert {name: reply.sums[name][SUMS].shape for name in reply.sums} == {
        "colour": (9 + 3 * 2 * 16,),
        "size": (4 + 2 * 16,),
    }
    (charge,) = site.ledger().charges()
    assert (charge.purpose, charge.committed, charge.round) == ("evaluation", True, 1)
    assert charge.mechanism.noise_multiplier == reply.noise_multiplier
    assert site.ledger().spent().spent_epsilon == compute_epsilon([charge.mechanism], 1e-5)


def test_what_is_released_is_the_true_statistics_and_the_noise(tmp_path: Path, frozen: Backbone) -> None:
    site = ready(tmp_path, frozen)
    reply = messages.decode(evaluate(site, request(frozen, scale=1.0)), messages.EvaluateReply)
    folder = site.config.state_dir / "runs" / "run-1" / "data"
    units = open_units(folder, "test", list(TASKS), torch.device("cpu"))
    tasks = {name: open_task(TASKS[name], name) for name in TASKS}
    modules = {name: task.head(frozen.feature_dim) for name, task in tasks.items()}
    for name, module in modules.items():
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(heads_of(frozen, 1.0)[name][key]))
    # With noise off, the noised path is the exact one; and the real noise is no larger than six deviations.
    mechanism = site.ledger().charges()[0].mechanism
    exact = noised_sums(modules, tasks, units, mechanism=mechanism, stream=SilentStream(bytes(32)))
    deviation = reply.noise_multiplier * math.sqrt(2)
    for name in TASKS:
        assert np.abs(reply.sums[name][SUMS] - exact[name][SUMS]).max() < 6 * deviation
        truth = unit_sums(modules[name], tasks[name], units.tasks[name]).numpy()
        np.testing.assert_allclose(exact[name][SUMS], truth, rtol=1e-6)


def test_the_identical_request_gets_identical_bytes_for_nothing(tmp_path: Path, frozen: Backbone) -> None:
    site = ready(tmp_path, frozen)
    first = messages.to_bytes(evaluate(site, request(frozen)))
    spent = site.ledger().spent()
    assert messages.to_bytes(evaluate(site, request(frozen))) == first
    assert site.ledger().spent() == spent
    other = declined(lambda: evaluate(site, request(frozen, scale=1.0)))
    assert other.reason is DeclineReason.BAD_REQUEST
    assert site.ledger().spent() == spent


def declined(call: Callable[[], object]) -> SiteDeclined:
    with pytest.raises(SiteDeclined) as caught:
        call()
    return caught.value


def test_an_evaluation_beyond_the_share_is_declined_and_training_goes_on(tmp_path: Path, frozen: Backbone) -> None:
    site = ready(tmp_path, frozen)
    for round_ in (1, 2, 3):
        evaluate(site, request(frozen, round_))
    assert declined(lambda: evaluate(site, request(frozen, 4))).reason is DeclineReason.BUDGET
    assert len(site.ledger().charges()) == 3
    train(site, messages.TrainRequest("run-1", 4, heads_of(frozen)))


def test_a_site_that_evaluates_locally_sends_nothing_and_spends_nothing(tmp_path: Path, frozen: Backbone) -> None:
    site = ready(tmp_path, frozen, evaluation="local")
    assert declined(lambda: evaluate(site, request(frozen))).reason is DeclineReason.EVALUATION_LOCAL
    assert site.ledger().charges() == []


@pytest.mark.parametrize(("round_", "asked"), [(0, {"every": 1}), (5, {"every": 1}), (1, {"every": 2}), (1, None)])
def test_a_round_that_the_run_does_not_evaluate_is_declined(
    tmp_path: Path, frozen: Backbone, round_: int, asked: Any
) -> None:
    own = Site(site_config(tmp_path, "north", evaluation=SHARE), os_entropy)
    run = run_config(rounds=4, evaluation=asked)
    join(own, offered("run-1", run, frozen))
    give_backbone(own, "run-1", frozen)
    assert declined(lambda: evaluate(own, request(frozen, round_))).reason is DeclineReason.BAD_REQUEST
    assert own.ledger().charges() == []


def test_offsets_that_are_not_those_of_the_sites_heads_are_declined_and_cost_nothing(
    tmp_path: Path, frozen: Backbone
) -> None:
    site = ready(tmp_path, frozen)
    for offsets in ({"colour": [0.0, 0.0, 0.0]}, {"evil": [0.0]}):
        asked = replace(request(frozen), offsets=offsets)
        assert declined(lambda asked=asked: evaluate(site, asked)).reason is DeclineReason.BAD_REQUEST
    assert site.ledger().charges() == []
    evaluate(site, request(frozen))


def test_a_run_that_would_eat_the_share_is_declined_at_the_door(tmp_path: Path, frozen: Backbone) -> None:
    """The same run fits a site that holds nothing for evaluations."""
    whole = {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0}
    run = run_config(privacy=whole, evaluation=EACH_ROUND)
    budget = {"epsilon": 3.0, "delta": 1e-5}
    offer = offered("run-1", run, frozen)
    holding = Site(site_config(tmp_path / "a", "north", budget=budget, evaluation=SHARE), os_entropy)
    assert declined(lambda: join(holding, offer)).reason is DeclineReason.BUDGET
    join(Site(site_config(tmp_path / "b", "north", budget=budget), os_entropy), offer)


def test_two_identical_requests_at_the_same_moment_are_one_charge(tmp_path: Path, frozen: Backbone) -> None:
    """The first one waits for its noise key until the second one has come; the second gets the first one's bytes."""
    site = ready(tmp_path, frozen)
    answers: list[bytes] = []
    second_came = threading.Event()

    def slow(purpose: str) -> bytes:
        second_came.wait(timeout=30)
        return os_entropy(purpose)

    def ask(own: Site, asked: messages.EvaluateRequest | messages.TrainRequest) -> None:
        records = evaluate(own, asked) if isinstance(asked, messages.EvaluateRequest) else train(own, asked)
        answers.append(messages.to_bytes(records))

    for asked in (request(frozen), messages.TrainRequest("run-1", 1, heads_of(frozen))):
        answers.clear()
        second_came.clear()
        first = threading.Thread(target=ask, args=(Site(site.config, slow), asked))
        first.start()
        second = threading.Thread(target=ask, args=(site, asked))
        second.start()
        second.join(timeout=1.0)  # It waits for the lock; without one it would be done with a charge of its own.
        second_came.set()
        first.join(timeout=30)
        second.join(timeout=30)
        assert len(answers) == 2 and answers[0] == answers[1]
    assert [charge.purpose for charge in site.ledger().charges()] == ["evaluation", "training"]


@pytest.mark.parametrize("damage", ["turned bit", "cut", "digest gone"])
def test_a_damaged_stored_reply_is_neither_sent_nor_made_anew(tmp_path: Path, frozen: Backbone, damage: str) -> None:
    site = ready(tmp_path, frozen)
    evaluate(site, request(frozen))
    (stored,) = (site.config.state_dir / "runs" / "run-1" / "replies").iterdir()
    data = bytearray(stored.read_bytes())
    if damage == "turned bit":
        data[len(data) // 2] ^= 1
        stored.write_bytes(data)
    elif damage == "cut":
        stored.write_bytes(data[:-1])
    else:
        (stored.parent.parent / "reply_digests").write_bytes(b"")
    for _ in range(2):
        refusal = declined(lambda: evaluate(site, request(frozen)))
        assert refusal.reason is DeclineReason.INTERNAL and "damaged" in refusal.detail
    assert len(site.ledger().charges()) == 1
    # The staff's decision: the file is removed, and the request is a new charge with new noise.
    stored.unlink()
    assert messages.to_bytes(evaluate(site, request(frozen))) != bytes(data)
    assert len(site.ledger().charges()) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from client.protocol.evaluate import evaluate
from client.protocol.site import Site
from common import messages
from common.privacy.noise import os_entropy
from tests.tiny import site_config

folder = Path(sys.argv[1])

def entropy(purpose):
    if sys.argv[2] == "reserved":
        os.kill(os.getpid(), signal.SIGKILL)
    return os_entropy(purpose)

asked = messages.decode(messages.from_bytes((folder / "request").read_bytes()), messages.EvaluateRequest)
evaluate(Site(site_config(folder, "north", evaluation={"share": 0.2, "evaluations": 3}), entropy), asked)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path: Path, frozen: Backbone) -> Iterator[Callable[[str], Site]]:
    def kill(place: str) -> Site:
        site = ready(tmp_path, frozen)
        (tmp_path / "request").write_bytes(messages.to_bytes(messages.encode(request(frozen))))
        command = [sys.executable, "-c", KILLED, str(tmp_path), place]
        assert subprocess.run(command, cwd=ROOT, timeout=120, check=False).returncode == -signal.SIGKILL
        return site

    yield kill


def test_killed_between_charge_and_evaluation_the_charge_stands(
    killed: Callable[[str], Site], frozen: Backbone
) -> None:
    site = killed("reserved")
    assert [(charge.purpose, charge.committed) for charge in site.ledger().charges()] == [("evaluation", False)]
    evaluate(site, request(frozen))
    assert [charge.committed for charge in site.ledger().charges()] == [False, True]


def test_killed_before_sending_the_same_bytes_are_sent_again(killed: Callable[[str], Site], frozen: Backbone) -> None:
    site = killed("sending")
    (stored,) = (site.config.state_dir / "runs" / "run-1" / "replies").iterdir()
    assert messages.to_bytes(evaluate(site, request(frozen))) == stored.read_bytes()
    assert [charge.committed for charge in site.ledger().charges()] == [True]


@pytest.mark.slow
def test_masks_are_looked_at_few_at_once_and_none_changes_anothers_part() -> None:
    """Statistics of all pictures at once would fill a site's memory after they were charged."""
    task = open_task({"kind": "segmentation", "labels": ["ground", "cell"], "side": 256}, "cells")
    generator = torch.Generator().manual_seed(1)
    features_RGGD = torch.randn(40, 2, 2, 3, generator=generator)
    labels = torch.randint(0, 2, (40, 256, 256), generator=generator).to(torch.uint8)
    own, head, seen = task.statistic(0), task.head(3), list[int]()

    def note(outputs: Tensor, masks: Tensor) -> SparseRows:
        seen.append(masks.numel())
        return own.entries(outputs, masks)

    def sum_some(first: int, last: int) -> Tensor:
        count = last - first
        everywhere = torch.ones(count, dtype=torch.bool)
        records = TaskRecords.of(features_RGGD[first:last], labels[first:last], everywhere, torch.arange(count), count)
        return sum_statistics(head, task, records, LATTICE, replace(own, entries=note))

    whole = sum_some(0, 40)
    assert max(seen) <= 2**22
    assert torch.equal(whole, torch.stack([sum_some(at, at + 1) for at in range(40)]).sum(0))
