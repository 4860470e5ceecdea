"""The table of architectures: some of its rows, made again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "convnext", "dinov2", "hubert"])
def test_rows_of_the_table_are_what_the_code_does(family: str) -> None:
    spec = importlib.util.spec_from_file_location("architectures", DOCS / "architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    page = (DOCS / "reference" / "architectures.md").read_text(encoding="utf-8").splitlines()
    for row in module.survey(family):
        assert module.format_row(row) in page
