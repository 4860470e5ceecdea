"""The documentation is complete, equal to the code it is made from, and names only what exists."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer
import yaml

from client.config import SiteConfig
from common.plugins import kinds, plugin_class, resolve
from common.run import RunConfig
from common.yaml import load, write_yaml
from headwater.__main__ import make_app
from headwater.commands.schema import PLUGIN_FOLDERS
from simulations.check import check_simulation
from simulations.config import SimulationConfig
from simulations.experiment import make_paths_absolute

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SIMULATIONS = sorted((ROOT / "configs" / "simulations").glob("*.yaml"))
WRITTEN_LATER = {"server/rounds/aggregators/vote.py", "configs/simulations/advised.yaml"}
"""Files that a page tells the reader to write."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_up_to_date() -> None:
    stale = [name for name, text in generator().make_files().items() if read(ROOT / name) != text]
    assert not stale, "run: python docs/generate.py"


def test_every_key_of_the_three_files_has_a_meaning() -> None:
    models = [model for top in (RunConfig, SiteConfig, SimulationConfig) for model in generator()._walk_models(top)]
    assert not [
        f"{model.__name__}.{name}"
        for model in models
        for name in model.model_fields
        if not generator().read_meanings(model).get(name)
    ]


def test_every_setting_of_every_kind_has_a_meaning() -> None:
    missing = [
        f"{package}.{kind}.{name}"
        for package in PLUGIN_FOLDERS.values()
        for kind in kinds(package)
        for name in plugin_class(package, kind).model_fields
        if name != "kind" and not generator().read_meanings(plugin_class(package, kind)).get(name)
    ]
    assert not missing


def test_a_meaning_is_read_from_all_its_lines_and_a_later_class_overrides_an_earlier_one() -> None:
    class First(RunConfig):
        """One.

        Attributes:
            name: the name of
                the first | one.
            seed: a seed.

        More.
        """

    class Second(First):
        """Two.

        Attributes:
            seed: another seed.
        """

    meanings = generator().read_meanings(Second)
    assert meanings["name"] == "the name of the first \\| one." and meanings["seed"] == "another seed."


@pytest.mark.parametrize("package", PLUGIN_FOLDERS.values())
def test_every_kind_stands_in_the_reference_and_on_a_written_page(package: str) -> None:
    reference = read(DOCS / "reference" / "kinds.md")
    written = "".join(read(page) for page in PAGES if page.parent.name != "reference")
    for kind in kinds(package):
        assert f"### {kind}\n" in reference and f"`{kind}`" in written, kind


def test_the_table_of_speed_is_the_last_measured_one() -> None:
    measured = read(ROOT / "benchmarks" / "results" / "latest.md")
    assert measured.count("\n") > 10
    assert measured in read(DOCS / "benchmarks.md")


def require_downloads(path: Path) -> None:
    """Skips where a network is not there whose width only its file tells; the simulation's first lines download it."""
    for name in re.findall(r"weights: \.\./\.\./(\.cache/\S+\.onnx)", read(path)):
        if not (ROOT / name).exists():
            pytest.skip(f"needs {name}; {path.name} says where it comes from")
    assets = Path(os.environ.get("HEADWATER_ASSETS", ROOT.parent / "shared" / "assets"))
    for name in re.findall(r"folder: \$\{HEADWATER_ASSETS:-[^}]*\}/(\S+)", read(path)):
        if not (assets / name).is_dir():
            pytest.skip(f"needs {name} of the shared assets, whose folder HEADWATER_ASSETS names")


# --- simulations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SIMULATIONS, ids=lambda path: path.name)
def test_every_simulation_is_valid_and_among_the_results(path: Path) -> None:
    require_downloads(path)
    assert check_simulation(load(SimulationConfig, path))
    assert f"configs/simulations/{path.name}" in read(DOCS / "results.md")


def test_the_example_run_and_site_files_are_valid_and_the_run_is_the_demos() -> None:
    run = load(RunConfig, ROOT / "configs" / "runs" / "demo.yaml")
    demo = load(SimulationConfig, ROOT / "configs" / "simulations" / "demo.yaml")
    assert run.model_dump() == demo.run.model_dump()
    site = load(SiteConfig, ROOT / "configs" / "sites" / "example.yaml")
    assert set(site.tasks) == set(run.tasks)


@pytest.mark.parametrize("path", SIMULATIONS, ids=lambda path: path.name)
def test_every_simulation_means_the_same_when_it_is_written_elsewhere(path: Path, tmp_path: Path) -> None:
    require_downloads(path)
    config = load(SimulationConfig, path)
    write_yaml(tmp_path / "config.yaml", make_paths_absolute(config))
    back = load(SimulationConfig, tmp_path / "config.yaml")
    assert check_simulation(back) == check_simulation(config)
    written, read_back = (
        {name: resolve("common.backbones", spec, name) for name, spec in each.run.backbone_specs.items()}
        for each in (config, back)
    )
    assert written == read_back


def test_git_sees_nothing_of_the_packages_that_an_example_downloads() -> None:
    """apt-get writes into the folder in which it is called; what is unpacked goes to .cache."""
    examples = [*(ROOT / "configs").rglob("*.yaml"), *PAGES]
    assert any("apt-get download" in read(path) for path in examples)
    assert {"*.deb", ".cache/"} <= set(read(ROOT / ".gitignore").splitlines())


# --- links, files, tests, commands -----------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them of plain headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
        assert page.parent == ROOT or DOCS in path.parents, f"{target}: the built site has only docs/"


@each_page
def test_named_files_exist(page: Path) -> None:
    rooms = "tests|configs|common|client|server|simulations|headwater|docs|benchmarks"
    for name in re.findall(rf"(?<![\w/.])((?:{rooms})/[\w/.-]*\w\.\w+)", read(page)):
        assert (ROOT / name).exists() or name in WRITTEN_LATER, name


@cache
def files_by_test() -> dict[str, set[str]]:
    """Test function -> the files that define it."""
    files: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        for test in re.findall(r"^ *def (test_\w+)", read(path), re.MULTILINE):
            files.setdefault(test, set()).add(str(path.relative_to(ROOT)))
    return files


@each_page
def test_named_tests_exist_where_the_page_says(page: Path) -> None:
    text = read(page)
    for test in re.findall(r"`(test_(?:[a-z0-9]+_){2}\w+)`", text):
        assert test in files_by_test(), test
    for tests, file in re.findall(r"((?:`test_\w+`(?:,\s+)?)+)\s+\((tests/[\w/]+\.py)\)", text):
        for test in re.findall(r"test_\w+", tests):
            assert file in files_by_test()[test], (test, file)


@each_page
def test_named_commands_and_options_exist(page: Path) -> None:
    root: Any = typer.main.get_command(make_app())
    for line in re.findall(r"(?<![\w/])headwater ([a-z][^`\n]*)", _code(read(page))):
        words = line.partition("#")[0].split()
        command = root
        context = click.Context(root)
        while isinstance(command, click.Group) and words:
            found = command.get_command(context, words[0])
            assert found is not None, line
            command, words = found, words[1:]
        known = {option for parameter in command.get_params(context) for option in parameter.opts}
        assert {word for word in words if re.match(r"--[a-z]", word)} <= known | {"--help"}, line


def _code(text: str) -> str:
    """A page's code: indented lines, blocks and spans, with continued lines joined."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans]).replace("\\\n", " ")


def test_the_site_has_every_page_once() -> None:
    text = read(ROOT / "mkdocs.yml")
    listed = re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE)
    assert yaml.safe_load(text)["docs_dir"] == "docs"
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
