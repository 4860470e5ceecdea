"""Frames of recordings: a model's own frames at a recording's exact length, centred, averaged to places, and marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from common.backbones import QUIET, SPEECH
from common.backbones.parts.hub.frames import find_cross_attention
from common.backbones.parts.hub.huggingface import silence
from common.backbones.parts.projection import find_top_directions
from common.inputs import Audio
from common.model.backbones import Backbone, load_blob, open_pretrained, open_random
from common.types import BadInput, BadRecord

RATE = 16000
HOP = 20


def save(folder: Path, model: Any, extractor: Any) -> dict[str, Any]:
    with silence():
        model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return {"kind": "transformers", "folder": str(folder), "modality": "audio", "pooling": "frames"}


@pytest.fixture
def wave(tmp_path: Path) -> dict[str, Any]:
    """A model of samples, with a frame for every 20 of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(feat_extract_norm="group", num_conv_pos_embedding_groups=4, **sizes, **layers)
    settings = save(tmp_path, Wav2Vec2Model(config), Wav2Vec2FeatureExtractor(do_normalize=True))
    return {**settings, "seconds": 0.1, "every": 8}


@pytest.fixture
def whisper(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 12, "max_target_positions": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(max_source_positions=200, num_mel_bins=8, **sizes, **heads, **tokens)
    settings = save(tmp_path, WhisperModel(config), WhisperFeatureExtractor(feature_size=8, chunk_length=4))
    return {**settings, "part": "encoder", "seconds": 2.0, "every": 4}


def record(samples: int, rate: int = RATE, seed: int = 0) -> Audio:
    return Audio(np.random.default_rng(seed).normal(scale=0.2, size=samples).astype(np.float32), rate)


def encode(backbone: Backbone, *items: Audio) -> torch.Tensor:
    return backbone.encode([backbone.preprocess(item) for item in items])


def average(frames_TD: torch.Tensor, every: int) -> torch.Tensor:
    centred_TD = frames_TD - frames_TD.mean(0)
    return torch.stack([part.mean(0) for part in torch.split(centred_TD, every)])


def test_places_are_means_of_the_models_own_frames_and_zero_behind_the_recording(wave: dict[str, Any]) -> None:
    backbone = open_pretrained(wave, "b")
    assert backbone.grid == (10,) and backbone.num_marks == 1 and backbone.feature_dim == 17
    clips = [record(900), record(1600, seed=1), record(330, seed=2)]
    together = encode(backbone, *clips)
    model = Wav2Vec2Model.from_pretrained(wave["folder"]).eval()
    for features_PD, clip in zip(together, clips, strict=True):
        standard = (clip.samples_T - clip.samples_T.mean()) / np.sqrt(clip.samples_T.var() + 1e-7)
        with torch.no_grad():
            frames_TD = model(torch.from_numpy(standard)[None]).last_hidden_state[0]
        expected = average(frames_TD, 8)
        torch.testing.assert_close(features_PD[: len(expected), :-1], expected, rtol=1e-4, atol=1e-5)
        assert bool((features_PD[: len(expected), -1] > 0).all())
        assert not features_PD[len(expected) :].any()
        torch.testing.assert_close(encode(backbone, clip)[0], features_PD, rtol=1e-4, atol=1e-5)


def test_whispers_encoder_reads_a_second_of_silence_behind_a_recording_and_not_thirty(whisper: dict[str, Any]) -> None:
    backbone = open_pretrained(whisper, "b")
    clip = record(16000)
    own, steps = 50, 200
    # The library's own forward pass, of an encoder that has as many positions as there are frames.
    whole = WhisperModel.from_pretrained(whisper["folder"]).eval()
    config = WhisperConfig(**{**whole.config.to_dict(), "max_source_positions": steps // 2})
    encoder = WhisperEncoder(config).eval()
    state = whole.encoder.state_dict()
    state["embed_positions.weight"] = state["embed_positions.weight"][: steps // 2]
    encoder.load_state_dict(state)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper["folder"])
    mel = extractor(clip.samples_T, sampling_rate=RATE, max_length=steps * 160, return_tensors="pt")["input_features"]
    with torch.no_grad():
        frames_TD = encoder(mel).last_hidden_state[0, :own]
    features_PD = encode(backbone, clip)[0]
    torch.testing.assert_close(features_PD[:13, :-1], average(frames_TD, 4), rtol=1e-3, atol=1e-5)
    assert backbone.grid == (25,) and not features_PD[13:].any()


def test_a_place_is_marked_as_quiet_where_it_is_far_below_the_loudest(wave: dict[str, Any]) -> None:
    backbone = open_pretrained(wave, "b")
    clip = record(1600)
    clip.samples_T[2 * 160 : 4 * 160] *= 0.01
    clip.samples_T[5 * 160 : 6 * 160] *= 0.1
    marks_P = encode(backbone, clip)[0, :, -1]
    quiet = [2, 3]
    assert marks_P.tolist() == pytest.approx([QUIET if place in quiet else SPEECH for place in range(10)])
    # It is relative to the recording itself.
    faint = Audio(clip.samples_T * 1e-3, RATE)
    assert torch.equal(encode(backbone, faint)[0, :, -1], marks_P)
    silent = Audio(np.zeros(1600, np.float32), RATE)
    assert encode(backbone, silent)[0, :, -1].tolist() == pytest.approx([QUIET] * 10)


def test_a_decoder_says_which_directions_are_kept_and_marks_are_no_direction(whisper: dict[str, Any]) -> None:
    clip = record(8000)
    raw_PD = encode(open_pretrained(whisper, "b"), clip)[0]
    backbone = open_pretrained({**whisper, "projection": {"dim": 3, "normalize": True}}, "b")
    projected_PD = encode(backbone, clip)[0]
    rows_KD = find_cross_attention(WhisperModel.from_pretrained(whisper["folder"]))
    assert rows_KD is not None and rows_KD.shape == (4 * 16, 16)
    expected = nn.functional.normalize(raw_PD[:, :-1] @ find_top_directions(rows_KD, 3), dim=-1)
    torch.testing.assert_close(projected_PD[:, :-1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(projected_PD[:, -1], raw_PD[:, -1])
    assert torch.equal(encode(load_blob(backbone.blob()), clip)[0], projected_PD)
    shape = encode(open_random({**whisper, "projection": {"dim": 3, "normalize": True}}, "b", seed=1), clip).shape
    assert shape == (1, *projected_PD.shape)


def test_without_a_decoder_directions_are_random_and_the_same_everywhere(wave: dict[str, Any]) -> None:
    settings = {**wave, "projection": {"dim": 4, "normalize": False}}
    first, second = (open_pretrained(settings, "b") for _ in range(2))
    assert first.digest == second.digest
    matrix_DP = first.module.projection.matrix
    torch.testing.assert_close(matrix_DP.T @ matrix_DP, torch.eye(4), rtol=0, atol=1e-5)


def test_a_recording_at_another_rate_has_the_same_frames(whisper: dict[str, Any]) -> None:
    backbone = open_pretrained(whisper, "b")
    time = np.arange(16000) / RATE
    tone = (0.3 * np.sin(2 * np.pi * 440 * time) * (1.5 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)
    fast, slow = encode(backbone, Audio(tone, RATE), Audio(tone[::2].copy(), 8000))
    assert torch.cosine_similarity(fast.flatten(), slow.flatten(), dim=0) > 0.98


def test_what_is_too_long_is_left_out_because_its_words_would_be_cut(wave: dict[str, Any]) -> None:
    backbone = open_pretrained(wave, "b")
    backbone.preprocess(record(1600))
    with pytest.raises(BadRecord, match=r"at most 0\.1 s"):
        backbone.preprocess(record(1601))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality": "image"}, "`frames` only with modality audio"),
        ({"pooling": "mean"}, "every: expected it only beside"),
        ({"projection": {"normalize": True, "kernel": {"width": 1.0, "dim": 8}}}, "no `kernel`"),
        ({"part": None}, "or Whisper's encoder"),
        ({"seconds": 3.5}, "seconds: expected at most 3 for this model"),
    ],
)
def test_settings_that_no_frames_come_from_are_refused(
    whisper: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        open_pretrained({**whisper, **changes}, "b")


def test_settings_without_frames_travel_as_they_did_before_there_were_any(wave: dict[str, Any]) -> None:
    del wave["every"]
    wave["pooling"] = "mean"
    assert "every" not in open_pretrained(wave, "b").public_spec()
