"""A pre-trained model of speech as it is, which writes what it hears: an adapted one is compared with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import tokenizers
import torch
from transformers import AutoModelForSpeechSeq2Seq, PreTrainedModel

from common.backbones.parts.audio import resample
from common.backbones.parts.hub.huggingface import Location, read_config, read_tokenizer, silence
from common.backbones.parts.hub.modalities import open_feature_extractor
from common.errors import instead
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from common.inputs import Audio

Transcribe = Callable[["Audio"], str]
"""A recording -> what a model writes of it."""

_MOST_TOKENS = 100
"""Tokens after which writing ends; an untrained decoder may repeat itself for ever."""

_LANGUAGE = re.compile(r"<\|[a-z]{2,3}\|>")
_ENGLISH_TOKENS = 51864
"""Tokens of Whisper models that know English alone and are told no language."""


def open_transcriber(location: Location, allows: Callable[[str], bool] | None) -> Transcribe:
    """Returns what a Whisper model writes of a recording, token by token the most probable.

    Args:
        location: the model.
        allows: tells whether a piece of text may be written; None for all. Special tokens never are.

    Raises:
        BadInput: it is no such model, or its files are incomplete.
    """
    config = read_config(location.settings("config.json") or {})
    processor = location.settings("preprocessor_config.json", "processor_config.json")
    if config.model_type != "whisper" or processor is None:
        raise BadInput("baselines: expected for `untouched` a backbone that is part of a Whisper model, got another")
    extractor = open_feature_extractor(processor)
    tokenizer = tokenizers.Tokenizer.from_buffer(read_tokenizer(location))
    model = _load(location)
    start, end = int(config.decoder_start_token_id), int(config.eos_token_id)
    plain = [token for token in range(config.vocab_size) if token < end]
    written = [token for token in plain if allows is None or allows(tokenizer.decode([token]))]
    allowed_V = torch.full((config.vocab_size,), -torch.inf)
    allowed_V[[*written, end]] = 0.0
    languages = [token for text, token in tokenizer.get_vocab().items() if _LANGUAGE.fullmatch(text)]

    @torch.inference_mode()
    def transcribe(recording: Audio) -> str:
        samples_T = resample(recording, int(extractor.sampling_rate))
        if len(samples_T) > extractor.n_samples:
            raise BadRecord(f"expected a recording of at most {extractor.chunk_length:g} s")
        inputs = extractor(samples_T, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
        encoded = model.get_encoder()(inputs)
        tokens = [start]
        if config.vocab_size > _ENGLISH_TOKENS and languages:
            tokens.append(languages[int(_tell_next(model, encoded, tokens)[languages].argmax())])
            tokens += [token for token in [tokenizer.token_to_id("<|transcribe|>")] if token is not None]
        tokens += [token for token in [tokenizer.token_to_id("<|notimestamps|>")] if token is not None]
        first, most = len(tokens), min(len(tokens) + _MOST_TOKENS, config.max_target_positions)
        while len(tokens) < most and tokens[-1] != end:
            tokens.append(int((_tell_next(model, encoded, tokens) + allowed_V).argmax()))
        text: str = tokenizer.decode([token for token in tokens[first:] if token != end])
        return text

    return transcribe


def _load(location: Location) -> PreTrainedModel:
    try:
        with silence():
            model: PreTrainedModel = AutoModelForSpeechSeq2Seq.from_pretrained(
                str(location.name),
                revision=location.revision or "main",
                local_files_only=location.local_files_only,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"folder: expected the safetensors weights of a Whisper model{instead(error)}") from error
    return model.float().train(False)


def _tell_next(model: PreTrainedModel, encoded: object, tokens: list[int]) -> torch.Tensor:
    """Returns logits_V of the token behind those that are written."""
    # Each time from the first: texts of a few words need no memory of keys.
    logits_V: torch.Tensor = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
    return logits_V
