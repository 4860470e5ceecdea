"""A checkpoint holds all that a run needs to go on, and damage is said in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.types import BadInput, heads_digest
from server.rounds.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

HEADS = {
    "a": {"w.0": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.float32(3.0).reshape(())},
    "b": {"w": np.ones(1, np.float32)},
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    states = {"a": {"first": HEADS["a"], "second": HEADS["a"]}, "b": {}}
    save_checkpoint(tmp_path / "c", Checkpoint("run-1", 3, HEADS, states, {"a": 3, "b": 2}))
    back = load_checkpoint(tmp_path / "c")
    assert (back.run_id, back.rounds_done, back.updates) == ("run-1", 3, {"a": 3, "b": 2})
    assert heads_digest(back.heads) == heads_digest(HEADS)
    assert heads_digest(back.states["a"]) == heads_digest(states["a"])


@pytest.mark.parametrize("data", [b"", b"\x00" * 64, b"not a checkpoint"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c").write_bytes(data)
    with pytest.raises(BadInput, match="expected a checkpoint.* remove it and resume"):
        load_checkpoint(tmp_path / "c")
