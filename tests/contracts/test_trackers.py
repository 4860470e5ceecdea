"""The law of every tracker in the folder: what is added can be read back; nothing leaves the folder or the machine."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.plugins import kinds
from common.types import BadInput
from server.reports.trackers import PACKAGE, open_trackers

KINDS = kinds(PACKAGE)
ROOT = Path(__file__).resolve().parents[2]
POINTS = [
    ["digit/accuracy", 1, 0.25, 1000.0],
    ["seconds/round", 1, 1.5, 1000.5],
    ["digit/accuracy", 2, 0.5, 1001.0],
    ["digit/noised/accuracy low", 2, -0.125, 1001.5],
]
"""Curve, round, value, time; the values are exact in 32 bits."""

WRITE = """
import json, sys
from pathlib import Path

def check(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        assert isinstance(address, (str, bytes)) or address[0] in ("127.0.0.1", "::1"), address
    if event == "socket.getaddrinfo":
        assert arguments[0] in ("127.0.0.1", "localhost", "::1"), arguments[0]

sys.addaudithook(check)
from server.reports.trackers import Point, open_trackers
kind, folder, points = sys.argv[1], Path(sys.argv[2]), [Point(*each) for each in json.loads(sys.argv[3])]
(tracker,) = open_trackers([kind])
for attempt in range(2):  # The second goes on with an interrupted run: it has all numbers again.
    run = tracker.begin(folder, "run-1", {"name": "chest", "path": "/runs/run-1"})
    run.add(points[:2])
    run.add(points[2:])
    run.end(completed=attempt == 1)
assert "torch" not in sys.modules
"""


def read_tensorboard(folder: Path) -> set[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "run-1"))
    read.Reload()
    from tensorboard.util import tensor_util

    return {
        (tag, event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
        for tag in read.Tags()["tensors"]
        for event in read.Tensors(tag)
    }


def read_mlflow(folder: Path) -> set[tuple[str, int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("headwater")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run-1" and run.info.status == "FINISHED" and run.data.tags["name"] == "chest"
    history = [each for name in run.data.metrics for each in client.get_metric_history(run.info.run_id, name)]
    assert {each.timestamp for each in history} == {round(1000 * time) for *_, time in POINTS}
    return {(each.key, each.step, each.value) for each in history}


def read_wandb(folder: Path) -> set[tuple[str, int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = set[tuple[str, int, float]]()
    for data in scan_log(max(folder.glob("wandb/offline-run-*/run-run-1.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found |= {(key, row["round"], value) for key, value in row.items() if key[0] != "_" and key != "round"}
    return found


def scan_log(content: bytes) -> Iterator[bytes]:
    """Yields the records of a log in LevelDB's format after 7 bytes of its own; the package has no reader."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # A whole record, or the last part of one.
            yield parts
            parts = b""


READERS: dict[str, Callable[[Path], set[tuple[str, int, float]]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


@pytest.mark.parametrize(
    "kind",
    # MLflow creates a database with fifty migrations.
    [pytest.param(kind, marks=pytest.mark.slow) if kind == "mlflow" else kind for kind in KINDS],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_added_is_read_back_with_the_programs_own_reader(kind: str, tmp_path: Path) -> None:
    assert kind in READERS, f"write a reader of {kind} here"
    folder, home = tmp_path / "folder", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    # A proxy that nobody listens at: a program that calls home fails or hangs.
    environment = {**os.environ, "HOME": str(home), "https_proxy": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    done = subprocess.run(
        [sys.executable, "-c", WRITE, kind, folder, json.dumps(POINTS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert READERS[kind](folder) == {(curve, step, value) for curve, step, value, _ in POINTS}
    outside = [path for path in home.rglob("*") if path.is_file()]
    assert not outside, outside


def test_a_tracker_that_does_not_exist_is_named_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"--tracker: expected one of mlflow, tensorboard, wandb, got 'tensorbord'"):
        open_trackers(["tensorbord"])


def test_a_missing_package_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['tensorboard'] = None\n"
    script = hidden + "from server.reports.trackers import open_trackers\nopen_trackers(['tensorboard'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'headwater[tensorboard]'" in done.stderr.splitlines()[-1]
