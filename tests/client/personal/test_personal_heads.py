"""Personal heads are read back as they were written, by whoever keeps them at the site, and by nobody else."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from client.personal.adapt import OwnHead
from client.personal.personal_heads import (
    AT_HOME,
    MAY_LEAVE,
    PersonalHeads,
    list_head_parameters,
    load_personal_heads,
    open_personal_head,
    save_personal_heads,
)
from client.protocol.site import PERSONAL_HEADS
from common.serving.folder import NEVER_LEAVES
from common.tasks import open_task
from common.types import BadInput, DigestMismatch

TASK = open_task({"kind": "classification", "labels": ["a", "b", "c"]}, "t")
ROOT = Path(__file__).resolve().parents[3]


def some_heads() -> tuple[OwnHead, PersonalHeads]:
    head = OwnHead(TASK.head(4), torch.tensor([0.5, -1.0, 0.25]))
    torch.nn.init.normal_(head.head.weight)  # type: ignore[arg-type]
    return head, PersonalHeads("fit", "0" * 64, False, {"t": list_head_parameters(head)})


def test_what_was_written_is_read_back_as_a_module_that_predicts_alike(tmp_path: Path) -> None:
    head, personal = some_heads()
    save_personal_heads(tmp_path, personal)
    found = load_personal_heads(tmp_path, purpose=AT_HOME)
    assert (found.mode, found.final_heads) == ("fit", "0" * 64)
    features = torch.randn(5, 4)
    assert torch.equal(open_personal_head(found.heads["t"], TASK, 4)(features), head(features))


@pytest.mark.parametrize("purpose", ["export", "send", "", "AT_HOME"])
def test_whoever_would_send_or_export_them_gets_a_sentence(tmp_path: Path, purpose: str) -> None:
    save_personal_heads(tmp_path, some_heads()[1])
    with pytest.raises(BadInput, match="never leaves"):
        load_personal_heads(tmp_path, purpose=purpose)


def test_heads_from_releases_alone_may_leave(tmp_path: Path) -> None:
    _, personal = some_heads()
    save_personal_heads(tmp_path, replace(personal, mode="tied", may_leave=True))
    assert load_personal_heads(tmp_path, purpose="export").may_leave


def test_whoever_changes_the_first_line_alone_changes_nothing(tmp_path: Path) -> None:
    path = save_personal_heads(tmp_path, some_heads()[1])
    path.write_bytes(MAY_LEAVE.encode() + b"\n" + path.read_bytes().partition(b"\n")[2])
    with pytest.raises(DigestMismatch):
        load_personal_heads(tmp_path, purpose="export")


def test_the_file_says_so_in_its_first_line_and_no_other_reader_opens_it(tmp_path: Path) -> None:
    path = save_personal_heads(tmp_path, some_heads()[1])
    assert path.read_bytes().splitlines()[0].decode() == NEVER_LEAVES
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(SafetensorError):
        load_file(path)


def test_a_damaged_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="headwater site adapt"):
        load_personal_heads(tmp_path, purpose=AT_HOME)
    path = save_personal_heads(tmp_path, some_heads()[1])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"may leave\n" + whole.partition(b"\n")[2], b"", np.random.bytes(200)):
        path.write_bytes(damaged)
        with pytest.raises(DigestMismatch):
            load_personal_heads(tmp_path, purpose=AT_HOME)


def test_nothing_that_talks_to_a_coordinator_knows_of_them() -> None:
    """The rooms that send, and all of the wire's own code, import nothing of client/personal and do not name its file.

    Removing the file where a patient leaves is the one exception.
    """
    rooms = ("client/protocol", "client/connection", "server", "common")
    paths = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    for path in paths:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [node for node in nodes if (node.module or "").startswith("client.personal")], path
    naming = {path.relative_to(ROOT).as_posix() for path in paths if "PERSONAL_HEADS" in path.read_text()}
    assert naming == {"client/protocol/site.py", "client/protocol/purge.py"}
    assert not [path for path in paths if PERSONAL_HEADS in path.read_text() and path.name != "site.py"]
