"""An untouched Whisper model writes what transformers' own search would, or what it may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from common.backbones.parts.hub.huggingface import Location
from common.backbones.parts.hub.transcriber import open_transcriber
from common.inputs import Audio
from common.types import BadInput, BadRecord
from tests.spoken import RATE, write_network, write_whisper

WORDS = ["one", "two", "three", "maybe"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whisper"
    write_whisper(folder, WORDS)
    return folder


def draw_noise(seed: int, seconds: float = 0.5) -> Audio:
    noise = np.random.default_rng(seed).normal(scale=0.1, size=int(seconds * RATE))
    return Audio(noise.astype(np.float32), RATE)


def search(folder: Path, recording: Audio, banned: list[int]) -> list[int]:
    """The most probable tokens, as transformers finds them."""
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    spectra = WhisperFeatureExtractor.from_pretrained(folder)(
        recording.samples_T, sampling_rate=RATE, return_tensors="pt"
    )
    start = len(WORDS) + 1
    found = super(WhisperForConditionalGeneration, model).generate(
        spectra.input_features,
        decoder_input_ids=torch.tensor([[start, start + 1]]),
        max_new_tokens=10,
        do_sample=False,
        suppress_tokens=[*banned, start, start + 1],
    )
    return [token for token in found[0].tolist() if token < len(WORDS)]


@pytest.mark.parametrize("restricted", [False, True])
def test_it_writes_the_most_probable_tokens_among_those_that_it_may(whisper: Path, restricted: bool) -> None:
    allowed = WORDS[:3] if restricted else WORDS
    transcribe = open_transcriber(
        Location(whisper, None, True), (lambda piece: piece in allowed) if restricted else None
    )
    heard = set()
    for seed, seconds in enumerate((1, 15, 29)):
        recording = draw_noise(seed, seconds)
        expected = search(whisper, recording, [3] if restricted else [])
        text = transcribe(recording)
        assert text.split() == [WORDS[token] for token in expected] and set(text.split()) <= set(allowed)
        heard.add(text)
    assert len(heard) > 1 or restricted


def test_what_it_cannot_hear_is_said_in_one_sentence(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="at most 30 s"):
        open_transcriber(Location(whisper, None, True), None)(draw_noise(0, 31))
    write_network(tmp_path)
    with pytest.raises(BadInput, match="expected for `untouched` a backbone that is part of a Whisper model"):
        open_transcriber(Location(tmp_path, None, True), None)
