"""The benchmarks are found by the commands their own docstrings name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.worlds import PICTURES, SLICES, SOUNDS, World, shift_labels
from common.inputs import Audio

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


def test_benchmarks_are_this_projects_and_not_an_installed_packages() -> None:
    code = "import json, sys; from importlib.util import find_spec\n"
    code += "print(json.dumps([find_spec(f'benchmarks.{name}').origin for name in sys.argv[1:]]))"
    command = [sys.executable, "-c", code, *SCRIPTS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(found.stdout) == [str(ROOT / "benchmarks" / f"{script}.py") for script in SCRIPTS]


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        ({"ratio": 1.0, "low": 0.9, "high": 1.1}, {"ratio": 1.15, "low": 1.1, "high": 1.2}, False),
        ({"ratio": 1.0, "low": 0.9, "high": 1.1}, {"ratio": 1.25, "low": 1.2, "high": 1.3}, True),
        ({"ratio": 1.0, "low": 0.99, "high": 1.01}, {"ratio": 1.25, "low": 1.0, "high": 1.5}, False),
        ({"ratio": 1.0, "low": 0.99, "high": 1.01}, {"ratio": 0.5, "low": 0.49, "high": 0.51}, False),
        ({"ratio": 1.0}, {"ratio": 1.05}, False),
        ({"ratio": 1.0}, {"ratio": 1.2}, True),
    ],
)
def test_a_row_is_worse_where_it_grew_by_more_than_either_spread(
    old: dict[str, float], new: dict[str, float], worse: bool, tmp_path: Path
) -> None:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, row in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps([{"name": "step / loop", **row}]))
    command = [sys.executable, "-m", "benchmarks.regressions", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == int(worse)
    assert ("step / loop: 1 -> " in done.stdout) == worse


@pytest.mark.parametrize("name", [*PICTURES, *SLICES])
def test_a_world_of_pictures_is_the_same_each_time(name: str) -> None:
    change = {**PICTURES, **SLICES}[name]
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    first, again = (change(picture, np.random.default_rng(1)) for _ in range(2))
    assert first.shape == picture.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, picture)


@pytest.mark.parametrize("name", list(SOUNDS))
def test_a_world_of_sounds_is_the_same_each_time(name: str) -> None:
    tone = np.sin(np.arange(4000) / 3.0).astype(np.float32) + np.float32(0.3) * np.sin(np.arange(4000)).astype(
        np.float32
    )
    first, again = (SOUNDS[name](Audio(tone, 8000), np.random.default_rng(1)) for _ in range(2))
    assert first.samples_T.shape == tone.shape and first.sample_rate == 8000
    assert np.array_equal(first.samples_T, again.samples_T) and not np.allclose(first.samples_T, tone, atol=1e-2)


def test_a_world_below_1_khz_has_nothing_above() -> None:
    noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    heard = SOUNDS["below 1 kHz"](Audio(noise, 8000), np.random.default_rng(0)).samples_T
    power = np.abs(np.fft.rfft(heard)) ** 2
    assert power[1200:].sum() < 1e-2 * power[:800].sum()


def test_a_shifted_world_has_another_mix_and_each_record_once() -> None:
    labels = np.arange(1000) % 4
    world = World("set", "as it is", None, np.arange(1000, dtype=np.float32)[:, None], labels)
    shifted = shift_labels(world, 0.5, np.random.default_rng(0))
    rows = shifted.features_RD[:, 0].astype(int)
    assert len(set(rows)) == len(rows) >= 196  # Rounded down for each label.
    assert np.array_equal(labels[rows], shifted.labels_R)
    shares = np.bincount(shifted.labels_R, minlength=4) / len(rows)
    assert np.abs(shares - 0.25).max() > 0.1
