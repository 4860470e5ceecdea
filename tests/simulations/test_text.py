"""A federation on texts: the tokenizer travels with the backbone, and every site reads with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from common.backbones.transformers import Transformers
from common.events import MetricsEvaluated, read_run_journal, select_events
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.experiment import run


def test_sites_read_texts_with_a_tokenizer_they_were_sent(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    settings = dict(Transformers.example(tmp_path / "model").settings)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(240):
        finding = ["tumour", "edema"][number % 2]
        words = rng.permutation(["the", "scan", "shows", finding, finding, "no", "an"])[: rng.integers(5, 8)]
        lines.append(f"{' '.join([*words, finding])}\t{finding}")
    (tmp_path / "train.tsv").write_text("\n".join(lines[:180]) + "\n")
    (tmp_path / "test.tsv").write_text("\n".join(lines[180:]) + "\n")
    values = {
        "run": {
            "name": "reports",
            "seed": 1,
            "rounds": 5,
            "backbone": settings,
            "tasks": {"finding": {"kind": "classification", "labels": ["tumour", "edema"]}},
            "solver": {"kind": "dp_gd", "steps": 4, "clip_norm": 1.0, "learning_rate": 1.0},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0},
            "aggregation": {"kind": "mean"},
        },
        "sources": {
            "reports": {
                "kind": "text",
                "path": {part: str(tmp_path / f"{part}.tsv") for part in ("train", "test")},
                "header": ["report", "finding"],
                "text": "report",
            }
        },
        "tasks": {"finding": {"source": "reports", "label": "finding", "missing": "refuse", "public_size": 90}},
        "partition": {"kind": "iid", "num_sites": 2, "split": "source"},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": str(tmp_path / "cache"),
        "runs_dir": str(tmp_path / "runs"),
    }
    config = parse(SimulationConfig, values, base=tmp_path)
    assert run(config, out=tmp_path / "out").status == "completed"
    events = read_run_journal(tmp_path / "out" / "journal.jsonl")
    (metrics,) = select_events(events, MetricsEvaluated)
    assert metrics.pooled["accuracy"] > 0.85
    stored = [path for path in (tmp_path / "out" / "sites").rglob("spec.json")]
    assert len(stored) == 2
    assert not any(str(tmp_path) in path.read_text() for path in stored)
    shutil.rmtree(tmp_path / "model")
