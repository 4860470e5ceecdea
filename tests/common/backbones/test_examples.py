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
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from common.backbones.speaker_encoder import SpeakerEncoder
from common.inputs import Audio
from common.model.backbones import open_pretrained
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


def speech(seconds: float) -> Audio:
    """Noise in which each tenth of a second is of another loudness and colour."""
    rng = np.random.default_rng(0)
    parts = [np.convolve(rng.normal(size=1600), rng.normal(size=8), "same") for _ in range(round(10 * seconds))]
    return Audio((np.concatenate(parts) / 300).astype(np.float32), 16000)


def test_the_speaker_encoders_spectra_are_power_in_slaneys_bands(tmp_path: Path) -> None:
    """Against the filters and spectrogram of transformers, as librosa would make them."""
    backbone = open_pretrained({**SpeakerEncoder.example(tmp_path).settings, "seconds": 2.4}, "b")
    item = speech(2.4)
    assert np.sqrt(np.mean(item.samples_T**2)) < 10 ** (-30 / 20)
    louder = item.samples_T * (10 ** (-30 / 20) / np.sqrt(np.mean(np.square(item.samples_T, dtype=np.float64))))
    filters = mel_filter_bank(201, 40, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    window = window_function(400, "hann")
    expected = spectrogram(louder, window, 400, 160, power=2.0, pad_mode="constant", mel_filters=filters, mel_floor=0.0)
    torch.testing.assert_close(
        backbone.preprocess(item), torch.from_numpy(expected.T.astype(np.float32)), rtol=1e-4, atol=1e-6
    )


def test_the_speaker_encoder_raises_quiet_recordings_and_leaves_loud_ones(tmp_path: Path) -> None:
    backbone = open_pretrained(SpeakerEncoder.example(tmp_path).settings, "b")
    quiet = speech(2.4).samples_T
    quieter, loud, louder = (
        backbone.preprocess(Audio(quiet * np.float32(factor), 16000)) for factor in (0.1, 100.0, 200.0)
    )
    torch.testing.assert_close(quieter, backbone.preprocess(Audio(quiet, 16000)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(louder, 4 * loud)


def test_a_speaker_embedding_is_the_direction_of_the_mean_of_its_windows(tmp_path: Path) -> None:
    settings = SpeakerEncoder.example(tmp_path).settings
    spectra = open_pretrained({**settings, "seconds": 3.2}, "b").preprocess(speech(3.2))
    window = open_pretrained({**settings, "seconds": 1.6}, "b")
    three = open_pretrained({**settings, "seconds": 3.2}, "b").encode([spectra])[0]
    each = window.encode([spectra[start : start + 160] for start in (0, 77, 154)])
    torch.testing.assert_close(each.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(three, each.mean(0) / each.mean(0).norm(), rtol=1e-4, atol=1e-5)


def test_the_same_speaker_weights_are_one_backbone_from_a_checkpoint_and_from_a_wheel(tmp_path: Path) -> None:
    settings = SpeakerEncoder.example(tmp_path).settings
    wheel = tmp_path / "speaker-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(settings["weights"], "speaker/trained.pt")
    packed = open_pretrained({**settings, "weights": str(wheel)}, "b")
    assert packed.digest == open_pretrained(settings, "b").digest
