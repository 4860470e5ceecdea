"""Utterances are transcribed through the whole of a simulation, and by the model that comes out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

import headwater
from common.tasks.parts.transcripts.symbols import count_edits
from common.yaml import load, parse
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment
from tests.spoken import BACKBONE, RATE, TASK, TONES, say_word, write_network, write_wav

ROOT = Path(__file__).resolve().parents[2]


def write_words(folder: Path) -> None:
    """Tones of two heights, each said by two speakers at different loudness, and a small random network."""
    rng = np.random.default_rng(0)
    (folder / "words").mkdir()
    for speaker, loudness in (("ann", 0.4), ("bea", 0.1)):
        for word in TONES:
            for take in range(40):
                write_wav(folder / "words" / f"{word}_{speaker}_{take}.wav", say_word(word, loudness, rng))
    write_network(folder / "network")


def make_config(folder: Path, **run: Any) -> SimulationConfig:
    values: dict[str, Any] = {
        "run": {
            "name": "tones",
            "seed": 1,
            "backbone": {**BACKBONE, "folder": "network"},
            "tasks": {"said": TASK},
            "solver": {"kind": "auto"},
            "rounds": 12,
            "privacy": "non_private",
            **run,
        },
        "sources": {
            "words": {
                "kind": "utterances",
                "path": "words",
                "pattern": r"(?P<word>\w+?)_(?P<speaker>\w+?)_(?P<take>\d+)",
                "word": "word",
                "by": ["speaker"],
                "test": {"take": [str(take) for take in range(8)]},
                "words": [2, 3],
                "pause_s": 0.05,
            }
        },
        "tasks": {"said": {"source": "words", "label": "transcript", "missing": "refuse", "public_size": 24}},
        "partition": {"kind": "column", "by": "speaker", "split": "source"},
        "unit": "example",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    return parse(SimulationConfig, values, base=folder)


def simulate(folder: Path, **changes: Any) -> dict[str, float]:
    summary = json.loads(run_experiment(make_config(folder, **changes)).to_json())
    metrics: dict[str, float] = summary["tasks"]["said"]["metrics"]
    return metrics


@pytest.mark.slow
def test_utterances_are_transcribed_and_so_are_new_recordings(tmp_path: Path) -> None:
    write_words(tmp_path)
    plain = simulate(tmp_path, rounds=48)
    assert plain["wer"] < 0.2 and plain["cer"] < 0.2
    private = simulate(tmp_path, privacy={"unit": "example", "delta": 1e-5, "target_epsilon": 50.0})
    assert plain["wer"] < private["wer"] < 0.9
    folder = min((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    # A recording of its own, at another rate, and one that the model's frames do not reach.
    time = np.arange(800) / RATE
    pitches = ["high", "low", "low"]
    tones = [np.sin(2 * np.pi * TONES[word] * time) for word in pitches]
    whole = 0.2 * np.concatenate([piece for tone in tones for piece in (tone, np.zeros(800))])
    wavfile.write(tmp_path / "new.wav", RATE, (2**15 * whole).astype(np.int16))
    wavfile.write(tmp_path / "long.wav", RATE, np.zeros(RATE, np.int16))
    with pytest.warns(UserWarning, match=r"1 record\(s\) could not be used"):
        found = headwater.load(folder).predict([tmp_path / "long.wav", tmp_path / "new.wav"])
    (said,) = found["said"]
    assert count_edits(said.split(), pitches) <= 1
    assert 0.5 < found["said.confidence"].iloc[0] <= 1.0


def test_a_backbone_without_marks_is_refused(tmp_path: Path) -> None:
    write_words(tmp_path)
    backbone = make_config(tmp_path).run.backbone_specs["backbone"].settings()
    del backbone["every"]
    config = make_config(tmp_path, backbone={**backbone, "pooling": "mean"})
    with pytest.raises(Exception, match="tasks.said: expected a backbone with `pooling: frames`"):
        run_experiment(config)


@pytest.mark.slow
def test_spoken_digits_are_transcribed_under_privacy_better_than_by_the_untouched_model(
    tmp_path: Path, assets: Path
) -> None:
    """Whisper tiny.en with its own decoder, allowed nothing but digits, has .143 on such utterances."""
    changes = ["baselines=[]", f"cache_dir={tmp_path / 'cache'}", f"runs_dir={tmp_path / 'runs'}"]
    assert assets.exists()
    config = load(SimulationConfig, ROOT / "configs/simulations/speech.yaml", changes)
    summary = json.loads(run_experiment(config).to_json())
    assert summary["tasks"]["said"]["metrics"]["wer"] < 0.09
