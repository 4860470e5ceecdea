"""Scans as hospitals have them, series, enhanced files and NIfTI, are one source of volumes for a net of MONAI."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import headwater
from client.data.sources.dicom import write_dicom
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment

PATIENTS, SIDE, STEP_MM = 40, 12, 2.0
BACKBONE = {
    "kind": "monai",
    "model": "UNet",
    "options": {"channels": [8, 16], "strides": [2]},
    "reads": {"volumes": {"size": [SIDE, SIDE, SIDE], "spacing_mm": [1, 1, 1], "window": [-100, 300]}},
    "projection": {"normalize": True},
}


def write_series(folder: Path, values_SHW: NDArray[Any], patient: str, rng: np.random.Generator) -> None:
    folder.mkdir()
    for at in rng.permutation(len(values_SHW)):
        write_dicom(
            folder / f"{rng.integers(1 << 30)}.dcm",
            (values_SHW[at] + 1024).astype(np.uint16),
            PatientID=patient,
            RescaleSlope=1,
            RescaleIntercept=-1024,
            ImagePositionPatient=[0, 0, STEP_MM * at],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[1, 1],
        )


def write_nifti(path: Path, values_SHW: NDArray[Any]) -> None:
    import nibabel

    # DICOM's columns and rows lead to the patient's left and back.
    values_XYZ = values_SHW.transpose(2, 1, 0).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values_XYZ, np.diag([-1.0, -1.0, STEP_MM, 1.0])), path)


@pytest.mark.slow
def test_a_federation_learns_from_series_and_predicts_the_same_of_a_series_and_its_nifti(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    from common.backbones.monai import Monai

    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "scans").mkdir()
    for number in range(PATIENTS):
        scan = np.rint(rng.normal(40, 20, (SIDE // 2, SIDE, SIDE)))
        scan[1:4, 2:9, 2:9] += 150 * (number % 2)
        write_series(tmp_path / "scans" / f"s{number:02d}", scan, f"P{number}", rng)
        if number < 2:
            (tmp_path / "again").mkdir(exist_ok=True)
            write_nifti(tmp_path / "again" / f"s{number:02d}.nii.gz", scan)
        rows.append((f"s{number:02d}", ("no", "yes")[number % 2]))
    sorted((tmp_path / "scans" / "s05").iterdir())[0].unlink()
    with (tmp_path / "scans" / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "lesion"), *rows])
    torch.manual_seed(0)
    save_file(Monai.model_validate(BACKBONE)._build().state_dict(), tmp_path / "net.safetensors")
    values = {
        "run": {
            "name": "lesions",
            "seed": 1,
            "backbone": {**BACKBONE, "weights": "net.safetensors"},
            "tasks": {"lesion": {"kind": "classification", "labels": ["no", "yes"]}},
            "solver": {"kind": "auto"},
            "rounds": 10,
            "privacy": {"unit": "patient", "delta": 1e-5, "target_epsilon": 200.0},
        },
        "sources": {"scans": {"kind": "volumes", "path": "scans/list.csv", "patient_from_tag": True}},
        "tasks": {"lesion": {"source": "scans", "label": "lesion", "missing": "refuse", "public_size": 15}},
        "partition": {"kind": "iid", "num_sites": 2, "split": "hash", "test_fraction": 0.25, "seed": 1},
        "unit": "patient",
        "budget": {"epsilon": 300.0, "delta": 1e-5},
        "noise_seed": 1,
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    summary = json.loads(run_experiment(parse(SimulationConfig, values, base=tmp_path)).to_json())
    assert summary["tasks"]["lesion"]["metrics"]["auroc"] > 0.9
    problems = "".join(path.read_text() for path in (tmp_path / "runs").rglob("problems.csv"))
    assert problems.count("got gaps or uneven ones") == 1 and "P5" not in problems and "s05" not in problems
    (run,) = (tmp_path / "runs").iterdir()
    model = headwater.load(run)
    with pytest.warns(UserWarning, match="1 record"):
        of_folders = model.predict(tmp_path / "scans")
    assert of_folders["file"].tolist() == [f"s{number:02d}" for number in range(PATIENTS) if number != 5]
    of_nifti = model.predict(tmp_path / "again")
    one = model.predict(tmp_path / "scans" / "s01")
    told = ["lesion.no", "lesion.yes"]
    np.testing.assert_allclose(of_nifti[told], of_folders[told][:2], atol=1e-6)
    assert one["file"].tolist() == ["s01"]
    np.testing.assert_array_equal(one[told], of_folders[told][1:2])
    with pytest.warns(UserWarning, match="1 record"):
        of_table = model.predict(tmp_path / "scans" / "list.csv")
    np.testing.assert_array_equal(of_table[told], of_folders[told])
