"""Backbones brought in one file each, against facts known of their real weights."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.io import wavfile
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from common.backbones import open_pretrained
from common.items import Audio
from common.types import BadInput

# keras.datasets order, which the weights' classifier keeps.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_the_cifar_resnet_classifies_cifar_10(assets: Path) -> None:
    weights = assets / "backbones" / "cifar_resnet20" / "model.safetensors"
    backbone = open_pretrained({"kind": "cifar_resnet", "weights": str(weights)}, "b")
    archive = zipfile.ZipFile(assets / "data" / "cifar10_jpg" / "cifar10_jpg_5000_2000.zip")
    names = sorted(name for name in archive.namelist() if name.startswith("test/") and name.endswith(".jpg"))[::4]
    inputs = [backbone.preprocess(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    state = load_file(weights)
    logits = backbone.encode(inputs) @ state["linear.weight"].T + state["linear.bias"]
    truth = torch.tensor([CLASSES.index(name.split("/")[1]) for name in names])
    accuracy = float((logits.argmax(1) == truth).float().mean())
    # 91.7 % on PNG files as published; JPEG costs some.
    assert 0.80 < accuracy < 0.96


def test_a_depth_that_no_cifar_resnet_has_is_refused() -> None:
    with pytest.raises(BadInput, match=r"b\.depth: .*6n \+ 2 layers.*got 18"):
        open_pretrained({"kind": "cifar_resnet", "depth": 18}, "b")


@pytest.mark.slow
def test_the_speech_embedding_tells_spoken_digits_apart(assets: Path) -> None:
    """The known linear probe: .980 on takes 0 to 4 of each speaker and digit."""
    weights = assets / "backbones" / "google_speech_embedding" / "model.safetensors"
    backbone = open_pretrained({"kind": "speech_embedding", "weights": str(weights)}, "b")
    archive = zipfile.ZipFile(assets / "data" / "fsdd" / "recordings.zip")
    features, digits, held_out = [], [], []
    inputs = []
    for name in sorted(archive.namelist()):
        rate, samples = wavfile.read(io.BytesIO(archive.read(name)))
        inputs.append(backbone.preprocess(Audio(samples.astype(np.float32) / 32768, rate)))
        digits.append(int(name.split("_")[0]))
        held_out.append(int(name.removesuffix(".wav").split("_")[2]) < 5)
    for start in range(0, len(inputs), 250):
        features.append(backbone.encode(inputs[start : start + 250]).numpy())
    test, labels = np.array(held_out), np.array(digits)
    scaled = StandardScaler().fit_transform(np.concatenate(features))
    probe = LogisticRegression(max_iter=300).fit(scaled[~test], labels[~test])
    assert probe.score(scaled[test], labels[test]) > 0.97


def test_the_band_of_a_tones_pitch_is_its_loudest_whatever_the_volume_and_length() -> None:
    backbone = open_pretrained({"kind": "log_mel", "bands": 40}, "b")
    edges = np.linspace(2595 * np.log10(1 + 60 / 700), 2595 * np.log10(1 + 7600 / 700), 42)
    centres = 700 * (10 ** (edges[1:-1] / 2595) - 1)
    for pitch in (300.0, 1000.0, 4000.0):
        time = np.arange(16000) / 16000
        tone = np.sin(2 * np.pi * pitch * time).astype(np.float32)
        loud = backbone.preprocess(Audio(tone, 16000))
        quiet = backbone.preprocess(Audio(tone[:8000] / 100, 16000))
        assert int(loud[:40].argmax()) == np.abs(centres - pitch).argmin()
        torch.testing.assert_close(loud[:40], quiet[:40], atol=0.3, rtol=0)
    with pytest.raises(BadInput, match="up to half of sample_rate"):
        open_pretrained({"kind": "log_mel", "sample_rate": 8000}, "b")
