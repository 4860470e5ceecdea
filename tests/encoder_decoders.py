"""Folders of tiny encoder-decoders with random weights: Whisper, Marian and T5."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from common.backbones.encoder_decoder import EncoderDecoder
from common.backbones.parts.hub.huggingface import silence
from common.inputs import Audio, Text

FIGURES = ["zero", "one", "two"]
SYMBOLS = {"zero": "0", "one": "1", "two": "2"}


def write_tokenizer(folder: Path, special: list[str], words: list[str], end: str) -> None:
    numbers = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token=special[-1]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        f"$A {end}", special_tokens=[(end, numbers[end])]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_whisper(folder: Path) -> dict[str, Any]:
    """One second of sound at most; a prefix of two tokens."""
    write_tokenizer(folder, ["<|end|>", "<|start|>", "<|notimestamps|>", "<unk>"], ["0", "1", "2", "no"], "<|end|>")
    sizes = {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 100, "max_target_positions": 16}
    sizes |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    numbers = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=9, init_std=0.4, dropout=0.1, **sizes, **numbers)
    with torch.random.fork_rng(devices=[]), silence():
        torch.manual_seed(0)
        WhisperForConditionalGeneration(config).save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    (folder / "preprocessor_config.json").write_text(extractor.to_json_string())
    return {"kind": "encoder_decoder", "folder": str(folder), "max_tokens": 6, "seconds": 0.5}


def write_marian(folder: Path) -> dict[str, Any]:
    """Texts of eleven words."""
    settings = dict(EncoderDecoder.example(folder).settings)
    write_tokenizer(folder, ["</s>", "<pad>", "<unk>"], ["0", "1", "2", "no", "tumour", "an", "edema", "."], "</s>")
    values = json.loads((folder / "config.json").read_text())
    values |= {"pad_token_id": 1, "decoder_start_token_id": 1}
    (folder / "config.json").write_text(json.dumps(values))
    return {**settings, "max_tokens": 6}


def write_t5(folder: Path) -> dict[str, Any]:
    """Texts of ten words; the embeddings of T5 1.0 are one."""
    write_tokenizer(folder, ["<pad>", "</s>", "<unk>"], ["0", "1", "2", "no", "tumour", "an", "edema"], "</s>")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 12}
    config = T5Config(**sizes, decoder_start_token_id=0, initializer_factor=2.0, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]), silence():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return {"kind": "encoder_decoder", "folder": str(folder), "max_tokens": 6, "max_length": 12}


WRITERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "whisper": write_whisper,
    "marian": write_marian,
    "t5": write_t5,
}

CROSS = {
    "whisper": [f"encoder_attn.{name}" for name in ("q_proj", "v_proj", "out_proj")],
    "marian": [f"encoder_attn.{name}" for name in ("q_proj", "v_proj", "out_proj")],
    "t5": [f"EncDecAttention.{name}" for name in ("q", "v", "o")],
}
"""Layers by which a decoder reads its encoder."""


def make_items(name: str) -> list[Any]:
    """Sources of different lengths."""
    if name != "whisper":
        return [Text(text) for text in ("0 1 no 2 an", "2", "no tumour 1", "1 1 1 1 1 1 1 1 0")]
    rng = np.random.default_rng(0)
    return [Audio(rng.standard_normal(length).astype(np.float32) / 4, 16000) for length in (7900, 1700, 4000, 6000)]
