"""Recordings and their transcripts as a site has them: what cannot be used is one sentence, and costs itself only."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from client.config import SiteConfig
from client.data.feature_store import FeatureStore
from client.data.prepare import Encoding, open_units, prepare
from common.backbones.parts.hub.huggingface import silence
from common.model.backbones import Backbone, open_pretrained
from common.tasks import open_task
from common.yaml import parse

RATE = 16000
TASK = open_task(
    {"kind": "ctc", "symbols": ["yes", "no", "two"], "figures": ["two"] * 10, "unit": "words", "max_symbols": 4},
    "tasks.said",
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A place for every 100 samples, up to 20 of them."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (5, 4), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(feat_extract_norm="layer", num_conv_pos_embedding_groups=4, **sizes, **layers)
    with silence():
        Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    settings = {"kind": "transformers", "folder": str(folder), "modality": "audio", "pooling": "frames"}
    return open_pretrained({**settings, "every": 5, "seconds": 0.125}, "b")


def make_site(folder: Path, rows: Sequence[Sequence[str]], missing: str = "refuse") -> SiteConfig:
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["audio", "transcript"], *rows])
    values = {
        "name": "here",
        "registry": "here",
        "unit": "example",
        "budget": {"epsilon": 1.0, "delta": 1e-5},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {"speech": {"kind": "manifest", "path": "list.csv", "audio": "audio"}},
        "tasks": {"said": {"source": "speech", "label": "transcript", "missing": missing, "public_size": 10}},
        "split": {"test_fraction": 0.0},
        "on_bad_record": "skip",
        "evaluation": "local",
        "state_dir": "state",
    }
    return parse(SiteConfig, values, base=folder)


def write_noise(path: Path, samples: int, rate: int = RATE, channels: int = 1) -> None:
    noise = np.random.default_rng(samples).normal(scale=0.1, size=(samples, channels))
    wavfile.write(path, rate, (2**15 * noise).astype(np.int16).squeeze())


def test_what_cannot_be_used_is_said_in_one_sentence_and_costs_itself_only(tmp_path: Path, backbone: Backbone) -> None:
    files = {"a": (1000, RATE, 1), "stereo": (500, 8000, 2), "long": (2001, RATE, 1), "hours": (10_000_000, 1400, 1)}
    for name, (samples, rate, channels) in {**files, "short": (310, RATE, 1), "b": (1500, RATE, 1)}.items():
        write_noise(tmp_path / f"{name}.wav", samples, rate, channels)
    rows = [
        ("a.wav", "Yes, 2!", None),
        ("stereo.wav", "no no", None),
        ("b.wav", ".", None),  # Nothing is said.
        ("gone.wav", "yes", "missing recording"),
        ("long.wav", "yes", "expected a recording of at most 0.125 s"),
        ("hours.wav", "yes", "expected a recording of at most 0.125 s"),
        ("b.wav", "да", "expected a transcript of the task's symbols, got words that are none of them"),
        ("b.wav", "maybe", "expected a transcript of the task's symbols, got words that are none of them"),
        ("b.wav", "no no yes no no", "expected a transcript of at most 4 symbols"),
        ("b.wav", "", "missing label"),
        ("short.wav", "no no", None),  # Three places: one for the blank between.
        ("short.wav", "yes no yes no", "expected a recording that is long enough for its transcript"),
        ("short.wav", "yes no no", "expected a recording that is long enough for its transcript"),
    ]
    site = make_site(tmp_path, [row[:2] for row in rows])
    encoding = Encoding(FeatureStore(tmp_path / "features"), torch.device("cpu"))
    prepared = prepare(site, {"said": TASK}, {"said": backbone}, encoding, tmp_path / "run" / "data")
    found = {problem.row: problem.reason for problem in prepared.problems}
    assert found == {number: reason for number, (_, _, reason) in enumerate(rows, start=1) if reason}
    records = open_units(tmp_path / "run" / "data", "train", ["said"], torch.device("cpu")).tasks["said"]
    labels = records.labels[records.mask_R]
    said = [[index for index in label if index >= 0] for label in labels[:, :4].tolist()]
    assert sorted(said) == [[], [0, 2], [1, 1], [1, 1]]
    # What is known of places is their number: 1000 samples, 500 at half the rate, 1500 and 310.
    places = {tuple(symbols): int((label > 0).sum()) for symbols, label in zip(said, labels[:, 4:], strict=True)}
    assert places[0, 2] == 10 and places[()] == 15
    assert records.features_RD.shape[1:] == (20, 17)


def test_where_a_site_says_so_an_empty_cell_is_the_transcript_of_silence(tmp_path: Path, backbone: Backbone) -> None:
    write_noise(tmp_path / "a.wav", 1000)
    said = {}
    for missing in ("skip", "read"):
        site = make_site(tmp_path, [("a.wav", "yes"), ("a.wav", "")], missing)
        encoding = Encoding(FeatureStore(tmp_path / "features"), torch.device("cpu"))
        prepared = prepare(site, {"said": TASK}, {"said": backbone}, encoding, tmp_path / missing)
        assert not prepared.problems
        records = open_units(tmp_path / missing, "train", ["said"], torch.device("cpu")).tasks["said"]
        said[missing] = sorted(label[:4].tolist() for label in records.labels[records.mask_R])
    assert said == {"skip": [[0, -1, -1, -1]], "read": [[-1, -1, -1, -1], [0, -1, -1, -1]]}
