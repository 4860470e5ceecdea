"""What has to hold of a deployment after anything has happened to it, read from the files that it leaves.

The ledgers are read here by themselves, line by line, and not by the code that writes them.
"""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from common import messages
from common.events import RoundEnded, RunEnded, read_run_journal, select_events
from common.run import RunConfig
from common.types import heads_digest
from common.yaml import load
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
                if name in event.sites and (folder.name, event.round) not in charges:
                    missing.append(f"round {event.round} of {folder.name} used {name}")
    return missing


def replay_heads(made: Deployment, folder: Path) -> str:
    """The digest of a run's heads after its last round, computed from the replies that the sites keep.

    The request of a round follows from the heads before it, and the digest of the request names the stored reply.
    """
    from common.model.backbones import open_backbones
    from common.model.parameters import parameters
    from common.model.trunks import create_modules
    from common.tasks import open_task
    from server.rounds.aggregators import State, Weighted, open_aggregator

    run = load(RunConfig, folder / "config.yaml")
    tasks = {name: open_task(spec, name) for name, spec in run.tasks.items()}
    heads = {name: parameters(module) for name, module in create_modules(run, tasks, open_backbones(run)).items()}
    aggregator = open_aggregator(run.aggregation, "aggregation")
    states: dict[str, State] = {name: aggregator.start(params) for name, params in heads.items()}
    rounds = {event.round: event for event in select_events(read_run_journal(folder / "journal.jsonl"), RoundEnded)}
    for number, event in sorted(rounds.items()):
        replies = {}
        for name in event.sites:
            request = messages.TrainRequest(folder.name, number, {task: heads[task] for task in sorted(SITES[name])})
            stored = made.sites[name].state / "runs" / folder.name / "replies" / messages.request_digest(request)
            replies[name] = messages.decode(messages.from_bytes(stored.read_bytes()), messages.TrainReply)
        for task in event.updated:
            deltas = [
                Weighted(80.0, reply.delta.heads[task]) for reply in replies.values() if task in reply.delta.heads
            ]
            heads[task], states[task] = aggregator.update(heads[task], states[task], deltas)
    return heads_digest(heads)


def find_lost_heads(made: Deployment) -> list[str]:
    """Runs whose heads are not what the replies that were used give."""
    lost = []
    for folder in made.list_run_folders():
        events = read_run_journal(folder / "journal.jsonl")
        ends = select_events(events, RunEnded)
        if ends and ends[-1].heads != replay_heads(made, folder):
            lost.append(f"{folder.name}: its heads do not replay")
    return lost


@dataclass
class Watcher:
    """Looks at what was added to the logs since the last look."""

    made: Deployment
    seen: dict[Path, int] = field(default_factory=dict)

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
