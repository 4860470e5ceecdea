"""Sentences are translated through the whole of a simulation, and by the model that comes out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headwater
from common.plugins import plugin_class
from common.types import BadInput
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment
from simulations.public.pretrain import pretrain

WORDS = {"the": "der", "scan": "Befund", "shows": "zeigt", "no": "kein", "tumour": "Knoten", "edema": "Schwellung"}
TERMS = {"Knoten": "Schwellung"}
"""A word that the vocabulary has, for one that the public pairs have in its place."""


def write_pairs(folder: Path) -> None:
    """Sentences of some words and their translations word by word, and a small random network that reads them."""
    rng = np.random.default_rng(0)
    plugin_class("common.backbones", "transformers").example(folder)
    for name, count in (("public", 300), ("train", 60), ("test", 24)):
        lines = [rng.choice(list(WORDS), rng.integers(2, 5)).tolist() for _ in range(count)]
        (folder / f"{name}.en").write_text("".join(f"{' '.join(line)}\n" for line in lines), encoding="utf-8")
        written = [" ".join(WORDS[word] for word in line) for line in lines]
        (folder / f"{name}.de").write_text("".join(f"{line}\n" for line in written), encoding="utf-8")


def make_config(folder: Path, **run: Any) -> SimulationConfig:
    sizes = {"max_tokens": 20, "vocabulary": 60, "width": 24, "layers": 1, "heads": 2, "hidden": 32}
    encoder = {"kind": "transformers", "folder": ".", "modality": "text", "max_length": 12, "pooling": "tokens"}
    values: dict[str, Any] = {
        "run": {
            "name": "words",
            "seed": 1,
            "backbone": {"kind": "seq2seq", "encoder": encoder, "weights": "words.safetensors", **sizes},
            "tasks": {"german": {"kind": "seq2seq", "max_tokens": 20, "terms": list(TERMS.values())}},
            "rounds": 20,
            "solver": {"kind": "sgd", "sampling_rate": 1.0, "steps": 1, "learning_rate": 1.0},
            "aggregation": {"kind": "heavy_ball", "rounds": 20, "step": 10.0, "most_momentum": 0.8, "noise": 0.0},
            "privacy": "non_private",
            **run,
        },
        "sources": {
            "pairs": {
                "kind": "pairs",
                "source": {side: f"{side}.en" for side in ("train", "test")},
                "target": {side: f"{side}.de" for side in ("train", "test")},
                "terms": TERMS,
            }
        },
        "tasks": {"german": {"source": "pairs", "label": "target", "missing": "refuse", "public_size": 30}},
        "partition": {"kind": "iid", "num_sites": 2, "split": "source"},
        "unit": "example",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "pretrain": {
            "sources": [{"kind": "pairs", "source": "public.en", "target": "public.de"}],
            "epochs": 50,
            "batch_size": 16,
            "learning_rate": 0.005,
            "seed": 1,
        },
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    return parse(SimulationConfig, values, base=folder)


def simulate(folder: Path, **changes: Any) -> dict[str, float]:
    summary = json.loads(run_experiment(make_config(folder, **changes)).to_json())
    metrics: dict[str, float] = summary["tasks"]["german"]["metrics"]
    return metrics


@pytest.mark.slow
def test_sentences_are_translated_in_the_words_of_the_house(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    with pytest.raises(BadInput, match="run `headwater simulate pretrain CONFIG` first"):
        run_experiment(make_config(tmp_path))
    result = pretrain(make_config(tmp_path), lambda *_: None)
    assert result.train_accuracy is not None and result.train_accuracy > 0.8
    assert pretrain(make_config(tmp_path), lambda *_: None).cached
    untouched = simulate(tmp_path, rounds=1, aggregation={"kind": "heavy_ball", "rounds": 1, "step": 1e-6, "noise": 0})
    plain = simulate(tmp_path)
    assert untouched["terms"] < 0.7 and 0.1 < untouched["bleu"] < 0.8
    assert plain["terms"] > untouched["terms"] + 0.2 and plain["bleu"] > untouched["bleu"] + 0.03
    solver = {"kind": "dp_gd", "sampling_rate": 1.0, "steps": 1, "clip_norm": 0.3, "learning_rate": 1.0}
    private = simulate(tmp_path, solver=solver, privacy={"unit": "example", "delta": 1e-5, "target_epsilon": 80.0})
    assert private["bleu"] != plain["bleu"]
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    (tmp_path / "new.tsv").write_text("text\nthe scan shows tumour\nno edema\n", encoding="utf-8")
    found = headwater.load(folder).predict(tmp_path / "new.tsv")
    assert len(found) == 2 and (found["german.confidence"] > 0).all()
