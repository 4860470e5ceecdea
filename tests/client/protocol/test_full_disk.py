"""Full disks at a site: one sentence, nothing lost, nothing charged that was not released, nothing charged twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from client.app import make_app
from client.config import SiteConfig
from client.protocol.join import join
from client.protocol.site import Site
from common import messages
from common.events import RequestDeclined, read_site_journal, select_events
from common.flower import set_task_identity
from common.model.parameters import create_heads, parameters
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import DeclineReason, Heads
from tests.small_disk import filled, run_on_small_disk
from tests.tiny import TASKS, backbone, give_backbone, offered, run_config, site_config

pytestmark = pytest.mark.slow


def heads() -> Heads:
    tasks = {name: open_task(TASKS[name], name) for name in TASKS}
    modules = create_heads(tasks, {name: backbone().feature_dim for name in tasks}, 0)
    return {name: parameters(module) for name, module in modules.items()}


def ask(config: SiteConfig, round_: int) -> RecordDict:
    """The content of the reply to one training request, through the app that the site's worker runs."""
    set_task_identity(1, 1)
    request = messages.encode(messages.TrainRequest("run-1", round_, heads()))
    message = Message(request, dst_node_id=1, message_type=messages.TRAIN)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    return make_app(lambda context: config)(message, context).content


def train_on_full_disk(disk: Path, name: str, **places: str) -> None:
    """A site answers round 1, meets a full disk in round 2, and answers when there is room again.

    Prints how often its journal says that it declined.
    """
    config = site_config(disk.parent / name, name, **places)
    site = Site(config, os_entropy)
    join(site, offered("run-1", run_config(), backbone()))
    give_backbone(site, "run-1", backbone())
    messages.decode(ask(config, 1), messages.TrainReply)
    journal = config.coordinator_dir / "site.jsonl"
    with journal.open("ab") as file:  # To the end of a block: else a full disk still has room for some lines.
        file.write(b"\n" * (-file.tell() % 4096))
    with filled(disk):
        for _ in range(5):  # More often than a round may be charged.
            assert messages.decode(ask(config, 2), messages.Declined).refusal is DeclineReason.INTERNAL
    charges = site.ledger().charges()
    assert [(charge.round, charge.committed) for charge in charges] == [(1, True)]
    first = messages.to_bytes(ask(config, 2))
    messages.decode(messages.from_bytes(first), messages.TrainReply)
    assert messages.to_bytes(ask(config, 2)) == first
    assert [(charge.round, charge.committed) for charge in site.ledger().charges()] == [(1, True), (2, True)]
    events = select_events(read_site_journal(journal), RequestDeclined)
    assert all("the disk is full; free some space" in event.detail for event in events)
    (disk.parent / f"{name}.count").write_text(str(len(events)))


def check_ledger_then_state(disk: Path) -> None:
    """In one process: to import torch takes longer than all the rest."""
    train_on_full_disk(disk, "ledger", ledger_dir=str(disk / "ledgers"))
    (disk / "state").mkdir()
    backbones = disk.parent / "backbones"  # Elsewhere: a transfer wants more room than this disk has.
    backbones.mkdir()
    (disk / "state" / "backbones").symlink_to(backbones)
    train_on_full_disk(disk, "state", state_dir=str(disk / "state"), ledger_dir=str(disk.parent / "ledgers"))


def test_a_full_disk_of_ledger_or_state_costs_nothing_and_is_said_each_time(tmp_path: Path) -> None:
    """In the journal; where the journal's own disk is full, in the log."""
    said = run_on_small_disk(check_ledger_then_state, tmp_path / "disk")
    assert int((tmp_path / "ledger.count").read_text()) == 5
    assert int((tmp_path / "state.count").read_text()) == 0
    assert said.count("the disk is full; free some space and try again; not in the journal: ") == 5
    assert "Traceback" not in said
