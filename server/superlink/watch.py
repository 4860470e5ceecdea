"""A run's progress, told from its journal: per round and site while it lasts. Watching changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.events import read
from common.types import RunFailed
from server.superlink.control import Control, DaemonUnreachable, RunState

_LOOK_S = 0.5
_SILENCE_S = 90.0

Show = Callable[[str], None]
Fact = Mapping[str, Any]


def watch(
    control: Control, folder: Path, *, engine_run: int, alive: Callable[[], bool], show: Show, skip: int = 0
) -> RunState:
    """Follow a run until its process has ended.

    Args:
        control: line to the link.
        folder: the run's.
        engine_run: the engine's number for the run.
        alive: whether the link's process is there.
        show: is told in one line what happens.
        skip: journal lines that are old: of an interrupted run that continues.

    Raises:
        RunFailed: the link does not answer any more.
    """
    silent_since: float | None = None
    rounds = 0
    while True:
        facts = read(folder / "journal.jsonl")
        for fact in facts[skip:]:
            rounds = fact.get("rounds", rounds) if fact["event"] == "run_started" else rounds
            line = in_words(fact, rounds)
            if line:
                show(line)
        skip = len(facts)
        try:
            state = next((run for run in control.list_runs() if run.run_id == engine_run), None)
            silent_since = None
        except DaemonUnreachable as error:
            silent_since = silent_since or time.monotonic()
            if not alive() or time.monotonic() - silent_since > _SILENCE_S:
                raise RunFailed(
                    f"run {folder.name}: {error}: it ended while the run was under way; see state/link.log, then "
                    "`python -m server resume` continues after the last whole round"
                ) from error
            state = None
        if state is not None and state.finished and len(read(folder / "journal.jsonl")) == skip:
            return state
        time.sleep(_LOOK_S)


def in_words(fact: Fact, rounds: int) -> str | None:
    """One line about one fact; None about those that a person need not see."""
    match fact["event"]:
        case "run_started":
            again = " (continued)" if fact["resumed"] else ""
            return f"run {fact['run_id']}{again}: {', '.join(fact['tasks'])}; waiting for sites"
        case "joined":
            return f"{fact['site']} joined with {', '.join(fact['tasks'])}"
        case "set_aside":
            return f"{fact['site']} set aside at {fact.get('at', 'train')}: {fact['reason']}"
        case "backbone_sent":
            return f"{fact['site']} received {fact['backbone']}, {fact['bytes']:,} bytes"
        case "features_ready":
            return f"sites are ready after {fact['seconds']:.1f} s"
        case "round":
            return _round_in_words(fact, rounds)
        case "evaluation":
            return f"round {fact['round']}: evaluated in noised counts"
        case "run_ended":
            return "the heads went home"
        case _:
            return None


def _round_in_words(fact: Fact, rounds: int) -> str:
    tasks = ", ".join(f"{task} {count}" for task, count in fact["tasks"].items())
    late = [task for task in fact["tasks"] if task not in fact["updated"]]
    kept = f"; not enough for {', '.join(late)}, kept as it was" if late else ""
    sites = ", ".join(fact["sites"]) or "no site"
    return f"round {fact['round']} of {rounds}: {sites}; replies: {tasks}{kept}; {fact['seconds']:.1f} s"
