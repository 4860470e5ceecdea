"""Shared fixtures. Assets are real weights and data that lie beside the checkout; tests skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with real weights and data."""
    folder = Path(os.environ.get("HEADWATER_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip("needs the shared assets: set HEADWATER_ASSETS to their folder")
    return folder
