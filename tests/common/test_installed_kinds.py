"""Kinds that an installed package brings by an entry point: a made-up package with one backbone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.model.backbones import load_blob, open_pretrained
from common.plugins import plugin_class, refuse_unknown_kind
from common.types import BadInput

ROOT = Path(__file__).resolve().parents[2]
MODULE = '''
from typing import Any, Literal, final
import numpy as np
from common.backbones import Architecture, Example, Projection
from common.plugins import Plugin
from common.types import BadRecord

@final
class MadeUp(Plugin):
    """Mean and deviation of a series."""
    kind: Literal["made_up"] = "made_up"
    factor: float = 1.0
    projection: Projection | None = None

    @classmethod
    def example(cls, folder):
        return Example({"kind": "made_up"}, [np.arange(4.0) * each for each in range(4)])

    def architecture(self):
        import torch
        return Architecture(torch.nn.Identity(), 2)

    def preprocess(self, item: Any):
        import torch
        if not isinstance(item, np.ndarray):
            raise BadRecord("expected a series")
        return torch.tensor([item.mean() * self.factor, item.std()], dtype=torch.float32)
'''


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """Writes the package as pip would install it; returns the folder."""
    (tmp_path / "made_up_backbones.py").write_text(MODULE)
    about = tmp_path / "made_up-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    lines = ["[headwater.backbones]", "made_up = made_up_backbones", "broken = made_up_absent", "onnx = made_up_absent"]
    (tmp_path / "made_up_failing.py").write_text("raise RuntimeError('q7')\n")
    (tmp_path / "made_up_unfinished.py").write_text("def (\n")
    lines += ["failing = made_up_failing", "unfinished = made_up_unfinished"]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return tmp_path


def run(code: str, site_packages: Path | None) -> str:
    paths = {} if site_packages is None else {"PYTHONPATH": str(site_packages)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **paths}, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_a_backbone_of_an_installed_package_is_opened_travels_and_encodes(
    site_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site_packages))
    backbone = open_pretrained({"kind": "made_up", "factor": 2.0}, "backbone")
    received = load_blob(backbone.blob())
    series_T = np.array([1.0, 2.0, 3.0])
    expected_BD = torch.tensor([[4.0, (2 / 3) ** 0.5]])
    torch.testing.assert_close(received.encode([received.preprocess(series_T)]), expected_BD)
    refuse_unknown_kind("common.backbones", "made_up", "backbone.kind")
    for kind, error in (("broken", "ModuleNotFound"), ("failing", "Runtime"), ("unfinished", "Syntax")):
        with pytest.raises(
            BadInput, match=rf"^backbone\.kind: expected made-up to bring the kind '{kind}', got {error}Error$"
        ):
            open_pretrained({"kind": kind}, "backbone")
    with pytest.raises(BadInput, match=r"backbone\.kind: expected one of .*made_up.*nearest: 'made_up'"):
        open_pretrained({"kind": "made_upp"}, "backbone")
    # The project's own kinds are never replaced.
    assert plugin_class("common.backbones", "onnx").__module__ == "common.backbones.onnx"


def test_another_process_knows_it_only_where_the_package_is_installed(site_packages: Path) -> None:
    code = (
        "from common.plugins import resolve\nfrom common.types import BadInput\n"
        "try:\n    print(resolve('common.backbones', {'kind': 'made_up'}, 'run.backbone'))\n"
        "except BadInput as error:\n    print('REFUSED', error)\n"
    )
    assert "kind='made_up'" in run(code, site_packages)
    assert "REFUSED run.backbone.kind: expected one of" in run(code, None)
