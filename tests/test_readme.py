"""What README shows works: the plug-in it prints, the files and commands it names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from client.config import SiteConfig
from common.plugins import kinds, resolve
from common.run import RunConfig
from common.yaml import load, write_yaml
from server.rounds.aggregators import Weighted
from simulations.check import check_simulation
from simulations.config import SimulationConfig
from simulations.experiment import make_paths_absolute

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_plug_in_in_readme_works(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    path = tmp_path / "median.py"
    path.write_text(block[1])
    spec = importlib.util.spec_from_file_location("median", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rule = module.Median(kind="median")
    deltas = [Weighted(weight, {"w": np.array([value], np.float32)}) for weight, value in ((1, 1), (9, 2), (1, 1e6))]
    new, _ = rule.update({"w": np.array([10.0], np.float32)}, {}, deltas)
    assert new["w"].tolist() == [12.0]


def test_the_whole_simulation_in_readme_is_valid(tmp_path: Path) -> None:
    block = next(text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if text.startswith("run:"))
    (tmp_path / "chest.yaml").write_text(block)
    assert check_simulation(load(SimulationConfig, tmp_path / "chest.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "simulations").glob("*.yaml")), ids=lambda path: path.name)
def test_every_simulation_in_the_repository_is_valid_and_in_readme(path: Path) -> None:
    assert check_simulation(load(SimulationConfig, path))
    assert path.name in README


def test_the_example_run_and_site_files_are_valid_and_the_run_is_the_demos() -> None:
    run = load(RunConfig, ROOT / "configs" / "runs" / "demo.yaml")
    demo = load(SimulationConfig, ROOT / "configs" / "simulations" / "demo.yaml")
    assert run.model_dump() == demo.run.model_dump()
    site = load(SiteConfig, ROOT / "configs" / "sites" / "example.yaml")
    assert set(site.tasks) == set(run.tasks)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "simulations").glob("*.yaml")), ids=lambda path: path.name)
def test_every_simulation_means_the_same_when_it_is_written_elsewhere(path: Path, tmp_path: Path) -> None:
    config = load(SimulationConfig, path)
    write_yaml(tmp_path / "config.yaml", make_paths_absolute(config))
    back = load(SimulationConfig, tmp_path / "config.yaml")
    assert check_simulation(back) == check_simulation(config)
    written, read = (
        {name: resolve("common.backbones", spec, name) for name, spec in each.run.backbone_specs.items()}
        for each in (config, back)
    )
    assert written == read


@pytest.mark.parametrize(
    "package",
    ["common.backbones", "common.tasks", "client.data.sources", "client.solvers", "server.rounds.aggregators"],
)
def test_every_kind_stands_in_readme(package: str) -> None:
    missing = [kind for kind in kinds(package) if kind not in README]
    assert not missing


def test_every_file_readme_names_exists() -> None:
    for name in re.findall(
        r"`((?:tests|configs|common|client|server|simulations|docs|benchmarks)/[\w/.]+\.\w+)`", README
    ):
        assert (ROOT / name).exists() or name == "server/rounds/aggregators/median.py", name


def test_the_table_of_speed_is_the_last_measured_one() -> None:
    measured = (ROOT / "benchmarks" / "results" / "latest.md").read_text(encoding="utf-8")
    assert measured.count("\n") > 10
    assert measured in README


def test_git_sees_nothing_of_the_packages_that_an_example_downloads() -> None:
    """apt-get writes into the folder in which it is called; what is unpacked goes to .cache."""
    examples = [*(ROOT / "configs").rglob("*.yaml"), ROOT / "README.md"]
    assert any("apt-get download" in path.read_text(encoding="utf-8") for path in examples)
    assert {"*.deb", ".cache/"} <= set((ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())
