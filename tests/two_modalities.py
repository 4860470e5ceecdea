"""Three small hospitals for tests: pictures and texts of the same made-up patients, two random backbones."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from client.config import SiteConfig
from common import messages
from common.backbones.small_cnn import collect_tensors
from common.backbones.transformers import Transformers
from common.model.backbones import Backbone, open_backbones, open_untrained
from common.offers import list_digests, make_offer
from common.run import RunConfig
from common.yaml import parse
from tests.tiny import run_config

TASKS: dict[str, dict[str, Any]] = {
    "shade": {"kind": "classification", "labels": ["dark", "grey", "light"], "backbone": "pictures"},
    "finding": {"kind": "classification", "labels": ["tumour", "edema"], "backbone": "texts"},
}
PATIENTS = 30


@dataclass(frozen=True)
class Hospitals:
    """A run with two backbones, opened as its coordinator has them, and sites named after what they hold."""

    folder: Path
    run: RunConfig
    backbones: dict[str, Backbone]

    @property
    def digests(self) -> dict[str, str]:
        """Of the run's backbones."""
        return list_digests(self.backbones)

    def offer(self, run_id: str = "run-1", run: RunConfig | None = None) -> messages.JoinRequest:
        """What its coordinator asks."""
        return messages.JoinRequest(run_id, make_offer(run or self.run, self.backbones), self.digests)

    def site(self, name: str, tasks: tuple[str, ...], **changes: Any) -> SiteConfig:
        """A hospital with these tasks; `changes` replace whole top-level keys."""
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            write_records(folder, seed=sum(name.encode()))
        manifest = {"kind": "manifest", "path": str(folder / "pictures.csv"), "image": "path"}
        table = {"kind": "text", "path": str(folder / "reports.tsv"), "text": "report"}
        sources = {"pictures": manifest, "reports": table}
        held = {"shade": "pictures", "finding": "reports", "again": "pictures"}
        values: dict[str, Any] = {
            "name": name,
            "registry": f"{name}-patients",
            "unit": "patient",
            "budget": {"epsilon": 100.0, "delta": 1e-5},
            "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
            "sources": {key: {**value, "patient": "patient"} for key, value in sources.items()},
            "tasks": {
                task: {
                    "source": held[task],
                    "label": "finding" if task == "finding" else "shade",
                    "missing": "skip",
                    "public_size": PATIENTS,
                }
                for task in tasks
            },
            "split": {"test_fraction": 0.0},
            "on_bad_record": "stop",
            "evaluation": "local",
            "approval": "automatic",
            "ledger_dir": str(folder / "state" / "ledgers"),
            "state_dir": str(folder / "state"),
            "device": "cpu",
        }
        return parse(SiteConfig, {**values, **changes}, base=folder)


def hospitals(folder: Path, **changes: Any) -> Hospitals:
    """The run, its backbones' files beside it; `changes` replace whole top-level keys of the run."""
    values = {"backbone": None, "backbones": backbones(folder), "tasks": TASKS, "privacy": None, **changes}
    values["privacy"] = values["privacy"] or {"unit": "patient", "delta": 1e-5, "noise_multiplier": 2.0}
    run = run_config(**values)
    return Hospitals(folder, run, open_backbones(run))


def backbones(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of a small convolutional net and of a small BERT, both random, with their files under a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"kind": "small_cnn", "input_size": 12, "channels": [4, 8]}
    module = open_untrained(pictures, "pictures", seed=0).module
    save_file(collect_tensors(module, None), folder / "pictures.safetensors")
    (folder / "texts").mkdir(exist_ok=True)
    texts = dict(Transformers.example(folder / "texts").settings)
    return {"pictures": {**pictures, "weights": str(folder / "pictures.safetensors")}, "texts": texts}


def write_records(folder: Path, seed: int) -> None:
    """Each patient has two pictures and one report, but the last one no picture."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(PATIENTS - 1):
        for number in range(2):
            shade = int(rng.integers(0, 3))
            grey = np.clip(60 + 70 * shade + 10 * rng.normal(size=(12, 12)), 0, 255).astype(np.uint8)
            path = folder / f"{patient}-{number}.png"
            Image.fromarray(grey, "L").save(path)
            rows.append([path.name, f"p{patient}", TASKS["shade"]["labels"][shade]])
    _write(folder / "pictures.csv", ["path", "patient", "shade"], rows, ",")
    reports = []
    for patient in range(PATIENTS):
        finding = TASKS["finding"]["labels"][int(rng.integers(0, 2))]
        words = rng.permutation(["the", "scan", "shows", "no", "an"])[: rng.integers(2, 5)]
        reports.append([f"{' '.join(words)} {finding} {finding}", f"p{patient}", finding])
    _write(folder / "reports.tsv", ["report", "patient", "finding"], reports, "\t")


def _write(path: Path, header: list[str], rows: list[list[str]], separator: str) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
