"""All benchmarks, one after the other; writes results/latest.json and prints the table of docs/benchmarks.md.

python -m benchmarks.run
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = (
    "heads",
    "dense",
    "features",
    "workload",
    "accounting",
    "memory",
    "sites",
    "site_round",
    "bytes",
    "flower_opacus",
    "cold",
    "cuda",
)
RESULTS = Path(__file__).parent / "results"
KEYS = ("name", "ratio", "target", "subject_s", "reference_s", "repeats", "low", "high")
TIMEOUT_S = 600


def results_of(script: str) -> list[dict[str, Any]]:
    """The lines a script printed, also of one that was cut off; what it says on stderr passes through."""
    command = [sys.executable, "-m", f"benchmarks.{script}"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
        output, ended = done.stdout, "" if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        ended = f"cut off after {TIMEOUT_S} s"
    if ended:
        print(f"{script}: {ended}", file=sys.stderr)
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"name"')]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: what, ratio, target, medians, repeats, load."""
    lines = ["| what | ratio | at most | subject, s | reference, s | repeats | load |", "|---|---|---|---|---|---|---|"]
    for row in results:
        mark = "" if row["ratio"] <= row["target"] else " (not reached)"
        values = [row["name"], f"{row['ratio']:.3g}{mark}", row["target"], row["subject_s"], row["reference_s"]]
        lines.append("| " + " | ".join(map(str, [*values, row["repeats"], row["load"]])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run, write, print."""
    results = [row for script in SCRIPTS for row in results_of(script)]
    RESULTS.mkdir(exist_ok=True)
    kept = [{key: row[key] for key in KEYS} for row in results]
    (RESULTS / "latest.json").write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "latest.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
