"""Made-up speech for tests: words that are tones, and a small random network that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import wavfile
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from common.backbones.parts.hub.huggingface import silence

RATE = 16000
TONES = {"low": 300.0, "high": 3000.0}


def say_word(word: str, loudness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns one word, some 50 ms long."""
    time = np.arange(rng.integers(700, 900)) / RATE
    return loudness * np.sin(2 * np.pi * TONES[word] * time) + rng.normal(scale=0.01, size=len(time))


def say(words: Sequence[str], loudness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns words with 50 ms of silence between."""
    pause = np.zeros(800)
    return np.concatenate([piece for word in words for piece in (pause, say_word(word, loudness, rng))][1:])


def write_wav(path: Path, samples: NDArray[np.float64]) -> None:
    """Writes a recording of 16 bits."""
    wavfile.write(path, RATE, (2**15 * samples).astype(np.int16))


def write_network(folder: Path) -> None:
    """Writes a wav2vec2 with random weights whose frames are 20 samples apart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    layers = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(feat_extract_norm="layer", num_conv_pos_embedding_groups=4, **sizes, **layers)
    with silence():
        Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


BACKBONE = {
    "kind": "transformers",
    "modality": "audio",
    "pooling": "frames",
    "every": 10,
    "seconds": 0.4,
    "projection": {"normalize": True},
}
"""Settings of the network, but for its folder."""
TASK = {"kind": "ctc", "symbols": list(TONES), "unit": "words", "max_symbols": 4}


def write_whisper(folder: Path, words: Sequence[str]) -> None:
    """Writes an English Whisper with random weights and a vocabulary of words."""
    import tokenizers
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    names = [*words, "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    model = tokenizers.models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=words[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    start, sizes = len(words) + 1, {"encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "max_target_positions": 12}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    ends = {"eos_token_id": start - 1, "bos_token_id": start - 1, "pad_token_id": start - 1}
    config = WhisperConfig(
        vocab_size=len(names), decoder_start_token_id=start, init_std=0.5, num_mel_bins=8, **sizes, **heads, **ends
    )
    torch.manual_seed(1)
    with silence():
        WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
