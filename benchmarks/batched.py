"""Rounds of many sites as rows of arrays, beside the same sites one after the other, Flower's engine and pfl-research.

    pip install --no-deps --target FOLDER pfl==0.6.0 'prv-accountant<0.3' 'multiprocess<0.71' dill
    python -m benchmarks.batched [FOLDER]

Sites have 40 records of 64 features, a linear head of two classes, two private local steps and noise of their own.
Timed is the processor's time of a whole round: charges, training, checks, messages of two sites, aggregation, journal
and checkpoint. pfl trains the same head on as many records in two local steps with its local Gaussian mechanism;
without FOLDER its rows are left out. Flower's clients do nothing; beside them it is the time that passes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.measure import stated
from benchmarks.sites import RECORDS, seconds_of_engine, simulation
from common.files import without_flushing
from common.model.backbones import open_backbones
from common.privacy.noise import SeededEntropy
from server.rounds.loop import run_federation
from simulations.check import check_simulation
from simulations.config import Executor
from simulations.executors.batched import BatchedSites
from simulations.executors.gathered import build_for_executor
from simulations.executors.in_process import InProcessGrid
from simulations.executors.ray_shards import open_on_ray
from simulations.executors.shard import Shard
from simulations.experiment import run
from simulations.federate import Experiment, open_batched, open_on

ROUNDS, TURNS, MANY_ROUNDS = 8, 2, 1000
NOTE = f"{RECORDS} records x 64, 2 steps; seconds of the processor"

PFL = """
import json, sys, time
from itertools import cycle
import numpy as np, torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism

sites, rounds, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
rng = np.random.default_rng(0)
x = torch.tensor(rng.normal(size=(sites, 40, 64)), dtype=torch.float32)
y = torch.tensor(rng.integers(0, 2, (sites, 40)))

class Linear(torch.nn.Linear):
    def loss(self, x, y, is_eval=False):
        return torch.nn.functional.cross_entropy(self(x), y)

    def metrics(self, x, y, is_eval=False):
        return {}

class Clock(TrainingProcessCallback):
    seconds = []

    def on_train_begin(self, *, model):
        self.started = time.process_time()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        now = time.process_time()
        self.seconds.append(now - self.started)
        self.started = now
        return False, Metrics()

module = Linear(64, 2)
model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
users, names = {number: Dataset((x[number], y[number])) for number in range(sites)}, cycle(range(sites))
data = FederatedDataset(users.__getitem__, lambda: next(names))
backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[GaussianMechanism(1.0, 3.0)])
asked = NNAlgorithmParams(
    central_num_iterations=rounds + 1, evaluation_frequency=10**9, train_cohort_size=sites, val_cohort_size=None
)
local = NNTrainHyperParams(local_num_epochs=2, local_learning_rate=0.1, local_batch_size=None)
FederatedAveraging().run(asked, backend, model, local, callbacks=[Clock()])
with open(path, "w") as file:
    json.dump(Clock.seconds[1:], file)
"""


def time_rounds(folder: Path, kind: str, num_sites: int, rounds: int = ROUNDS) -> tuple[list[float], list[float]]:
    """Returns the seconds of each round but the first: of the processor, and as they pass."""
    folder.mkdir()
    executor = Executor.model_validate({"kind": kind})
    config = simulation(folder, num_sites, rounds + 1, held_out=0.0).model_copy(update={"executor": executor})
    marks: list[tuple[float, float]] = []

    def observe(phase: str, done: int, total: int) -> None:
        if phase == "rounds":
            marks.append((time.process_time(), time.perf_counter()))

    run(config, observe=observe)
    pairs = list(pairwise(marks))[1:]
    return [after[0] - before[0] for before, after in pairs], [after[1] - before[1] for before, after in pairs]


@dataclass(frozen=True)
class RoundCost:
    """The cost of one round, in seconds.

    Attributes:
        passed: seconds that passed.
        coordinator: seconds of the processor in the coordinator's process, without shards that are in it.
        shards: for each shard, seconds of the processor.
    """

    passed: float
    coordinator: float
    shards: list[float]

    @property
    def alone(self) -> float:
        """The seconds that would pass with a core for each process."""
        return self.coordinator + max(self.shards)


def time_shards(folder: Path, num_sites: int, num_shards: int, rounds: int) -> list[RoundCost]:
    """Returns what each round but the first took, with shards as Ray actors, also where there is only one."""
    folder.mkdir()
    executor = Executor(kind="batched", shards=num_shards, cpus_per_site=0.5)
    config = simulation(folder, num_sites, rounds + 2, held_out=0.0).model_copy(update={"executor": executor})
    backbones = open_backbones(config.run, "run.")
    marks: list[tuple[float, float, list[float]]] = []

    def observe(phase: str, done: int, total: int) -> None:
        if phase == "rounds":
            assert sites.shards is not None
            cpu = sites.shards.ask(read_clock, [None] * num_shards)
            marks.append((time.perf_counter(), time.process_time(), cpu))

    tasks = open_on(config.run, check_simulation(config), backbones)
    experiment = Experiment(config, tasks, backbones, folder, SeededEntropy(1), observe)
    (site,) = build_for_executor(config, folder / "sites")
    whole = open_batched(experiment, config.run, site, backbones, folder.name)
    sites = BatchedSites(whole.gathering, whole.prepare, open_on_ray(executor), num_shards)
    try:
        with without_flushing():
            run_federation(
                InProcessGrid(sites.answer, len(sites)),
                config.run,
                backbones,
                run_id=folder.name,
                folder=folder,
                journal=experiment.journal,
                executor="batched",
                observe=observe,
                at_hand=sites,
            )
    finally:
        sites.close()
    return [
        RoundCost(after[0] - before[0], after[1] - before[1], np.subtract(after[2], before[2]).tolist())
        for before, after in list(pairwise(marks))[2:]
    ]


def read_clock(shard: Shard, argument: None) -> float:
    """Returns the seconds of the processor that a shard's process has taken."""
    del shard, argument
    return time.process_time()


def compare_shards(folder: Path, num_sites: int = 10_000) -> None:
    """Times one and two shards in turns, each a process of its own, and states how they compare."""
    spent: dict[int, list[RoundCost]] = {1: [], 2: []}
    for turn in range(TURNS):
        for number, own in spent.items():
            own += time_shards(folder / f"shards-{number}-{turn}", num_sites, number, 6)
    passed = {number: median(each.passed for each in own) for number, own in spent.items()}
    alone = {number: median(each.alone for each in own) for number, own in spent.items()}
    name, repeats = f"round of {num_sites} sites: two shards / one", len(spent[2])
    stated(name, passed[2], passed[1], target=1 / 1.6, repeats=repeats, note="seconds that pass")
    name = f"round of {num_sites} sites: two shards / one, a core for each process"
    note = "seconds of the processor: the coordinator's and the largest of the shards'"
    stated(name, alone[2], alone[1], target=1 / 1.6, repeats=repeats, note=note)
    both = [median(each.coordinator for each in own) for own in spent.values()]
    name = "the coordinator's part of a round: with two shards / with one"
    stated(name, both[1], both[0], target=1.2, repeats=repeats, note="seconds of the processor")


def time_pfl(place: str, folder: Path, num_sites: int, rounds: int = ROUNDS) -> list[float]:
    """Returns the processor's seconds of each round of pfl but the first."""
    path = folder / "pfl.json"
    environment = {**os.environ, "PYTHONPATH": place}
    command = [sys.executable, "-c", PFL, str(num_sites), str(rounds), str(path)]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    seconds: list[float] = json.loads(path.read_text())
    return seconds


def compare_side_by_side(folder: Path, pfl: str | None) -> float:
    """Times 100 and 1,000 sites in turns, states how they compare, and returns the seconds of 100 batched sites."""
    cpu: dict[tuple[str, int], list[float]] = {}
    for turn in range(TURNS):
        for kind, count in (("in_process", 100), ("batched", 100), ("batched", 1000)):
            own, _ = time_rounds(folder / f"{kind}-{count}-{turn}", kind, count)
            cpu.setdefault((kind, count), []).extend(own)
            if pfl is not None and kind == "batched":
                cpu.setdefault(("pfl", count), []).extend(time_pfl(pfl, folder, count, 500 // count + 3))
    each, repeats = {key: median(seconds) for key, seconds in cpu.items()}, len(cpu["batched", 100])
    few, one_by_one = each["batched", 100], each["in_process", 100]
    stated("round of 100 sites: batched / in_process", few, one_by_one, target=0.05, repeats=repeats, note=NOTE)
    state_many(1000, each["batched", 1000], few, repeats)
    for count in (100, 1000) if pfl is not None else ():
        for kind, target in (("in_process", 1.0), ("batched", 0.05)):
            if (kind, count) in each:
                name, repeats = f"round of {count} sites: {kind} / pfl 0.6", len(cpu["pfl", count])
                stated(name, each[kind, count], each["pfl", count], target=target, repeats=repeats, note=NOTE)
    return few


def state_many(count: int, seconds: float, of_hundred: float, repeats: int) -> None:
    """States a round of many sites beside what was asked for, and its cost per site beside that of 100 sites.

    Args:
        count: number of the sites.
        seconds: of their round.
        of_hundred: of a round of 100 sites.
        repeats: number of rounds that were timed.
    """
    limit = {1000: 0.2, 10_000: 1.0}[count]
    name = f"round of {count} sites, batched / {limit:g} s"
    stated(name, seconds, limit, target=1.0, repeats=repeats, note=NOTE)
    name = f"seconds per site and round, batched: {count} sites / 100 sites"
    stated(name, seconds / count, of_hundred / 100, target=1.2, repeats=repeats, note=NOTE)


def main() -> None:
    """Times all of them, in turns where they are compared."""
    pfl = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        few = compare_side_by_side(folder, pfl)
        state_many(10_000, median(time_rounds(folder / "10000", "batched", 10_000, 4)[0]), few, 4)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        name = "peak memory with 10000 sites, batched / 3 GiB"
        stated(name, peak, 3.0, target=1.0, repeats=1, note="GiB, not seconds")
        long_, _ = time_rounds(folder / "long", "batched", 100, MANY_ROUNDS)
        name = f"batched, 100 sites: the last hundred of {MANY_ROUNDS} rounds / the first hundred"
        stated(name, median(long_[-100:]), median(long_[:100]), target=1.1, repeats=100, note=NOTE)
        compare_shards(folder)
        passed, engine = [], []
        for turn in range(TURNS):
            passed += time_rounds(folder / f"passed-{turn}", "batched", 100)[1]
            engine += seconds_of_engine(100, folder)
        name = "round of 100 sites: batched / Flower on Ray, idle clients"
        stated(name, median(passed), median(engine), target=0.1, repeats=len(passed), note="seconds that pass")


if __name__ == "__main__":
    main()
