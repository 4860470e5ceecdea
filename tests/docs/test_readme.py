"""README: its length, the plug-in and the simulation that it prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np

from common.yaml import load
from server.rounds.aggregators import Weighted
from simulations.check import check_simulation
from simulations.config import SimulationConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_has_at_most_250_lines() -> None:
    assert len(README.splitlines()) <= 250


def test_its_plug_in_works(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    path = tmp_path / "vote.py"
    path.write_text(block[1])
    spec = importlib.util.spec_from_file_location("vote", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rule = module.Vote.model_validate(module.Vote.example())
    deltas = [Weighted(weight, {"w": np.array([value], np.float32)}) for weight, value in ((1, 1), (1, 2), (9, -1e6))]
    params = {"w": np.array([10.0], np.float32)}
    new, _ = rule.update(params, rule.start(params), deltas)
    assert new["w"].tolist() == [10.5]


def test_its_simulation_is_valid(tmp_path: Path) -> None:
    block = next(text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if text.startswith("run:"))
    (tmp_path / "chest.yaml").write_text(block)
    assert check_simulation(load(SimulationConfig, tmp_path / "chest.yaml"))


def test_its_results_are_those_of_the_documentation() -> None:
    section = README.partition("## Results\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| .*\.\d", line)]
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert 5 <= len(rows) <= 10
    figures = {figure for row in rows for figure in re.findall(r"(?<!\d)\.\d{3}(?: / \.\d{3})*", row)}
    assert not {figure for figure in figures if figure not in results}
