"""Rounds of many sites in one process: what a site costs in a round, beside Flower's engine with idle clients.

    python -m benchmarks.sites

Sites are real: a file, a ledger, an offer, prepared arrays, forty vectors and a private solver. The reference is
Flower's simulation on Ray with a client that answers with the arrays it got.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from benchmarks.measure import stated
from common.events import RoundEnded, read_run_journal, select_events
from common.yaml import load
from simulations.config import SimulationConfig
from simulations.experiment import run

ROUNDS, RECORDS, DIM = 5, 40, 64
TURNS = 2
"""Number of times that both sides of a ratio are timed, one after the other."""
ENGINE_COUNTS = (10, 100)


def simulation(
    folder: Path, num_sites: int, rounds: int = ROUNDS, *, dim: int = DIM, classes: int = 2, held_out: float = 0.2
) -> SimulationConfig:
    """A simulation of vectors that come as features."""
    rng = np.random.default_rng(0)
    count = round(num_sites * RECORDS / (1.0 - held_out))
    names = np.array([f"c{number}" for number in range(classes)])
    np.savez(
        folder / "rows.npz",
        x=rng.normal(size=(count, dim)).astype(np.float32),
        y=names[rng.integers(0, classes, count)],
    )
    parts = {"all": {"inputs": "x", "labels": {"y": "y"}}}
    values: dict[str, Any] = {
        "run": {
            "name": "many",
            "seed": 1,
            "rounds": rounds,
            "backbone": {"kind": "identity", "dim": dim},
            "tasks": {"task": {"kind": "classification", "labels": names.tolist()}},
            "solver": {"kind": "dp_gd", "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
            "aggregation": {"kind": "mean"},
        },
        "sources": {"rows": {"kind": "npz", "path": str(folder / "rows.npz"), "parts": parts}},
        "tasks": {"task": {"source": "rows", "label": "y", "missing": "refuse", "public_size": RECORDS}},
        "partition": {"kind": "iid", "num_sites": num_sites, "split": "hash", "test_fraction": held_out},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": str(folder / "cache"),
        "runs_dir": str(folder / "runs"),
    }
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(values))
    return load(SimulationConfig, path)


def seconds_of_rounds(config: SimulationConfig) -> list[float]:
    """Seconds of each round, from the journal: sampling, messages, ledgers, training, aggregation, checkpoint."""
    summary = run(config)
    events = read_run_journal(Path(str(summary.path)) / "journal.jsonl")
    times = [event.time for event in select_events(events, RoundEnded)]
    return [after - before for before, after in pairwise(times)]


ENGINE = """
import json, sys, time
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
import numpy as np
from flwr.app import ArrayRecord, Array, RecordDict

sites, rounds, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    return Message(content=message.content, reply_to=message)

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.1)
    nodes, seconds = list(grid.get_node_ids()), []
    arrays = {"w": Array(np.zeros((2, 64), np.float32)), "b": Array(np.zeros(2, np.float32))}
    for number in range(rounds + 1):
        started = time.perf_counter()
        content = RecordDict({"head": ArrayRecord(arrays)})
        sent = [Message(content, node, "train", group_id=str(number)) for node in nodes]
        replies = list(grid.send_and_receive(sent))
        assert len(replies) == sites, len(replies)
        seconds.append(time.perf_counter() - started)
    with open(path, "w") as file:
        json.dump(seconds[1:], file)

resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
run_simulation(server, client, num_supernodes=sites, backend_config=resources)
"""


def seconds_of_engine(num_sites: int, folder: Path, rounds: int = ROUNDS) -> list[float]:
    """Seconds of each round of Flower's engine on Ray with clients that do nothing, the first round left out."""
    environment = {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_HOME": str(folder),
    }
    path = folder / f"seconds-{num_sites}"
    command = [sys.executable, "-c", ENGINE, str(num_sites), str(rounds), str(path)]
    subprocess.run(command, env=environment, check=True, timeout=100, capture_output=True)
    seconds: list[float] = json.loads(path.read_text())
    return seconds


def main() -> None:
    """Seconds of a round beside the engine's, cost per site beside that of ten sites, and memory."""
    with tempfile.TemporaryDirectory() as place:  # One, emptied at the end: ext4 makes files slowly after deletions.
        folder = Path(place)

        def ours(count: int, turn: int, rounds: int = ROUNDS) -> list[float]:
            own = folder / f"{count}-{turn}"
            own.mkdir()
            return seconds_of_rounds(simulation(own, count, rounds + 1))

        per_site = {}
        for count in ENGINE_COUNTS:
            subject, reference = [], []
            for turn in range(TURNS):
                subject += ours(count, turn)
                reference += seconds_of_engine(count, folder)
            name = f"round of {count} sites / Flower on Ray, idle clients"
            stated(name, median(subject), median(reference), target=0.5, repeats=len(subject))
            per_site[count] = median(subject) / count
        # Ten sites once more on either side of the thousand: the machine's load may have changed.
        few = ours(10, TURNS)
        per_site[1000] = median(ours(1000, 0, rounds=3)) / 1000
        few += ours(10, TURNS + 1)
        for count, rounds in ((100, TURNS * ROUNDS), (1000, 3)):
            name = f"seconds per site and round, {count} sites / 10 sites"
            stated(name, per_site[count], median(few) / 10, target=1.2, repeats=rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    stated("peak memory with 1000 sites / 3 GiB", peak, 3.0, target=1.0, repeats=1, note="GiB, not seconds")


if __name__ == "__main__":
    main()
