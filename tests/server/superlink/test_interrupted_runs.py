"""A run can be resumed until its heads and its summary are on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.events import RunEnded
from common.run import ONLY_BACKBONE
from common.types import BadInput
from common.yaml import write_yaml
from server.reports.results import write_results
from server.superlink.queue import find_interrupted_run
from tests.server.deployment.federations import new_federation
from tests.server.rounds.test_loop import federate
from tests.tiny import backbone, run_config, site_config


def test_a_run_that_ended_without_room_for_its_results_can_be_resumed(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    folder = federation.runs / "tiny-1"
    outcome, events = federate(folder, [site_config(tmp_path, "north")])
    assert isinstance(events[-1], RunEnded)
    write_yaml(folder / "config.yaml", run_config())
    assert find_interrupted_run(federation, None) == folder
    # An earlier attempt failed and left its summary.
    write_results(folder, run_config(), {ONLY_BACKBONE: backbone()}, {})
    assert find_interrupted_run(federation, None) == folder
    write_results(folder, run_config(), {ONLY_BACKBONE: backbone()}, outcome.heads)
    with pytest.raises(BadInput, match="is complete"):
        find_interrupted_run(federation, None)
    (folder / "summary.json").unlink()
    assert find_interrupted_run(federation, None) == folder
