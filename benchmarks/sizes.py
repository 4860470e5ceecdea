"""Accuracy by number of records, epsilon, place of the noise, and what of the backbone trains.

    python -m benchmarks.sizes FILE --work DIR [--sizes 100 300 1000] [--epsilons 0 1 3 8] [--seeds 1 2 3] [--secure]
        [--depths '{}' '{backbone: {from: features.17}}'] [--test] [--set KEY=VALUE]

A simulation file of one task and one source is run with so many of its training records, dealt out to its sites. Test
records of the data set are read with `--test` only: without it a third of the training records is held out, another in
each seed, and scored. Epsilon 0 is a run without privacy. Runs that DIR has already are not repeated; each is a line of
`DIR/FILE.jsonl` with its choice, its accuracy and its seconds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from client.data.sources import open_source
from common.yaml import as_override, load
from simulations.config import SimulationConfig
from simulations.experiment import run

HELD_OUT = 1.0 / 3.0


def write_rows(
    config: SimulationConfig, folder: Path, size: int, seed: int, *, test: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns sites with rows of their own of a simulation's one source, so many training records in all.

    Args:
        config: the simulation.
        folder: where the files of rows go.
        size: number of training records of all sites together.
        seed: seed of the division.
        test: scores the source's own test records, in place of a third of the training records.
    """
    ((name, spec),) = config.sources.items()
    index = open_source(spec, "sources").open().index()
    train = [at for at, record in enumerate(index) if record.split == "train"]
    order = np.random.default_rng([seed, len(train)]).permutation(train)
    cut = 0 if test else round(HELD_OUT * len(order))
    held = [at for at, record in enumerate(index) if record.split == "test"] if test else order[:cut]
    assert len(order) - cut >= size, f"expected {size} training records, got {len(order) - cut}"
    sites = {}
    for number in range(config.partition.num_sites or 1):
        sides = [("train", order[cut : cut + size]), ("test", held)]
        rows = sorted((int(at) + 1, side) for side, at_N in sides for at in at_N[number :: config.partition.num_sites])
        path = folder / f"rows-{number}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("row", "split"), *rows])
        sites[f"site-{number + 1}"] = {name: {**spec.model_dump(mode="json"), "rows": str(path.resolve())}}
    return sites


def run_once(file: Path, overrides: list[str], work: Path, choice: dict[str, Any], *, test: bool) -> dict[str, Any]:
    """Runs a simulation once, and returns the choice with its accuracy and the seconds that it took.

    Args:
        file: the simulation file.
        overrides: settings that replace those of the file.
        work: folder of everything that is written.
        choice: `size`, `seed`, `epsilon` (0: not private), `secure` and `depth`, the text of `run.trainable`.
        test: scores the source's own test records.
    """
    config = load(SimulationConfig, file, overrides)
    (task,) = config.tasks
    num_sites, epsilon = config.partition.num_sites or 1, choice["epsilon"]
    privacy = {"unit": config.unit.value, "delta": 1e-5, "target_epsilon": epsilon} if epsilon else "non_private"
    values: dict[str, Any] = {
        "run.seed": choice["seed"],
        "run.privacy": privacy,
        "partition": {"kind": "natural", "split": "source",
                      "sites": write_rows(config, work, choice["size"], choice["seed"], test=test)},
        f"tasks.{task}.public_size": max(1, choice["size"] // num_sites),
        "baselines": [],
        "cache_dir": str((work / "cache").resolve()),
    }  # fmt: skip
    if choice["secure"]:
        values |= {"run.trust": "secure_sum", "run.colluding": 0, "run.cohort": {"min_sites": num_sites}}
    texts = [f"run.trainable={choice['depth']}"] if choice["depth"] else []
    texts += [as_override(key, value) for key, value in values.items()]
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    summary = run(file, out=folder, overrides=[*overrides, *texts])
    return {**choice, "accuracy": summary.tasks[task].metrics["accuracy"], "seconds": time.monotonic() - started}


def main() -> None:
    """Runs what is missing, and prints a row for each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.0, 1.0, 3.0, 8.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--depths", nargs="+", default=[""], help="values of run.trainable")
    parser.add_argument("--secure", action="store_true", help="with secure sums beside noise at the sites")
    parser.add_argument("--test", action="store_true", help="score the data set's own test records")
    parser.add_argument("--set", action="append", default=[], help="override a key, as in `headwater simulate`")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    log = given.work / f"{given.file.stem}{'-test' if given.test else ''}.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    places = (False, True) if given.secure else (False,)
    for seed, size, depth, epsilon, secure in itertools.product(
        given.seeds, given.sizes, given.depths, given.epsilons, places
    ):
        choice = {"size": size, "seed": seed, "epsilon": epsilon, "secure": secure, "depth": depth, "set": given.set}
        if (secure and not epsilon) or any(all(row[key] == value for key, value in choice.items()) for row in done):
            continue
        done.append(run_once(given.file, given.set, given.work, choice, test=given.test))
        with log.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    report(done)


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the mean accuracy of each choice over its seeds, with its standard error."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        groups[row["depth"], row["size"], row["epsilon"], row["secure"], *row["set"]].append(row["accuracy"])
    for (depth, size, epsilon, secure, *others), found in sorted(groups.items()):
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        place = "secure sum" if secure else "noise at sites" if epsilon else ""
        print(
            f"{depth or 'as the file says'} n {size} epsilon {epsilon:g} {place} {' '.join(others)}: "
            f"{statistics.mean(found):.3f} ({error:.3f})"
        )


if __name__ == "__main__":
    main()
