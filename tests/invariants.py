"""What has to hold of a deployment after anything has happened to it, read from the files that it leaves.

The ledgers are read here by themselves, line by line, and not by the code that writes them.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from common import messages
from common.events import RoundEnded, RunEnded, RunEvent, read_run_journal, select_events
from common.run import RunConfig
from common.tasks import open_task
from common.types import Params, heads_digest
from common.yaml import load
from server.rounds.aggregators import State, Weighted, open_aggregator
from tests.deployment import SITES, Deployment

_TEMPORARY = re.compile(r"\.[\w.-]+\.[a-z0-9_]{8}")


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """The lines of a file that are whole."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def read_charges(folder: Path) -> dict[tuple[str, int], list[str]]:
    """(run, round) -> digests of the requests that a ledger has charged."""
    charges: dict[tuple[str, int], list[str]] = {}
    for line in read_jsonl(folder / "ledger.jsonl"):
        if line["event"] == "reserved":
            charges.setdefault((str(line["run"]), int(str(line["round"]))), []).append(str(line["request"]))
    return charges


def find_uncharged(made: Deployment) -> list[str]:
    """Everything that left a site, or that it stored to be sent, without a charge in its ledger."""
    missing = []
    for name, site in made.sites.items():
        charges = read_charges(site.ledger)
        requests = {request for each in charges.values() for request in each}
        for line in read_jsonl(site.state / "site.jsonl"):
            if line["event"] in ("sent", "resent") and (line["run_id"], line["round"]) not in charges:
                missing.append(f"{name} sent round {line['round']} of {line['run_id']}")
        for path in site.state.glob("runs/*/replies/*"):
            if not path.name.startswith(".") and path.name not in requests:
                missing.append(f"{name} stored {path.name[:8]} of {path.parents[1].name}")
        for folder in made.list_run_folders():
            for event in select_events(read_run_journal(folder / "journal.jsonl"), RoundEnded):
                if name in event.sites and (folder.name, event.sites[name].round or event.round) not in charges:
                    missing.append(f"round {event.round} of {folder.name} used {name}")
    return missing


class Replay:
    """A run computed again from the replies that its sites keep.

    The request of a round follows from the heads before it, and the digest of the request names the stored reply.
    """

    def __init__(self, made: Deployment, folder: Path) -> None:
        from common.model.backbones import open_backbones
        from common.model.parameters import parameters
        from common.model.trunks import create_modules

        run = load(RunConfig, folder / "config.yaml")
        tasks = {name: open_task(spec, name) for name, spec in run.tasks.items()}
        modules = create_modules(run, tasks, open_backbones(run))
        self._made, self._run_id = made, folder.name
        self._aggregator = open_aggregator(run.aggregation, "aggregation")
        self._heads: dict[str, Params] = {name: parameters(module) for name, module in modules.items()}
        self._sent: dict[int, dict[str, Params]] = {}
        self._states: dict[str, State] = {name: self._aggregator.start(heads) for name, heads in self._heads.items()}

    def advance(self, event: RoundEnded) -> str:
        """The digest of the heads after the next round."""
        replies = {}
        self._sent[event.round] = dict(self._heads)
        for name, update in event.sites.items():
            asked = update.round or event.round  # Of the round before, where it came late.
            sent = {task: self._sent[asked][task] for task in sorted(SITES[name])}
            digest = messages.request_digest(messages.TrainRequest(self._run_id, asked, sent))
            stored = self._made.sites[name].state / "runs" / self._run_id / "replies" / digest
            replies[name] = messages.decode(messages.from_bytes(stored.read_bytes()), messages.TrainReply)
        for task in event.updated:
            used = [
                Weighted(event.sites[name].weights[task], reply.delta.heads[task])
                for name, reply in replies.items()
                if task in reply.delta.heads
            ]
            self._heads[task], self._states[task] = self._aggregator.update(self._heads[task], self._states[task], used)
        return heads_digest(self._heads)


def _replay(replay: Replay, events: Collection[RunEvent]) -> str | None:
    """What of a run does not replay."""
    # A round that was done again after a crash stands twice.
    rounds = {event.round: event for event in select_events(events, RoundEnded)}
    digest = None
    for number, event in sorted(rounds.items()):
        try:
            digest = replay.advance(event)
        except OSError as error:
            return f"a reply of round {number} is not kept: {error.filename}"
        if digest != event.heads:
            return f"the heads of round {number} do not replay"
    ends = select_events(events, RunEnded)
    return "its final heads do not replay" if ends and ends[-1].heads != digest else None


@dataclass
class Watcher:
    """Looks at what was added to logs and journals since the last look.

    Attributes:
        made: what is watched.
        seen: log -> number of its characters that were read.
        replayed: names of the runs that ended and replayed.
    """

    made: Deployment
    seen: dict[Path, int] = field(default_factory=dict)
    replayed: set[str] = field(default_factory=set)

    def find_lost_heads(self) -> list[str]:
        """Rounds whose heads are not what the replies give that the sites keep."""
        lost = []
        for folder in self.made.list_run_folders():
            if folder.name not in self.replayed:
                events = read_run_journal(folder / "journal.jsonl")
                problem = _replay(Replay(self.made, folder), events)
                if problem is not None:
                    lost.append(f"{folder.name}: {problem}")
                if problem is not None or select_events(events, RunEnded):
                    self.replayed.add(folder.name)
        return lost

    def find_tracebacks(self) -> list[str]:
        """Logs with a traceback that a person could meet."""
        found = []
        logs = [*self.made.folder.glob("logs/*.log"), *(self.made.fed / "state").glob("link.log*")]
        for log in logs:
            text = log.read_text(encoding="utf-8", errors="replace")
            new, self.seen[log] = (
                text[self.seen.get(log, 0) :] if len(text) >= self.seen.get(log, 0) else text,
                len(text),
            )
            if "Traceback" in new:
                found.append(f"{log.name}: {new[new.index('Traceback') :].strip().splitlines()[-1][:150]}")
        return found


def find_temporary_files(made: Deployment) -> list[str]:
    """Files that a write has left beside their place."""
    return [
        str(path.relative_to(made.folder))
        for path in made.folder.rglob(".*")
        if _TEMPORARY.fullmatch(path.name) and not path.name.endswith(".lock")
    ]


def read_use(process: int) -> tuple[float, int] | None:
    """MiB of memory and number of open files of a process; none for one that has ended, waited for or not."""
    try:
        memory = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{process}/status").read_text())
        files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    except OSError:
        return None
    return (int(memory[1]) / 1024, files) if memory else None


def find_leftovers(made: Deployment) -> list[str]:
    """Processes and ports of a deployment that was stopped."""
    found = [
        f"process {process}: {Path(f'/proc/{process}/cmdline').read_bytes()[:80]!r}"
        for process in made.list_processes()
    ]
    for port in made.ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                found.append(f"port {port} is taken")
    return found
