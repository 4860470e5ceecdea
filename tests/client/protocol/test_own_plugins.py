"""A site's own source kinds: one file in a folder that its own file names, nothing of the project edited."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.config import SiteConfig
from client.data.checks import data_checks
from client.data.feature_store import FeatureStore
from client.data.prepare import Encoding, open_units, prepare
from client.data.preview import write_previews
from client.data.sources import open_source
from common.model.backbones import open_pretrained
from common.plugins import kinds, plugin_class
from common.tasks import open_task
from common.types import BadInput
from tests.tiny import TASKS, site_config

ROOT = Path(__file__).resolve().parents[3]
KIND = '''
"""Vectors from a text file: one line a record, comma-separated numbers and a colour."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.data.sources import SourceExample, SourceRecord
from common.plugins import LocalPath, Plugin


@dataclass(frozen=True)
class Opened:
    lines: tuple[str, ...]

    def digest(self) -> str:
        return hashlib.sha256("\\n".join(self.lines).encode()).hexdigest()

    def index(self) -> list[SourceRecord]:
        return [
            SourceRecord(row, "lines.txt", str(row), None, None, {"colour": line.split(",")[-1]})
            for row, line in enumerate(self.lines, start=1)
        ]

    def load(self, position: int) -> Any:
        return np.array([float(cell) for cell in self.lines[position].split(",")[:-1]], dtype=np.float32)


class Lines(Plugin):
    kind: Literal["lines"]
    path: LocalPath
    rows: Path | None = None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        raise NotImplementedError

    def open(self) -> Opened:
        return Opened(tuple(self.path.read_text().split()))
'''


def site(folder: Path, **changes: Any) -> SiteConfig:
    (folder / "own").mkdir(exist_ok=True)
    (folder / "own" / "lines.py").write_text(KIND)
    (folder / "lines.txt").write_text("1,2,3,4,red\n5,6,7,8,blue\n")
    colour = {"source": "records", "label": "colour", "missing": "refuse", "public_size": 2}
    values: dict[str, Any] = {
        "sources": {"records": {"kind": "lines", "path": str(folder / "lines.txt")}},
        "tasks": {"colour": colour},
        "plugins": str(folder / "own"),
    }
    return site_config(folder, "north", **{**values, **changes})


def test_a_sites_own_source_kind_is_used_from_the_folder_its_file_names(tmp_path: Path) -> None:
    config = site(tmp_path)
    task = open_task(TASKS["colour"], "colour")
    backbone = open_pretrained({"kind": "identity", "dim": 4}, "backbone")
    cpu = torch.device("cpu")
    store = FeatureStore(tmp_path / "features")
    prepare(config, {"colour": task}, {"colour": backbone}, Encoding(store, cpu), tmp_path / "run" / "data")
    units = open_units(tmp_path / "run" / "data", "train", ["colour"], cpu)
    np.testing.assert_array_equal(units.tasks["colour"].features_RD.numpy(), [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert units.tasks["colour"].labels.tolist() == [0, 2]


def test_check_and_preview_open_a_sites_own_kind_too(tmp_path: Path) -> None:
    config = site(tmp_path)
    found = {what: (verdict, said) for what, verdict, said, *_ in data_checks(config, {})}
    assert found["source records"] == ("pass", "2 records, 2 of them opened")
    (preview,) = write_previews(config, {})
    assert preview.source == "records"


def test_without_the_folder_the_kind_is_unknown_and_the_nearest_is_named(tmp_path: Path) -> None:
    config = site(tmp_path)
    with pytest.raises(BadInput, match="expected one of .*, got 'lines'"):
        open_source(config.sources["records"], "sources.records")


def test_a_kind_of_the_projects_own_name_is_refused(tmp_path: Path) -> None:
    config = site(tmp_path)
    (tmp_path / "own" / "table.py").write_text(KIND)
    with pytest.raises(BadInput, match="of other names than the project's own, got table"):
        open_source(config.sources["records"], "sources.records", config.plugins)


def test_a_file_that_cannot_be_imported_is_one_sentence(tmp_path: Path) -> None:
    config = site(tmp_path)
    (tmp_path / "own" / "lines.py").write_text("import nothing_of_this_name")
    with pytest.raises(BadInput, match="expected a plug-in that can be imported, got ModuleNotFoundError"):
        open_source(config.sources["records"], "sources.records", config.plugins)


def test_an_incomplete_kind_is_refused_with_everything_that_it_lacks(tmp_path: Path) -> None:
    config = site(tmp_path)
    text = KIND.replace("    rows: Path | None = None\n", "").replace("def open(", "def opened(")
    (tmp_path / "own" / "lines.py").write_text(text)
    with pytest.raises(
        BadInput, match=r"lines\.py: .* kind of client\.data\.sources needs, got 'lines' without open, rows$"
    ):
        open_source(config.sources["records"], "sources.records", config.plugins)


@pytest.mark.parametrize(
    "package",
    ["client.solvers", "client.data.sources", "common.backbones", "common.tasks", "server.rounds.aggregators"],
)
def test_an_empty_class_lacks_something_in_every_plugin_folder(package: str, tmp_path: Path) -> None:
    (tmp_path / "hollow.py").write_text("from common.plugins import Plugin\n\n\nclass Hollow(Plugin):\n    pass\n")
    with pytest.raises(BadInput, match="got 'hollow' without "):
        plugin_class(package, "hollow", own=tmp_path)
    for kind in kinds(package):
        assert plugin_class(package, kind).__module__ == f"{package}.{kind}"


def test_optional_members_are_asked_for_only_of_a_kind_that_has_part_of_them(tmp_path: Path) -> None:
    text = """
from common.backbones import Projection
from common.plugins import Plugin


class Given(Plugin):
    projection: Projection | None = None

    @classmethod
    def example(cls, folder): ...

    def architecture(self): ...

    def preprocess(self, item): ...
"""
    for folder, more in (("whole", ""), ("part", "\n    def pretrained(self): ...\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "given.py").write_text(text + more)
    assert plugin_class("common.backbones", "given", own=tmp_path / "whole").__name__ == "Given"
    with pytest.raises(BadInput, match="got 'given' without random$"):
        plugin_class("common.backbones", "given", own=tmp_path / "part")


def test_only_the_kind_that_is_asked_for_is_imported(tmp_path: Path) -> None:
    """A file that lies beside it runs no code; asked in a process of its own, where nothing was imported before."""
    site(tmp_path)
    (tmp_path / "own" / "other.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    settings = {"kind": "lines", "path": str(tmp_path / "lines.txt")}
    script = (
        "from pathlib import Path; from client.data.sources import open_source\n"
        f"open_source({settings!r}, 's', Path({str(tmp_path / 'own')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, check=False
    )
    assert done.returncode == 0
    assert not (tmp_path / "ran").exists()
