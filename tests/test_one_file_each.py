"""A made-up task, backbone, source, scorer, aligner and aggregator, each added as one file to a copy of the rooms, run
a vote and a federation; nothing else is touched, and the contract suites find and test them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.events import (
    PERSONAL,
    EpsilonSpent,
    HomeEvaluated,
    MetricsEvaluated,
    read_run_journal,
    select_events,
)

ROOT = Path(__file__).resolve().parents[1]

SOURCE = '''
"""Pendulums, simulated: a recording of angles each, whose length and damping are its labels."""

from typing import Any, Literal

import numpy as np

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import SourceSettings, digest


class Pendulums(SourceSettings):
    """Settings: how many."""

    kind: Literal["pendulums"]
    count: int = 200

    @classmethod
    def example(cls, folder: Any) -> SourceExample:
        """Six of them."""
        return SourceExample({"kind": "pendulums", "count": 6})

    def open(self) -> "Swings":
        """Swings, the same every time."""
        rng = np.random.default_rng(0)
        return Swings(rng.uniform(0.2, 3.0, self.count), rng.uniform(0, 6, self.count))


class Swings:
    """Opened pendulums."""

    def __init__(self, lengths: np.ndarray, phases: np.ndarray) -> None:
        self.lengths, self.phases = lengths, phases

    def digest(self) -> str:
        """Over all of them."""
        return digest([self.lengths.tobytes(), self.phases.tobytes()])

    def index(self) -> list[SourceRecord]:
        """In order; every fourth is held out."""
        return [
            SourceRecord(
                i + 1,
                "pendulums",
                f"pendulum {i}",
                None,
                "test" if i % 4 == 0 else "train",
                {"length": f"{m:.3f}", "size": "long" if m > 1.0 else "short"},
            )
            for i, m in enumerate(self.lengths)
        ]

    def load(self, position: int) -> np.ndarray:
        """Angles over ten seconds."""
        time = np.linspace(0, 10, 128)
        return np.cos(time * np.sqrt(9.81 / self.lengths[position]) + self.phases[position]).astype(np.float32)
'''

BACKBONE = '''
"""The size of a series' spectrum: no weights."""

from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from common.backbones import Architecture, Example, Projection
from common.plugins import Plugin
from common.types import BadRecord


@final
class Spectrum(Plugin):
    """Settings: how many steps a series has."""

    kind: Literal["spectrum"] = "spectrum"
    steps: int = 128
    projection: Projection | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns four waves."""
        waves = [np.sin(np.arange(16) * pitch).astype(np.float32) for pitch in (0.2, 0.5, 1.0, 2.0)]
        return Example({"kind": "spectrum", "steps": 16}, waves)

    def architecture(self) -> Architecture:
        """Returns absolute values of the Fourier transform."""
        return Architecture(Size(), self.steps // 2 + 1)

    def preprocess(self, item: Any) -> Tensor:
        """Returns a series of exactly so many steps."""
        if not isinstance(item, np.ndarray) or item.shape != (self.steps,):
            raise BadRecord("expected a series of another length")
        return torch.from_numpy(item.astype(np.float32))


class Size(nn.Module):
    """Sizes of the coefficients."""

    def forward(self, series: Tensor) -> Tensor:
        """Returns them, B x F."""
        return torch.fft.rfft(series).abs() / series.shape[1] ** 0.5
'''

TASK = '''
"""Whether a measured number is above a public limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from common.inputs import parse_number
from common.plugins import Plugin
from common.tasks import Statistic, TaskExample
from common.tasks.classification import Classification
from common.tasks.parts.head import HeadSettings
from common.types import BadRecord


@dataclass(frozen=True)
class AboveCodec:
    """Labels are 0 and 1; any number is read, and 0 or 1 is predicted."""

    limit: float

    def encode(self, cells: Sequence[str]) -> Tensor:
        """Returns 1 for a number above the limit, else 0."""
        value = parse_number(cells[0]) if len(cells) == 1 else None
        if value is None:
            raise BadRecord("expected one number")
        return torch.tensor(int(value > self.limit))

    def missing(self) -> Tensor:
        """Returns a mark without loss."""
        return torch.tensor(-100)

    def decode(self, outputs: Tensor) -> list[list[str]]:
        """Returns a number on the predicted side of the limit."""
        return [[str(self.limit + (1 if logit > 0 else -1))] for (logit,) in outputs.tolist()]


@final
class Above(Plugin):
    """Settings: the limit."""

    kind: Literal["above"] = "above"
    limit: float
    scale: float = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(), alias="head")

    @classmethod
    def example(cls) -> TaskExample:
        """Returns a task on heights."""
        return TaskExample({"kind": "above", "limit": 0.5}, [["0"], ["1"], ["1"], ["0"]])

    @property
    def codec(self) -> AboveCodec:
        """Sides of the limit."""
        return AboveCodec(self.limit)

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head with one logit."""
        return self.head_settings.build(feature_dim, 1)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the squared hinge loss."""
        margin = 1.0 - outputs.squeeze(1) * (2.0 * labels - 1.0)
        return torch.where(labels >= 0, margin.clamp(min=0.0) ** 2, 0.0)

    def statistic(self, buckets: int) -> Statistic:
        """Returns that of two classes."""
        return Classification(labels=("0", "1")).statistic(buckets).compose(self._pair)

    def _pair(self, outputs: Tensor) -> Tensor:
        return torch.cat([-outputs, outputs], dim=1).clamp(-50, 50)
'''

AGGREGATOR = '''
"""Coordinate-wise trimmed mean (Yin et al. 2018, Definition 2): the largest and smallest changes are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from common.plugins import Plugin
from common.types import Params
from server.rounds.aggregators import State, Weighted


class Trimmed(Plugin):
    """Settings: how many sites are left out at each end."""

    kind: Literal["trimmed"]
    left_out: int
    min_updates: ClassVar[int] = 1
    needs_sum: ClassVar[bool] = False

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings with an integer, which no other kind has."""
        return {"kind": "trimmed", "left_out": 1}

    def start(self, params: Params) -> State:
        """Returns an empty state."""
        return {}

    def update(self, params: Params, state: State, deltas: Sequence[Weighted]) -> tuple[Params, State]:
        """Returns the parameters moved by the mean of the middle changes."""
        count = min(self.left_out, (len(deltas) - 1) // 2)
        new = {}
        for name, old in params.items():
            ordered = np.sort(np.stack([item.delta[name].astype(np.float64) for item in deltas]), axis=0)
            new[name] = (old + ordered[count : len(deltas) - count].mean(axis=0)).astype(np.float32)
        return new, state
'''

SCORER = '''
"""The squared distance of targets from the nearest of two fixed guesses: a cost that no candidate can change."""

from typing import Any, Literal, final

import numpy as np

from common.scorers import ScoredRows
from common.plugins import Plugin


@final
class Constant(Plugin):
    """The squares of all targets: a unit adds at most 1."""

    kind: Literal["constant"] = "constant"
    scale: float = 1.0

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "constant"}

    @property
    def sensitivity(self) -> float:
        """The squared error of one unit is at most 1; a thousandth is for rounding."""
        return 1.001 * self.scale

    def compute_cost(self, rows: ScoredRows, public_size: int) -> float:
        """Returns the sum of all squares."""
        return self.scale * float(np.square(rows.targets_RC).sum())
'''

ALIGNER = '''
"""Features get the released mean, and nothing else."""

from typing import Any, Literal, final

import numpy as np

from client.aligners import Alignment
from common.plugins import Plugin


@final
class Recentred(Plugin):
    """Settings: the part of the way to the released mean."""

    kind: Literal["recentred"] = "recentred"
    part: float = 1.0

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Returns settings for the contract suite."""
        return {"kind": "recentred"}

    def align(self, source: Any, target: Any, mix_C: Any) -> Alignment:
        """Returns the shift from the site's mean to the released one at its mix."""
        moved_D = self.part * (source.compute_mean(mix_C) - target.compute_mean())
        return Alignment(np.ones_like(moved_D), moved_D if target.num_units else 0.0 * moved_D)
'''

CANDIDATES = """
candidates:
  spectrum: {kind: spectrum, steps: 128, projection: {normalize: true}}
  as-it-is: {kind: identity, dim: 128}
scorer: {kind: constant}
"""

FORMAT = '''
"""The names of what a network serves, one in each line."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from common.plugins import Plugin


class Names(Plugin):
    """A file of names."""

    kind: Literal["names"] = "names"
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    one_task: ClassVar[bool] = False
    library: ClassVar[str] = "none"

    def write(self, exported: Any, folder: Path) -> list[str]:
        """Writes names.txt."""
        names = [name for columns in exported.list_columns().values() for name in columns]
        (folder / "names.txt").write_text("\\n".join(names))
        return ["`names.txt` has the names."]
'''

CONFIG = """
run:
  name: pendulums
  seed: 1
  rounds: 5
  backbone: {kind: spectrum, steps: 128, projection: {normalize: true}}
  tasks: {long: {kind: above, limit: 1.0}}
  solver: {kind: dp_gd, steps: 4, clip_norm: 0.5, learning_rate: 4.0}
  privacy: {unit: example, delta: 1.0e-5, target_epsilon: 8.0}
  aggregation: {kind: trimmed, left_out: 1}
sources: {swings: {kind: pendulums, count: 400}}
tasks: {long: {source: swings, label: length, missing: refuse, public_size: 100}}
partition: {kind: iid, num_sites: 3, split: source}
unit: example
budget: {epsilon: 10.0, delta: 1.0e-5}
cache_dir: ./cache
runs_dir: ./runs
"""


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the rooms and contract suites, and six new files."""
    folder = tmp_path_factory.mktemp("rooms")
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("common", "client", "server", "simulations", "tests/contracts"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/finished.py", "tests/tiny.py"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in (
        ("client/data/sources/pendulums.py", SOURCE),
        ("common/backbones/spectrum.py", BACKBONE),
        ("common/tasks/above.py", TASK),
        ("common/scorers/constant.py", SCORER),
        ("client/aligners/recentred.py", ALIGNER),
        ("server/rounds/aggregators/trimmed.py", AGGREGATOR),
        ("common/exports/names.py", FORMAT),
        ("candidates.yaml", CANDIDATES),
        ("pendulums.yaml", CONFIG),
    ):
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, which imports the copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_new_task_backbone_source_and_aggregator_run_a_private_federation(rooms: Path) -> None:
    done = python(rooms, "-m", "simulations", "run", "pendulums.yaml", "--out", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_run_journal(rooms / "out" / "journal.jsonl")
    (metrics,) = select_events(events, MetricsEvaluated)
    # Two sevenths of the lengths are below 1 m: always "longer" would give .71.
    assert metrics.pooled["accuracy"] > 0.85
    spent = [event.epsilon for event in select_events(events, EpsilonSpent)]
    assert len(spent) == 3 and all(7.9 < epsilon <= 8.0 for epsilon in spent)


def test_sites_vote_by_a_new_scorer(rooms: Path) -> None:
    task, labels = "run.tasks.long={kind: classification, labels: [short, long]}", "tasks.long.label=size"
    options = ("--backbones", "candidates.yaml", "--epsilon", "2", "--out", "chosen", "--json")
    done = python(rooms, "-m", "simulations", "choose", "pendulums.yaml", "--set", task, "--set", labels, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    choice = json.loads(done.stdout)
    assert choice["price"]["sensitivity"] == 1.001 and choice["min_size"] == 13
    assert len(choice["site_votes"]) == 3


@pytest.mark.slow
def test_sites_adapt_by_a_new_aligner(rooms: Path) -> None:
    changes = {
        "run.tasks.long": "{kind: classification, labels: [short, long]}",
        "tasks.long.label": "size",
        "run.solver": "{kind: auto}",
        "run.rounds": "6",
        "run.aggregation": "null",
        "run.moments": "{classes: 0.2, scatter: 0.1}",
        "personal": "adapt",
        "aligners": "[{kind: recentred, part: 0.5}]",
    }
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    done = python(rooms, "-m", "simulations", "run", "pendulums.yaml", "--out", "adapted", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (home,) = select_events(read_run_journal(rooms / "adapted" / "journal.jsonl"), HomeEvaluated)
    assert home.personal == "adapt" and (home.heads[PERSONAL].mean["accuracy"] or 0.0) > 0.8
    done = python(rooms, "-m", "client", "adapt", str(next(rooms.glob("adapted/sites/*/site.yaml"))))
    assert done.returncode == 0 and "long (recentred)" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_new_format_exports_what_is_there_and_a_backbone_without_raw_inputs_is_refused(rooms: Path) -> None:
    for name in ("headwater", "tests"):
        shutil.copytree(ROOT / name, rooms / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        "from pathlib import Path; from tests.finished import write_finished;"
        "write_finished(Path('vectors'), {'kind': 'identity', 'dim': 3});"
        "write_finished(Path('spectra'), {'kind': 'spectrum', 'steps': 16})"
    )
    made = python(rooms, "-c", script)
    assert made.returncode == 0, made.stderr
    done = python(rooms, "-m", "headwater", "export", "vectors", "names", "--format", "names")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (rooms / "names" / "names.txt").read_text() == "none\nglioma\nmeningioma"
    refused = python(rooms, "-m", "headwater", "export", "spectra", "no", "--format", "names")
    assert refused.returncode == 2 and "--without-backbone backbone" in refused.stderr
    assert not (rooms / "no").exists()


@pytest.mark.slow
def test_the_contract_suites_find_and_pass_them(rooms: Path) -> None:
    # A kind may import torch with its module, as this one does; the project's own do not.
    kinds = "(pendulums or spectrum or above or trimmed or constant or recentred)"
    chosen = f"{kinds} and not another_process and not loads_no_torch"
    done = python(rooms, "-m", "pytest", "tests/contracts", "-p", "no:cacheprovider", "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) > 30
