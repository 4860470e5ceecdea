"""The short rows of the table of faults in docs/deploy.md, with real processes; the long ones: `benchmarks.faults`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.faults import ROWS
from benchmarks.faults.parts import find_faults, settle
from tests.deployment import Deployment, make_deployment
from tests.invariants import Watcher, find_leftovers, find_temporary_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watcher]:
    made = make_deployment(tmp_path_factory.mktemp("faults"))
    try:
        yield Watcher(made)
    finally:
        made.end()
    assert not [*find_leftovers(made), *find_temporary_files(made)]


@pytest.mark.parametrize("row", ["site_processes", "run_killed"])
def test_what_happens_ends_no_run_and_loses_nothing(watcher: Watcher, row: str) -> None:
    made: Deployment = watcher.made
    settle(made)
    assert ROWS[row](made)
    assert not find_faults(made, watcher)
