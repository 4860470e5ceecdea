"""The benchmarks are found by the commands their own docstrings name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_is_this_projects_and_not_an_installed_packages(script: str) -> None:
    code = f"from importlib.util import find_spec; print(find_spec('benchmarks.{script}').origin)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == str(ROOT / "benchmarks" / f"{script}.py")
