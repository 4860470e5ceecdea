"""One private step of a linear head beside a non-private one, Opacus' hooks and Opacus' ghost clipping.

    python -m benchmarks.heads

The non-private reference is the least work there is: logits, softmax minus labels, one product, one update. A step is
a sixteenth of a round of sixteen, so that what a round does once is in it, noise included.

# Shapes: B examples, D features, K classes.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.measure import Work, seconds_of, stated
from client.data.units import TaskRecords, Units
from client.solvers import open_solver
from common.privacy.compiled import SWITCH, open_library
from common.privacy.noise import NoiseStream
from common.process.threads import one_thread
from common.tasks import Task, open_task
from common.types import Plan, Unit

compare = partial(measure.compare, clock=time.process_time)
"""In seconds of the processor: what else runs on a machine counts less."""

STEPS, RATE = 16, 0.5
SHAPES = [(B, D, K) for B in (128, 512, 1024) for D, K in ((576, 2), (576, 10), (1280, 100))]


def labelled(B: int, D: int, K: int) -> tuple[Tensor, Tensor]:
    """Random features and classes."""
    generator = torch.Generator().manual_seed(B + D + K)
    return torch.randn(B, D, generator=generator), torch.randint(0, K, (B,), generator=generator)


def units_of(features_BD: Tensor, labels: Tensor, records: int = 1) -> Units:
    """One unit for every few records."""
    count = len(features_BD)
    unit_R = torch.arange(count) // records
    number = int(unit_R[-1]) + 1
    mask = torch.ones(count, dtype=torch.bool)
    return Units(number, {"task": TaskRecords.of(features_BD, labels, mask, unit_R, number)})


def private(units: Units, tasks: dict[str, Task], heads: dict[str, nn.Module], kind: str = "dp_gd") -> Work:
    """A round of a private solver, its noise from a new stream."""
    spec = {"kind": kind, "sampling_rate": 1.0, "steps": STEPS, "clip_norm": 1.0, "learning_rate": RATE}
    solver = open_solver(spec, "solver")
    plan = Plan(1.0, STEPS, 1.0, 1.0, Unit.EXAMPLE)
    sizes = dict.fromkeys(tasks, units.num_units)
    return lambda: solver.solve(heads, tasks, units, plan=plan, public_sizes=sizes, stream=NoiseStream(bytes(32)))


def plain(work: Work) -> Work:
    """Returns the work as it runs without compiled code."""

    def run() -> object:
        os.environ[SWITCH] = "0"
        open_library.cache_clear()
        try:
            return work()
        finally:
            del os.environ[SWITCH]
            open_library.cache_clear()

    return run


def closed_form(features_BD: Tensor, labels: Tensor, K: int) -> Work:
    """Non-private gradient descent on softmax regression without autograd."""
    B, D = features_BD.shape
    onehot_BK = nn.functional.one_hot(labels, K).float()

    def work() -> Tensor:
        weight_KD, bias_K = torch.zeros(K, D), torch.zeros(K)
        with torch.no_grad():
            for _ in range(STEPS):
                delta_BK = torch.softmax(torch.addmm(bias_K, features_BD, weight_KD.T), 1).sub_(onehot_BK)
                weight_KD.addmm_(delta_BK.T, features_BD, alpha=-RATE / B)
                bias_K.sub_(delta_BK.sum(dim=0), alpha=RATE / B)
        return weight_KD

    return work


def opacus(features_BD: Tensor, labels: Tensor, K: int, mode: str) -> Work:
    """The ordinary way with Opacus' engine, full batch: hooks, or ghost clipping."""
    head = nn.Linear(features_BD.shape[1], K)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features_BD, labels), len(labels))
    sgd, criterion = torch.optim.SGD(head.parameters(), lr=RATE), nn.CrossEntropyLoss()
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False, "grad_sample_mode": mode}
    if mode == "ghost":
        module, optimizer, criterion, _ = PrivacyEngine().make_private(
            module=head, optimizer=sgd, criterion=criterion, data_loader=data, **settings
        )
    else:
        module, optimizer, _ = PrivacyEngine().make_private(module=head, optimizer=sgd, data_loader=data, **settings)

    def work() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            criterion(module(features_BD), labels).backward()
            optimizer.step()

    return work


def main() -> None:
    """Every shape against the non-private step; one shape against Opacus; patients and joint tasks."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for B, D, K in SHAPES:
            x, y = labelled(B, D, K)
            task = open_task({"kind": "classification", "labels": [str(k) for k in range(K)]}, "task")
            step = private(units_of(x, y), {"task": task}, {"task": task.head(D)})
            name = f"private step / non-private closed form, B {B} D {D} K {K}"
            target = 0.7 if K <= 10 else 1.3
            compare(name, step, closed_form(x, y, K), target=target, repeats=15, note="16 steps each; one thread")
            compare(f"compiled / torch's operations, B {B} D {D} K {K}", step, plain(step), target=1.0, repeats=5)
        against_opacus(512, 576, 10)
        joint(512, 576, 10)
        noise(2**17)


def against_opacus(B: int, D: int, K: int) -> None:
    """Hooks at least 6 times slower, ghost 3 times."""
    x, y = labelled(B, D, K)
    task = open_task({"kind": "classification", "labels": [str(k) for k in range(K)]}, "task")
    step = private(units_of(x, y), {"task": task}, {"task": task.head(D)})
    for mode, target in (("hooks", 1 / 6), ("ghost", 1 / 3)):
        name = f"private step / Opacus {mode}, B {B} D {D} K {K}"
        compare(name, step, opacus(x, y, K, mode), target=round(target, 4), repeats=9, note="16 steps each")


def joint(B: int, D: int, K: int) -> None:
    """Three tasks on one input, a third of the labels missing, and patients of four records."""
    x, y = labelled(B, D, K)
    names = ["a", "b", "c"]
    task = open_task({"kind": "classification", "labels": [str(k) for k in range(K)]}, "task")
    whole = units_of(x, y).tasks["task"]
    missing = {name: replace(whole, mask_R=torch.arange(B) % 3 != number) for number, name in enumerate(names)}
    heads = {name: task.head(D) for name in names}
    three = private(Units(B, missing), dict.fromkeys(names, task), heads)
    one = private(units_of(x, y), {"task": task}, {"task": heads["a"]})
    twice = private(units_of(x.repeat(2, 1), y.repeat(2)), {"task": task}, {"task": heads["a"]})
    name = f"private step, 3 tasks, a third of the labels missing / one task of as many records, B {B} D {D} K {K}"
    compare(name, three, twice, target=1.5, repeats=9, note="16 steps each")
    parts = [closed_form(x[part.mask_R], y[part.mask_R], K) for part in missing.values()]
    name = f"private step / non-private closed form, 3 tasks, a third of the labels missing, B {B} D {D} K {K}"
    compare(name, three, lambda: [part() for part in parts], target=1.3, repeats=9, note="16 steps each")
    patients = private(units_of(x, y, 4), {"task": task}, {"task": heads["a"]})
    name = f"private step / non-private closed form, patients of 4 records, B {B} D {D} K {K}"
    compare(name, patients, closed_form(x, y, K), target=1.3, repeats=9, note="16 steps each")
    name = f"private step, patients of 4 records / one record each, B {B} D {D} K {K}"
    compare(name, patients, one, target=1.5, repeats=9, note="16 steps each")


def noise(count: int) -> None:
    """Nanoseconds of a value."""
    stream = NoiseStream(bytes(32))
    seconds = median(seconds_of(lambda: stream.rounded_gaussian(count, 42), time.process_time) for _ in range(30))
    name = f"a value of noise / 3.5 ns, {count:,} values"
    stated(name, seconds / count * 1e9, 3.5, target=1.0, repeats=30, note="nanoseconds")


if __name__ == "__main__":
    main()
