"""The notebook runs as it stands, from pictures in folders to predictions and figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def write_pictures(folder: Path, assets: Path) -> None:
    """Eighty slices of each of two kinds, as a person would have them."""
    with np.load(assets / "data" / "brain_mri_4class" / "brain_mri_128.npz", allow_pickle=False) as file:
        data = dict(file)
    names = [str(name) for name in data["classes"]]
    for label in ("no_tumor", "pituitary_tumor"):
        (folder / label).mkdir(parents=True)
        chosen = data["train_images"][data["train_labels"] == names.index(label)]
        for number, pixels in enumerate(chosen):
            Image.fromarray(pixels.squeeze()).save(folder / label / f"{number:03}.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_on_a_folder_of_pictures(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "scans", assets)
    monkeypatch.setenv("HEADWATER_PICTURES", str(tmp_path / "scans"))
    monkeypatch.setenv("HEADWATER_WEIGHTS", str(assets / "backbones" / "mobilenet_v2" / "model.safetensors"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (predicted,) = (
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith("model = ")
        for output in cell.outputs
        if output.output_type == "execute_result"
    )
    assert "finding.no_tumor" in predicted and "finding.pituitary_tumor" in predicted
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
