"""What a site executes for a release follows from how many units and records there are, not from what one unit holds.

Two things are compared between sites that differ in one unit's values: every executed line of the code that computes a
release, and every operation that torch is asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from client.data.units import TaskRecords, Units
from client.protocol.evaluate import noised_sums
from client.solvers import open_solver
from common.privacy.accounting import Mechanism
from common.privacy.noise import NoiseStream
from common.process.threads import steady_time
from common.tasks import open_task
from common.types import Plan, Unit

ROOT = Path(__file__).resolve().parents[3]
TASKS = {
    "age": open_task({"kind": "regression", "range": [0, 100]}, "age"),
    "death": open_task({"kind": "survival", "boundaries": [10, 20, 40]}, "death"),
    "finding": open_task({"kind": "classification", "labels": ["tumour", "edema", "none"]}, "finding"),
    "odd": open_task({"kind": "anomaly", "normal": "none", "anomalous": "edema"}, "odd"),
    "signs": open_task({"kind": "multilabel", "labels": ["fever", "cough"]}, "signs"),
    "voice": open_task({"kind": "embedding", "labels": ["ann", "bob"], "unseen": ["cem"]}, "voice"),
}
CELLS = {
    "age": ["50"],
    "death": ["15", "1"],
    "finding": ["edema"],
    "odd": ["none"],
    "signs": ["fever"],
    "voice": ["ann"],
}
DIM = 6
RECORDS = 24

Change = Callable[[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]], object]


@dataclass
class Watch(TorchDispatchMode):
    """Notes torch's operations, and the lines of our own that are executed in this thread.

    Attributes:
        operations: their names, each with the shapes it was given.
        lines: files and line numbers, in order.
    """

    operations: list[tuple[str, str]] = field(default_factory=list)
    lines: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        self.operations.append((str(func), str(shapes)))
        return func(*args, **(kwargs or {}))

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """As `sys.settrace` wants it."""
        file = frame.f_code.co_filename
        if not file.startswith((f"{ROOT}/client/", f"{ROOT}/common/")):
            return None
        if event == "line":
            self.lines.append((file, frame.f_lineno))
        return self.trace


def watch(release: str, change: Change) -> Watch:
    units, compute = make_units(change), RELEASES[release]
    compute(units)  # What is computed once a process is done now.
    found = Watch()
    before = sys.gettrace()
    sys.settrace(found.trace)
    try:
        with found:
            compute(units)
    finally:
        sys.settrace(before)
    return found


def make_units(change: Change) -> Units:
    """Two records for each unit, beside one another but for the last unit's; `change` may change one unit's."""
    rng = np.random.default_rng(0)
    features_RD = torch.from_numpy(rng.normal(size=(RECORDS, DIM)).astype(np.float32))
    labels = {name: torch.stack([task.codec.encode(CELLS[name])] * RECORDS) for name, task in TASKS.items()}
    masks = {name: torch.ones(RECORDS, dtype=torch.bool) for name in TASKS}
    unit_R = torch.arange(RECORDS) // 2
    change(features_RD[6:8], {name: each[6:8] for name, each in labels.items()}, {n: m[6:8] for n, m in masks.items()})
    records = {name: TaskRecords.of(features_RD, labels[name], masks[name], unit_R, RECORDS // 2) for name in TASKS}
    return Units(RECORDS // 2, records)


def solve(kind: str, units: Units) -> object:
    settings = {"kind": kind, "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 0.5}
    return open_solver(settings, "solver").solve(
        heads(),
        TASKS,
        units,
        plan=Plan(1.0, 2, 1.0, 2.0, Unit.PATIENT),
        public_sizes=dict.fromkeys(TASKS, 10),
        stream=NoiseStream(bytes(32)),
    )


def evaluate(units: Units) -> object:
    mechanism = Mechanism("gaussian", 2.0, 1.0, 1, math.sqrt(len(TASKS)))
    return noised_sums(heads(), TASKS, units, mechanism=mechanism, stream=NoiseStream(bytes(32)))


def heads() -> dict[str, torch.nn.Module]:
    generator = torch.Generator().manual_seed(0)
    made = {name: task.head(DIM) for name, task in TASKS.items()}
    for head in made.values():
        for parameter in head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


RELEASES: dict[str, Callable[[Units], object]] = {
    "dp_gd": lambda units: solve("dp_gd", units),
    "dp_sgd": lambda units: solve("dp_sgd", units),
    "evaluation": evaluate,
}
VALUES: dict[str, Change] = {
    "zeros": lambda features, labels, masks: features.zero_(),
    "huge": lambda features, labels, masks: features.fill_(1e18),
    "denormal": lambda features, labels, masks: features.fill_(1e-42),
    "opposite": lambda features, labels, masks: features[0].copy_(-features[1]),
    "other labels": lambda features, labels, masks: [labels[name].zero_() for name in labels],
}
UNUSABLE: dict[str, Change] = {
    "not a number": lambda features, labels, masks: features[0].fill_(math.nan),
    "infinite": lambda features, labels, masks: features.fill_(math.inf),
    "one label missing": lambda features, labels, masks: masks["finding"][0].fill_(False),
    "no labels": lambda features, labels, masks: [mask.fill_(False) for mask in masks.values()],
}


@pytest.mark.parametrize("release", RELEASES)
def test_one_units_values_change_no_line_no_operation_and_no_shape(release: str) -> None:
    plain = watch(release, lambda *_: None)
    assert len(plain.lines) > 50
    assert len(plain.operations) > 50
    for name, change in VALUES.items():
        other = watch(release, change)
        assert other.lines == plain.lines, name
        assert other.operations == plain.operations, name


@pytest.mark.parametrize("release", RELEASES)
def test_a_record_that_cannot_be_used_changes_only_how_many_there_are(release: str) -> None:
    plain = watch(release, lambda *_: None)
    for name, change in UNUSABLE.items():
        other = watch(release, change)
        assert other.lines == plain.lines, name
        assert [each[0] for each in other.operations] == [each[0] for each in plain.operations], name


def test_denormal_numbers_are_zero_while_a_release_is_computed() -> None:
    tiny = torch.tensor([1e-42])
    with steady_time():
        assert (tiny * 1.0).double().item() == 0.0
    assert (tiny * 1.0).double().item() > 0.0
