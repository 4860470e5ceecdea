"""Accuracy of each aggregator under attack and differential privacy; writes the tables of docs/robustness.md.

    python -m benchmarks.robustness              # 495 runs of 1.4 s of a core each
    python -m benchmarks.robustness --seeds 1    # a third of them

Spoken digits (FSDD) at five equal sites through the real round loop: honest sites are real ones, and hostile ones train
as well, see every honest update of the round before they answer (they collude and know everything), and send what the
coordinator's checks let through. Features are computed once; noise is fresh in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from numpy.typing import NDArray

from client.app import make_app
from common import messages
from common.events import FileJournal, SiteRejected, read_run_journal, select_events
from common.files import without_flushing
from common.model.backbones import Backbone, open_backbones
from common.privacy.noise import os_entropy
from common.privacy.update_norm import bound_update_norms
from common.run import RunConfig
from common.types import Delta, Heads
from common.yaml import parse
from server.rounds.loop import run_federation
from simulations.check import check_simulation
from simulations.config import SimulationConfig
from simulations.evaluate import open_prepared_units
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid
from simulations.federate import Experiment, evaluate_heads, ignore_progress
from simulations.partition import build_sites, read_sites

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "robustness.json"
PAGE = ROOT / "docs" / "robustness.md"
NUM_SITES, SITE_SIZE, TASK = 5, 540, "digit"
EPSILONS = (1.0, 3.0, 8.0)
AGGREGATORS: Mapping[str, dict[str, Any]] = {
    "mean": {"kind": "mean"},
    "median": {"kind": "median"},
    "trimmed_mean": {"kind": "trimmed_mean", "trim": 1},
    "krum": {"kind": "krum", "byzantine": 1, "selected": 2},
    "fedadam": {"kind": "fedadam", "learning_rate": 1.0},
}

Vector = NDArray[np.float64]
Attack = Callable[[Vector, Sequence[Vector], float], Vector]
"""Own honest update, the honest sites' updates, largest norm that is let through -> what is sent."""


def send_garbage(own: Vector, honest: Sequence[Vector], largest: float) -> Vector:
    """Random numbers, as long as is let through."""
    del honest
    noise = np.random.default_rng().normal(size=own.shape)
    return 0.99 * largest * noise / np.linalg.norm(noise)


def flip_sign(own: Vector, honest: Sequence[Vector], largest: float) -> Vector:
    """The own update, backwards."""
    del honest, largest
    return -own


def scale(own: Vector, honest: Sequence[Vector], largest: float) -> Vector:
    """The honest mean backwards, as long as is let through."""
    del own
    mean = np.mean(honest, axis=0)
    return -0.99 * largest * mean / np.linalg.norm(mean)


def hide_in_spread(own: Vector, honest: Sequence[Vector], largest: float) -> Vector:
    """A little is enough (Baruch et al. 2019): the honest mean, moved by 1.5 standard deviations in every weight."""
    del own, largest
    return np.mean(honest, axis=0) - 1.5 * np.sign(np.mean(honest, axis=0)) * np.std(honest, axis=0, ddof=1)


def turn_product(own: Vector, honest: Sequence[Vector], largest: float) -> Vector:
    """Inner-product manipulation (Xie et al. 2020): half the honest mean, backwards."""
    del own, largest
    return -0.5 * np.mean(honest, axis=0)


ATTACKS: Mapping[str, Attack] = {
    "garbage": send_garbage,
    "sign flip": flip_sign,
    "scaled to the bound": scale,
    "a little is enough": hide_in_spread,
    "inner product": turn_product,
}


class Colluders:
    """A ClientApp in which the last sites are hostile; the in-process grid asks them last."""

    def __init__(self, honest: Callable[[Message, Context], Message], run: RunConfig, attack: Attack, count: int):
        self._honest, self._run, self._attack = honest, run, attack
        self._first_hostile = FIRST_NODE_ID + NUM_SITES - count
        self._updates: list[Vector] = []

    def __call__(self, message: Message, context: Context) -> Message:
        """Returns the site's reply, or what a hostile site makes of it."""
        reply = self._honest(message, context)
        if message.metadata.message_type != messages.TRAIN:
            return reply
        if context.node_id == FIRST_NODE_ID:
            self._updates = []
        train = messages.decode(reply.content, messages.TrainReply)
        own = _flatten(train.delta.heads)
        if context.node_id < self._first_hostile:
            self._updates.append(own)
            return reply
        sent = messages.decode(message.content, messages.TrainRequest).heads
        (largest,) = bound_update_norms(self._run, {TASK: SITE_SIZE}, sent).values()
        forged = _restore(self._attack(own, self._updates, largest), train.delta.heads)
        return Message(messages.encode(replace(train, delta=Delta(forged))), reply_to=message)


def _flatten(heads: Heads) -> Vector:
    return np.concatenate([heads[TASK][name].ravel() for name in sorted(heads[TASK])]).astype(np.float64)


def _restore(vector: Vector, like: Heads) -> Heads:
    names = sorted(like[TASK])
    parts = np.split(vector, np.cumsum([like[TASK][name].size for name in names])[:-1])
    shapes = [like[TASK][name].shape for name in names]
    shaped = zip(names, parts, shapes, strict=True)
    return {TASK: {name: part.reshape(shape).astype(np.float32) for name, part, shape in shaped}}


def encode_digits(folder: Path) -> tuple[Path, int]:
    """Returns a file of all recordings' features and labels, made by a real run, and the number of features."""
    assets = os.environ.get("HEADWATER_ASSETS", str(ROOT.parent / "shared" / "assets"))
    backbone = {
        "kind": "speech_embedding",
        "weights": f"{assets}/backbones/google_speech_embedding/model.safetensors",
        "seconds": 1.0,
        "projection": {"normalize": True},
    }
    source = {
        "kind": "audio",
        "path": f"{assets}/data/fsdd/recordings.zip",
        "pattern": r"(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<take>\d+)\.wav",
        "test": {"take": ["0", "1", "2", "3", "4"]},  # The data set's own test set.
    }
    config = _make_simulation(folder, backbone, source, epsilon=8.0, aggregator="mean", seed=1)  # Any run prepares.
    backbones = open_backbones(config.run)
    train(config, backbones, folder / "encoding", flip_sign, 0)
    sites = read_sites(folder / "encoding" / "sites")
    arrays = {}
    for split in ("train", "test"):
        units = open_prepared_units(sites, "encoding", check_simulation(config), split)
        records = [own.tasks[TASK] for own in units.values()]
        arrays[f"{split}_x"] = np.concatenate([own.features_RD.numpy() for own in records])
        arrays[f"{split}_digit"] = np.concatenate([own.labels.numpy() for own in records]).astype(str)
    np.savez(folder / "digits.npz", **arrays)
    return folder / "digits.npz", arrays["train_x"].shape[1]


def make_config(file: tuple[Path, int], epsilon: float, aggregator: str, seed: int) -> SimulationConfig:
    """Returns the simulation of a run, without its attack.

    Args:
        file: the file of features, and the number of features.
        epsilon: privacy of the run.
        aggregator: one of `AGGREGATORS`.
        seed: seed of the initial head and of the division into sites.
    """
    path, dim = file
    parts = {split: {"inputs": f"{split}_x", "labels": {TASK: f"{split}_{TASK}"}} for split in ("train", "test")}
    source = {"kind": "npz", "path": str(path), "parts": parts}
    return _make_simulation(
        path.parent, {"kind": "identity", "dim": dim}, source, epsilon=epsilon, aggregator=aggregator, seed=seed
    )


def _make_simulation(
    folder: Path, backbone: dict[str, Any], source: dict[str, Any], *, epsilon: float, aggregator: str, seed: int
) -> SimulationConfig:
    labels = [str(digit) for digit in range(10)]
    values: dict[str, Any] = {
        "run": {
            "name": "robustness",
            "seed": seed,
            "rounds": 10,
            "backbone": backbone,
            "tasks": {TASK: {"kind": "classification", "labels": labels, "head": {"bias": False}}},
            # As in configs/simulations/fsdd.yaml.
            "solver": {"kind": "dp_gd", "steps": 10, "clip_norm": 0.5, "learning_rate": 32.0},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": epsilon},
            "aggregation": AGGREGATORS[aggregator],
        },
        "sources": {"recordings": source},
        "tasks": {TASK: {"source": "recordings", "label": TASK, "missing": "refuse", "public_size": SITE_SIZE}},
        "partition": {"kind": "iid", "num_sites": NUM_SITES, "split": "source", "seed": seed},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": str(folder / "cache"),
        "runs_dir": str(folder / "runs"),
    }
    return parse(SimulationConfig, values, base=folder)


def train(
    config: SimulationConfig, backbones: Mapping[str, Backbone], folder: Path, attack: Attack, num_hostile: int
) -> float:
    """Returns the accuracy of a run's final heads on all held-out records.

    Args:
        config: the simulation.
        backbones: its opened backbones.
        folder: new folder of the run.
        attack: what hostile sites do.
        num_hostile: number of hostile sites.
    """
    folder.mkdir(parents=True)
    sites = build_sites(config, folder / "sites")
    opened = {one.digest: one for one in backbones.values()}
    app = make_app(lambda context: sites[int(context.node_config["partition-id"])], os_entropy, opened)
    journal = FileJournal(folder / "journal.jsonl")
    outcome = run_federation(
        InProcessGrid(Colluders(app, config.run, attack, num_hostile), NUM_SITES),
        config.run,
        backbones,
        run_id=folder.name,
        folder=folder,
        journal=journal,
        executor="in_process",
    )
    rejected = select_events(read_run_journal(journal.path), SiteRejected)
    assert not rejected, rejected  # Every attack stays within what the coordinator lets through.
    experiment = Experiment(config, check_simulation(config), backbones, folder, os_entropy, ignore_progress)
    results = evaluate_heads(experiment, outcome.heads, sites, run_id=folder.name, backbones=backbones)
    return results[TASK].pooled["accuracy"]


def list_cases(seeds: Sequence[int]) -> list[tuple[int, float, str, int, str]]:
    """Returns seed, epsilon, attack, number of hostile sites and aggregator of every run, seed by seed."""
    attacks = [("none", 0), *product(ATTACKS, (1, 2))]
    return [
        (seed, epsilon, attack, count, aggregator)
        for seed, epsilon, (attack, count), aggregator in product(seeds, EPSILONS, attacks, AGGREGATORS)
    ]


def measure(seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Returns one row for each run, and writes all rows after each."""
    file = encode_digits(folder)
    backbones = open_backbones(make_config(file, 1.0, "mean", 1).run)
    rows: list[dict[str, Any]] = []
    cases = list_cases(seeds)
    started = time.monotonic()
    for number, (seed, epsilon, attack, count, aggregator) in enumerate(cases):
        config = make_config(file, epsilon, aggregator, seed)
        place = folder / f"run-{number}"
        with without_flushing():
            accuracy = train(config, backbones, place, ATTACKS.get(attack, flip_sign), count)
        shutil.rmtree(place)
        rows.append(
            {
                "seed": seed,
                "epsilon": epsilon,
                "attack": attack,
                "hostile": count,
                "aggregator": aggregator,
                "accuracy": round(accuracy, 4),
            }
        )
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        print(f"{number + 1}/{len(cases)} {time.monotonic() - started:.0f} s {rows[-1]}", flush=True)
    return rows


def render_table(rows: Sequence[Mapping[str, Any]], epsilon: float) -> str:
    """Returns the table of one epsilon in Markdown: mean over seeds, standard deviation in parentheses."""
    cells: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        if row["epsilon"] == epsilon:
            cells.setdefault((row["attack"], row["hostile"], row["aggregator"]), []).append(row["accuracy"])
    lines = ["| attack | hostile | " + " | ".join(f"`{name}`" for name in AGGREGATORS) + " |", "|---" * 7 + "|"]
    for attack, count in [("none", 0), *product(ATTACKS, (1, 2))]:
        shown = [_show(cells.get((attack, count, name), [])) for name in AGGREGATORS]
        if "-" not in shown:  # A row of which a run is missing is left out.
            lines.append(f"| {attack} | {count} of {NUM_SITES} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _show(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ({statistics.stdev(values):.3f})".replace("0.", ".") if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}".removeprefix("0") + deviation


def write_page(rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the tables between the page's two marks."""
    shown = "\n\n".join(f"### ε = {epsilon:g}\n\n{render_table(rows, epsilon)}" for epsilon in EPSILONS)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- tables -->")
    _, _, after = rest.partition("<!-- end of tables -->")
    PAGE.write_text(f"{before}<!-- tables -->\n\n{shown}\n\n<!-- end of tables -->{after}", encoding="utf-8")


def main() -> None:
    """Measures, or with `--page` only writes the page from the figures that are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of splits and initial heads")
    parser.add_argument("--page", action="store_true", help="only write the page from benchmarks/results")
    arguments = parser.parse_args()
    if not arguments.page:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments.seeds, Path(folder))
    write_page(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
