"""A long run of three real sites to which something happens at random moments, looked at after each round.

    python -m benchmarks.soak [--rounds 300] [--seed N] [--rate FAULTS_PER_ROUND]

After each round: the ledger of each site covers all that left it, the heads are those that the sites' stored replies
give, bit for bit, no log holds a traceback, and the run has not stalled. Memory and open files of each process are
shown at the end: the median of the last third of its life against that of the first.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.parts import kill_daemon, kill_site
from common.events import RoundEnded, RunEnded, select_events
from tests.bad_proxy import Mode
from tests.deployment import Deployment, DrillRun, make_deployment
from tests.invariants import (
    Replay,
    Watcher,
    find_leftovers,
    find_temporary_files,
    find_uncharged,
    read_charges,
    read_use,
)

MIN_SAMPLES = 30
"""Shorter lives say nothing about growth."""
STALL_S = 150.0
"""A run that needs longer from one round to the next has stalled, whatever happened to it: its run file's patience."""


@dataclass
class Soak:
    """A run under way, and what was seen of it."""

    made: Deployment
    chance: random.Random
    run: DrillRun
    injected: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    samples: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=dict)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    num_resumed: int = 0
    next_try: float = 0.0
    looked: int = 0
    num_replayed: int = 0
    pauses: list[float] = field(default_factory=list)
    ended_at: float = field(default_factory=time.monotonic)

    # --- what happens ----------------------------------------------------------------------------------------------

    def inject(self) -> str:
        """Does one thing to one part; what has to be undone is undone later."""
        name = self.chance.choice(list(self.made.sites))
        site = self.made.sites[name]
        what = self.chance.choices(
            ["kill site", "kill worker", "restart site", "stop site", "cut site", "cut all", "drop", "harm", "kill run",
             "kill daemon", "kill daemon and site"],
            [12, 10, 8, 10, 12, 6, 10, 24, 4, 2, 1],
        )[0]  # fmt: skip
        seconds = self.chance.uniform(1, 10)
        match what:
            case "kill site":
                if site.is_running():
                    kill_site(self.made, name)
                self._after(seconds, lambda: self._start_site(name))
            case "restart site":
                if site.process is not None and site.is_running():
                    site.process.send_signal(signal.SIGTERM)
                self._after(seconds, lambda: self._start_site(name))
            case "kill worker" if site.is_running():
                for worker in site.find_processes()[1:]:
                    with suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
            case "stop site" if site.is_running():
                for process in site.find_processes():
                    os.kill(process, signal.SIGSTOP)
                    self._after(seconds, lambda process=process: _continue(process))  # type: ignore[misc]
            case "cut site":
                site.proxy.cut_for(seconds)
            case "cut all":
                for each in self.made.sites.values():
                    each.proxy.cut_for(seconds)
            case "drop":
                site.proxy.drop()
            case "harm":
                mode = self.chance.choice([Mode.FLIP, Mode.TRUNCATE, Mode.REORDER, Mode.DELAY, Mode.PLAIN, Mode.REFUSE])
                what = mode.value
                site.proxy.rate, site.proxy.mode = 0.2, mode
                self._after(seconds, lambda: setattr(site.proxy, "mode", Mode.PASS))
            case "kill run":
                working = self.made.find_run_process()
                if working is not None:
                    os.kill(working, signal.SIGKILL)
            case "kill daemon" | "kill daemon and site" if self.made.find_daemon() is not None:
                kill_daemon(self.made)
                if what == "kill daemon and site" and site.is_running():
                    kill_site(self.made, name)
                    self._after(seconds, lambda: self._start_site(name))
        self.injected[what] += 1
        self.next_try = time.monotonic() + 3
        return f"{what} ({name}, {seconds:.0f} s)"

    def _after(self, seconds: float, undo: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + seconds, undo))

    def _start_site(self, name: str) -> None:
        if not self.made.sites[name].is_running():
            self.made.start_site(name)
        else:
            self._after(1.0, lambda: self._start_site(name))

    def undo(self) -> None:
        """Undoes what is due, and starts again what has ended, as services do."""
        due = [item for item in self.later if item[0] <= time.monotonic()]
        self.later = [item for item in self.later if item not in due]
        for _, undo in due:
            undo()
        waiting = {name for name, site in self.made.sites.items() if not site.is_running()}
        for name in waiting if not self.later else ():
            self.problems.append(f"{name} ended by itself: {self.made.sites[name].last_line}")
            self.made.start_site(name)

    def keep_running(self) -> bool:
        """Continues the run where it was interrupted; returns whether it has ended."""
        code = self.run.process.poll()
        if code is None:
            return False
        if select_events(self.made.events(), RunEnded):
            return True
        if self.made.find_daemon() is None:
            self.made.start_coordinator()
        if self.made.find_run_process() is not None or time.monotonic() < self.next_try:
            return False  # It goes on, or the last process of it is still ending.
        if not any(word in self.run.last_line for word in ("resume", "under way", "by itself", "running", "queued")):
            self.problems.append(f"the run ended with {code}: {self.run.last_line}")
        self.next_try = time.monotonic() + 60  # The daemon itself continues it within a minute.
        self.num_resumed += 1
        self.run = self.made.resume()
        return False

    # --- what is seen ----------------------------------------------------------------------------------------------

    def sample(self) -> None:
        """Notes memory and open files of each process."""
        parts = [("daemon", self.made.find_daemon()), ("run", self.made.find_run_process())]
        for name, site in self.made.sites.items():
            if site.is_running():
                with suppress(OSError):
                    parts += zip((name, f"{name}'s worker"), site.find_processes(), strict=False)
        for role, process in parts:
            used = read_use(process) if process is not None else None
            if process is not None and used is not None:
                self.samples.setdefault((role, process), []).append(used)

    def note_pause(self, number: int) -> None:
        """Notes the seconds since the round before, as a person at the coordinator would count them."""
        before, self.ended_at = self.ended_at, time.monotonic()
        self.pauses.append(self.ended_at - before)
        if self.pauses[-1] > STALL_S:
            self.problems.append(f"round {number}: ended {self.pauses[-1]:.0f} s after the one before")

    def describe_rounds(self) -> str:
        """Returns the rounds' durations, the number that replayed, and the charges beside the replies used."""
        charges = [read_charges(site.ledger) for site in self.made.sites.values()]
        num_charged = sum(len(requests) for each in charges for requests in each.values())
        num_used = sum(len(event.sites) for event in {event.round: event for event in self.made.rounds()}.values())
        pauses = self.pauses or [0.0]
        return (
            f"from round to round: median {statistics.median(pauses):.1f} s, longest {max(pauses):.1f} s; "
            f"{self.num_replayed} rounds replayed; {num_charged} charges for {num_used} replies that were used"
        )

    def describe_growth(self) -> list[str]:
        """For each role: the longest-lived process's memory and files, first third against last."""
        lines = []
        for role in dict.fromkeys(role for role, _ in self.samples):
            lives = [values for (name, _), values in self.samples.items() if name == role]
            longest = max(lives, key=len)
            third = len(longest) // 3
            if third * 3 < MIN_SAMPLES:
                lines.append(f"{role}: {len(lives)} lives, the longest of {len(longest)} rounds")
                continue
            first, last = longest[:third], longest[-third:]
            memory = [statistics.median(each[0] for each in part) for part in (first, last)]
            files = [statistics.median(each[1] for each in part) for part in (first, last)]
            lines.append(
                f"{role}: {len(lives)} lives, the longest of {len(longest)} rounds: {memory[0]:.0f} -> {memory[1]:.0f} "
                f"MiB, {files[0]:.0f} -> {files[1]:.0f} files"
            )
        return lines


def _continue(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)


def soak(seen: Soak, rate: float) -> None:
    """Goes on until the run has ended; after a share of its rounds something happens."""
    made, run, watcher = seen.made, seen.run, Watcher(seen.made)
    made.wait_for_round(1, run=run)
    seen.ended_at = time.monotonic()  # The start is no pause between rounds.
    folder = made.list_run_folders()[-1]
    replay = Replay(made, folder)
    due: float | None = None
    ended = False
    while not ended:
        seen.undo()
        ended = seen.keep_running()
        if due is not None and time.monotonic() > due and not ended:
            print(f"  {seen.inject()}", flush=True)
            due = None
        events: dict[int, RoundEnded] = {event.round: event for event in made.rounds()}
        for number in range(seen.looked + 1, max(events, default=0) + 1):
            seen.looked = number
            seen.note_pause(number)
            try:
                same = replay.advance(events[number]) == events[number].heads
            except (OSError, KeyError) as error:
                same = False
                seen.problems.append(f"round {number}: {error!r}")
            wrong = [*find_uncharged(made), *watcher.find_tracebacks()]
            seen.problems += [f"round {number}: {each}" for each in wrong]
            seen.problems += [] if same else [f"round {number}: heads do not replay"]
            seen.num_replayed += same
            seen.sample()
            if seen.chance.random() < rate:
                due = time.monotonic() + seen.chance.uniform(0, 3)
            used = ", ".join(events[number].sites)
            print(f"round {number}: {used}; {events[number].seconds:.1f} s {'ok' if same else 'WRONG'}", flush=True)
        time.sleep(0.2)


def main() -> None:
    """Soaks, and prints what was seen."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=300)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments.add_argument("--rate", type=float, default=0.4, help="faults for each round")
    arguments.add_argument("--keep", type=Path, help="folder for the federation, which stays")
    chosen = arguments.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # So that all processes are ended.
    made = make_deployment(folder)
    problems: list[str] = []
    try:
        made.start_coordinator()
        made.start_sites()
        started = time.monotonic()
        run = made.start_run(rounds=chosen.rounds, cohort__timeout_s=20)
        seen = Soak(made, random.Random(chosen.seed), run, problems=problems)
        try:
            soak(seen, chosen.rate)
        finally:
            counts = ", ".join(f"{name} {count}" for name, count in seen.injected.most_common())
            print(f"{seen.looked} rounds in {(time.monotonic() - started) / 60:.0f} minutes, seed {chosen.seed}")
            print(f"{seen.injected.total()} faults: {counts}; resumed {seen.num_resumed} times")
            print(seen.describe_rounds())
            print("\n".join(seen.describe_growth()), flush=True)
    except (AssertionError, subprocess.TimeoutExpired, SystemExit) as error:
        problems.append(f"not ended: {error}")
    finally:
        made.end()
    problems += [*find_leftovers(made), *find_temporary_files(made)]
    for problem in dict.fromkeys(problems):
        print(f"PROBLEM: {problem}")
    if chosen.keep is None and not problems:
        shutil.rmtree(folder)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
