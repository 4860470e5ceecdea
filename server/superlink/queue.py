"""The runs of a federation: each a folder that says what its staff wants of it, and one of them at a time under way.

`runs/RUN_ID/order.json` holds what is wanted of a run, its journal what happened; its state follows from both, so that
nothing else has to be right after a crash. The daemon starts what is wanted, oldest first; a run that was under way
when a process died goes on before any other.

Invariant: one run at a time, because sites spend a budget on each.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from pydantic import ValidationError

from common.events import (
    RunEnded,
    RunEvent,
    RunFailure,
    RunInterruption,
    RunStarted,
    read_run_journal,
    select_events,
)
from common.files import check_room, lock_file, stamp_file, write_atomic
from common.plugins import Frozen
from common.run import RunConfig
from common.types import BadInput
from common.yaml import load, write_yaml
from server.deployment.app_bundle import RUN_FOLDER, make_bundle
from server.deployment.federation import ROOM_BYTES, Federation
from server.deployment.preparation import Prepared, prepare_again, write_prepared
from server.reports.results import has_results, new_run_folder
from server.reports.status import ListedRun, RunState
from server.reports.summary import find_status, select_rounds
from server.superlink.control import Control

PENDING: tuple[RunState, ...] = ("queued", "running")
"""States of runs that the daemon starts or goes on with by itself."""

_OVER: tuple[RunState, ...] = ("completed", "partial", "failed", "cancelled")

MAX_ATTEMPTS = 3
"""So often in a row a run's process may die without a whole round; then somebody has to look."""
_ORDER, _LOCK = "order.json", "run.lock"
_DAY_S = 86_400.0


class Order(Frozen):
    """The staff's wish for a run, and what the daemon did about it.

    Attributes:
        wanted: `run`; `pause`: the staff may resume it; `cancel`: it never goes on.
        submitted_at: when it took its place in the queue, in seconds since 1970.
        skip: number of the journal's events that were there before; an end among them does not count.
        attempts: number of attempts since the last whole round.
        rounds_done: number of whole rounds when the last attempt began.
        problem: why the daemon gave the run up; None where it did not.
        anyway: whether it is begun also where it cannot be better than guessing.
    """

    wanted: Literal["run", "pause", "cancel"] = "run"
    submitted_at: float
    skip: int = 0
    attempts: int = 0
    rounds_done: int = 0
    problem: str | None = None
    anyway: bool = False


@dataclass(frozen=True)
class FederationRun:
    """A run of a federation as its folder shows it.

    Attributes:
        folder: the run's folder, whose name is the run's id.
        order: what is wanted of it.
        state: where it stands. `running` includes a run whose process died and that the daemon goes on with.
        round: number of whole rounds.
        rounds: number of rounds that the run asks for; None before it first started.
        last_event_at: time of the last event, in seconds since 1970; None where there is none.
        end: the end that its last attempt wrote since it was last asked for; None where there is none.
    """

    folder: Path
    order: Order
    state: RunState
    round: int
    rounds: int | None
    last_event_at: float | None
    end: RunEnded | RunInterruption | RunFailure | None

    @property
    def reason(self) -> str | None:
        """Returns why it failed or does not go on; None where nothing is known."""
        return self.order.problem if self.end is None or isinstance(self.end, RunEnded) else self.end.reason

    @property
    def id(self) -> str:
        """The run's id."""
        return self.folder.name

    def to_status(self) -> ListedRun:
        """Returns what a report says of the run."""
        return ListedRun(
            id=self.id,
            state=self.state,
            round=self.round,
            rounds=self.rounds,
            submitted_at=self.order.submitted_at,
            last_event_at=self.last_event_at,
            reason=self.reason,
        )


def submit_run(federation: Federation, run: RunConfig, prepared: Prepared, *, anyway: bool = False) -> Path:
    """Creates a run's folder, with all that it needs, at the end of the queue, and returns it.

    Args:
        federation: the run's federation.
        run: the run, with absolute paths.
        prepared: what was prepared for it.
        anyway: whether it is begun also where it cannot be better than guessing.

    Raises:
        OSError: the disk is nearly full.
    """
    check_room(federation.runs, ROOM_BYTES)
    folder = new_run_folder(federation.runs, run.name)
    write_prepared(folder, prepared)
    write_yaml(folder / "config.yaml", run)
    # Last: without an order the daemon does not see the folder.
    _write_order(folder, Order(submitted_at=time.time(), anyway=anyway))
    return folder


def resume_run(folder: Path) -> None:
    """Wants a run again that did not end; it keeps its place, before all that were submitted after it.

    Raises:
        OSError: the disk is nearly full.
    """
    check_room(folder, ROOM_BYTES)
    events = read_run_journal(folder / "journal.jsonl")
    order = _read_order(folder)
    _write_order(folder, Order(submitted_at=order.submitted_at, skip=len(events), anyway=order.anyway))


def is_wanted_anyway(folder: Path) -> bool:
    """Returns whether a run is to begin also where it cannot be better than guessing."""
    return _read_order(folder).anyway


def withdraw_run(folder: Path, wanted: Literal["pause", "cancel"]) -> None:
    """Has the daemon neither start a run nor go on with it."""
    _write_order(folder, _read_order(folder).model_copy(update={"wanted": wanted}))


def list_runs(federation: Federation) -> list[FederationRun]:
    """Returns the runs whose folders are there, in the order of their submission."""
    found = [describe_run(path.parent) for path in federation.runs.glob("*/config.yaml")]
    return sorted(found, key=lambda run: run.order.submitted_at)


def find_shown_run(federation: Federation) -> Path | None:
    """Returns the folder of the run that a status is about: the one under way, or the last that was; None without any.

    A run that waits is shown where none has begun.
    """
    runs = list_runs(federation)
    shown = [run for run in runs if run.state == "running"] or [run for run in runs if run.last_event_at is not None]
    chosen = max(shown or runs, key=lambda run: (run.last_event_at or 0.0, run.order.submitted_at), default=None)
    return None if chosen is None else chosen.folder


def describe_run(folder: Path) -> FederationRun:
    """Returns the state of the run in a folder."""
    order = _read_order(folder)
    events = read_run_journal(folder / "journal.jsonl")
    started = select_events(events, RunStarted)
    end = _find_end(events[order.skip :])
    return FederationRun(
        folder,
        order,
        _find_state(order, events, end),
        max(select_rounds(events), default=0),
        started[-1].rounds if started else None,
        events[-1].time if events else None,
        end,
    )


def find_run(federation: Federation, run_id: str) -> Path:
    """Returns the folder of a run.

    Raises:
        BadInput: there is no such run.
    """
    for path in federation.runs.glob("*/config.yaml"):
        if path.parent.name == run_id:
            return path.parent
    raise BadInput(f"expected the id of a run under {federation.runs}, got {run_id!r}")


def find_interrupted_run(federation: Federation, run_id: str | None) -> Path:
    """Returns the folder of a run that did not end: the named one, or the newest of all.

    An older one is continued only by its name: sites would spend on what nobody asked for again.

    Raises:
        BadInput: there is none, it has ended, or it waits or runs already.
    """
    runs = [run for run in list_runs(federation) if run.id == run_id or (run_id is None and run.state != "cancelled")]
    if run_id is not None and not runs:
        find_run(federation, run_id)
    if not runs:
        raise BadInput("expected a run that was interrupted, got none")
    newest = runs[-1]
    if newest.state in (*PENDING, "cancelled"):
        raise BadInput(f"expected a run that was interrupted, got {newest.id}, which is {newest.state}")
    ended = select_events(read_run_journal(newest.folder / "journal.jsonl"), RunEnded)
    # A complete run whose final heads did not reach every site is continued by its name: they are sent again.
    resend = run_id is not None and ended and ended[-1].missing
    if ended and not resend and has_results(newest.folder, ended[-1].updates):
        raise BadInput(
            f"expected a run that was interrupted, got {newest.id}, which is complete; an older one has to be named"
        )
    return newest.folder


def prepare_interrupted_run(federation: Federation, folder: Path) -> None:
    """Prepares a run that is to be continued, where an older release began it or what it stands on is damaged.

    Raises:
        BadInput: it cannot be continued.
    """
    starts = select_events(read_run_journal(folder / "journal.jsonl"), RunStarted)
    digests = {name: facts.digest for name, facts in starts[-1].backbones.items()} if starts else {}
    prepare_again(federation, folder, load(RunConfig, folder / "config.yaml"), digests)


def is_worked_on(folder: Path) -> bool:
    """Returns whether a process works on a run."""
    try:
        with lock_file(folder / _LOCK, timeout_s=0.0):
            return False
    except TimeoutError:
        return True


def remove_old_runs(federation: Federation, days: float) -> list[str]:
    """Removes the folders of runs that ended, or were cancelled, so many days ago, and returns their ids.

    A run that waits, is under way or can be resumed is never removed.
    """
    limit = time.time() - days * _DAY_S
    removed = []
    for run in list_runs(federation):
        last = run.order.submitted_at if run.last_event_at is None else run.last_event_at
        if (
            run.state in ("completed", "partial", "failed", "cancelled")
            and last < limit
            and not is_worked_on(run.folder)
        ):
            shutil.rmtree(run.folder)
            removed.append(run.id)
    return removed


@final
class Queue:
    """The daemon's view of the queue: it starts the next run when none is under way."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._settled: dict[Path, tuple[int, ...]] = {}

    def resume_newest(self) -> None:
        """Wants the newest run again where it was interrupted because sites were missing, and not by the staff.

        For a daemon that starts: sites that were missing may be back. An older run waits for somebody to name it.
        """
        runs = list_runs(self._federation)
        if runs and isinstance(runs[-1].end, RunInterruption) and runs[-1].order.wanted == "run":
            resume_run(runs[-1].folder)

    def start_next(self, control: Control) -> None:
        """Starts the run whose turn it is, where none is under way; ends one that is not wanted any more.

        Raises:
            HeadwaterError: the SuperLink does not answer, or does not take the run.
            OSError: the disk is nearly full.
        """
        open_ = self._list_open()
        if not open_:
            return
        busy = control.find_current_run()
        if busy is not None:
            if _read_order(Path(busy.folder)).wanted != "run":
                control.stop_run(busy.run_id)
            return
        pending = [run for run in open_ if run.state in PENDING]
        for run in sorted(pending, key=lambda run: (run.order.attempts == 0, run.order.submitted_at)):
            if is_worked_on(run.folder):
                return  # The process of an earlier daemon is still ending.
            # Before the attempt: a run does not use its attempts up while the disk is full.
            check_room(run.folder, ROOM_BYTES)
            if self._begin_attempt(run):
                control.submit(make_bundle(), {RUN_FOLDER: str(run.folder)})
                return

    def _list_open(self) -> Sequence[FederationRun]:
        """Returns the runs that need attention; a run that needs none is read once for each of its orders."""
        found = []
        for path in self._federation.runs.glob(f"*/{_ORDER}"):
            stamp = stamp_file(path)
            if self._settled.get(path) == stamp:
                continue
            run = describe_run(path.parent)
            if run.state in PENDING or is_worked_on(run.folder):
                found.append(run)
            else:
                self._settled[path] = stamp
        return found

    def _begin_attempt(self, run: FederationRun) -> bool:
        """Writes that an attempt begins; false, and the run is given up, after too many without a whole round."""
        attempts = 1 if run.round > run.order.rounds_done else run.order.attempts + 1
        if attempts > MAX_ATTEMPTS:
            problem = f"its process ended {MAX_ATTEMPTS} times without a whole round; see state/link.log"
            _write_order(run.folder, run.order.model_copy(update={"wanted": "pause", "problem": problem}))
            return False
        _write_order(run.folder, run.order.model_copy(update={"attempts": attempts, "rounds_done": run.round}))
        return True


def _find_end(events: Sequence[RunEvent]) -> RunEnded | RunInterruption | RunFailure | None:
    """Returns the end of the last attempt; None where it did not write one."""
    for event in reversed(events):
        if isinstance(event, RunStarted):
            return None
        if isinstance(event, RunEnded | RunInterruption | RunFailure):
            return event
    return None


def _find_state(
    order: Order, events: Sequence[RunEvent], end: RunEnded | RunInterruption | RunFailure | None
) -> RunState:
    if order.wanted == "cancel" and not isinstance(end, RunEnded):
        return "cancelled"
    if end is not None:
        return find_status(events)
    if order.wanted == "pause":
        return "interrupted"
    return "running" if order.attempts else "queued"


def _read_order(folder: Path) -> Order:
    """Returns a run's order; a run of an earlier version, which has none, goes on only when it is asked for again."""
    path = folder / _ORDER
    try:
        return Order.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Order(wanted="pause", submitted_at=(folder / "config.yaml").stat().st_mtime)
    except ValidationError:
        # The staff decides: a run that was cancelled must not go on by itself.
        submitted = (folder / "config.yaml").stat().st_mtime
        return Order(
            wanted="pause", submitted_at=submitted, problem=f"{path.name} is damaged; `resume` goes on with it"
        )


def _write_order(folder: Path, order: Order) -> None:
    write_atomic(folder / _ORDER, order.model_dump_json(indent=2).encode())
