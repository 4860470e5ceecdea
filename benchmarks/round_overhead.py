"""Times a deployed round beyond its work: coordinator and one site over TLS on loopback, against one process.

    python -m benchmarks.round_overhead [ROUNDS]

Both run the same tiny run with the same code; the difference is transport, polling and processes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from client.app import make_app
from common.events import FileJournal, RoundEnded, read_run_journal, select_events
from common.yaml import write_yaml
from server.rounds.loop import run_federation
from simulations.executors.in_process import InProcessGrid
from tests import tiny
from tests.federation import started, write_site
from tests.server.deployment.federations import new_federation

ROOT = Path(__file__).resolve().parents[1]


def rounds_of(journal: Path) -> list[float]:
    """Seconds of each round."""
    return [event.seconds for event in select_events(read_run_journal(journal), RoundEnded)]


def one_process(folder: Path, rounds: int) -> list[float]:
    """The reference: the same run without transport."""
    folder.mkdir()
    site = tiny.site_config(folder / "data", "north")
    run_federation(
        InProcessGrid(make_app(lambda context: site), 1),
        tiny.run_config(rounds=rounds),
        {"backbone": tiny.backbone()},
        run_id="reference",
        folder=folder,
        journal=FileJournal(folder / "journal.jsonl"),
        executor="in_process",
    )
    return rounds_of(folder / "journal.jsonl")


def deployed(folder: Path, rounds: int) -> list[float]:
    """The same over TLS, through the real commands."""
    federation = new_federation(folder / "fed")

    def server(*arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "server", *map(str, arguments)], cwd=ROOT, check=True, timeout=600)

    site_file = write_site(
        folder / "north",
        "north",
        str(federation.config.address),
        federation.tls / "ca.crt",
        approval="automatic",
        reply_every_s=0.0,
    )
    server("admit", federation.folder, "north", "--key", folder / "north" / "keys" / "north.pub")
    cohort = {"min_sites": 1, "timeout_s": 60, "join_timeout_s": 120}
    write_yaml(folder / "run.yaml", tiny.run_config(rounds=rounds, cohort=cohort))
    with started(site_file, folder / "north.log"):
        try:
            server("start", federation.folder, folder / "run.yaml")
        finally:
            server("stop", federation.folder)
    (journal,) = federation.runs.glob("*/journal.jsonl")
    return rounds_of(journal)


def main() -> None:
    """Print both."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("one process", one_process), ("deployed", deployed)):
            seconds = measure(Path(folder) / name.replace(" ", "-"), rounds)
            print(
                f"{name}: median {statistics.median(seconds):.3f} s a round, first {seconds[0]:.3f} s, "
                f"longest later {max(seconds[1:]):.3f} s, {len(seconds)} rounds"
            )


if __name__ == "__main__":
    main()
