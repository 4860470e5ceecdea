"""A site's own work in a later round beside 15 ms, and what its process imports beside what it need not.

    python -m benchmarks.site_round

The site is real and durable: every charge and reply is flushed to the disk. It has 1000 records of 576 features, a
linear head of 8 classes and 16 full-batch steps a round. Timed is an answer, from the message to the reply.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from flwr.app import Context, Message

from benchmarks.measure import stated
from benchmarks.sites import simulation
from client.app import make_app
from common import messages
from common.events import FileJournal
from common.model.backbones import open_backbones
from common.yaml import load
from server.rounds.loop import run_federation
from simulations.config import SimulationConfig
from simulations.executors.in_process import InProcessGrid, SiteApp
from simulations.partition import build_sites

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, RECORDS, LIMIT_S, REPEATS = 20, 1000, 0.015, 5
NEEDED = "import client.connection.worker, client.app, client.solvers.dp_gd, common.tasks.classification"
NOT_NEEDED = "import opacus, ray, torchvision, transformers"


def timed(app: SiteApp, seconds: list[float]) -> SiteApp:
    """The same app; what each training message took is noted."""

    def answer(message: Message, context: Context) -> Message:
        started = time.perf_counter()
        reply = app(message, context)
        if message.metadata.message_type == messages.TRAIN:
            seconds.append(time.perf_counter() - started)
        return reply

    return answer


def seconds_of_rounds(folder: Path) -> list[float]:
    """Returns the seconds of every round but the first."""
    simulation(folder, RECORDS // 40, ROUNDS, dim=576, classes=8)
    changes = ["partition.num_sites=1", f"tasks.task.public_size={RECORDS}", "run.solver.steps=16"]
    config = load(SimulationConfig, folder / "simulation.yaml", changes)
    (site,) = build_sites(config, folder / "sites")
    seconds: list[float] = []
    run_federation(
        InProcessGrid(timed(make_app(lambda context: site), seconds), 1),
        config.run,
        open_backbones(config.run),
        run_id="run",
        folder=folder,
        journal=FileJournal(folder / "journal.jsonl"),
        executor="in_process",
    )
    return seconds[1:]


def seconds_of_imports(code: str) -> float:
    """Returns the seconds that imports take in a new process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Both."""
    with tempfile.TemporaryDirectory() as place:
        seconds = seconds_of_rounds(Path(place))
    note = f"{RECORDS} records x 576, 8 classes, 16 full-batch steps; reference: the 15 ms asked for"
    name = "a site's work in a later round / 15 ms"
    stated(name, median(seconds), LIMIT_S, target=1.0, repeats=len(seconds), note=note)
    light, heavy = [], []
    for _ in range(REPEATS):
        light.append(seconds_of_imports(NEEDED))
        heavy.append(seconds_of_imports(f"{NEEDED}\n{NOT_NEEDED}"))
    note = "new processes; reference: with Opacus, Ray, torchvision and transformers too"
    name = "imports of a site's round / with what it leaves out"
    stated(name, median(light), median(heavy), target=0.7, repeats=REPEATS, note=note)


if __name__ == "__main__":
    main()
