"""An encoder of texts with a small decoder behind it: pairs of texts as states of the second, and its language.

Features are places: first those of the written text's tokens, each with the state from which its token is told and a
mark; then those of the source's tokens, with what the decoder reads of them. A text to be written has no tokens yet.

# Shapes: B pairs, L places of a source, T of a text, P = T + L, D width, M width of the encoder's states, V tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from common.backbones import QUIET, SPEECH, RawInputs
from common.backbones.parts.hub.modalities import TextInput, open_raw_inputs
from common.backbones.parts.language.decoder import Cache, Decoder
from common.backbones.parts.language.vocabulary import Vocabulary
from common.backbones.parts.layers import PooledModel
from common.inputs import Text
from common.types import BadInput, BadRecord

NONE = -1
"""Stands where a text has no token."""

_ROWS_OF_SOURCE = 3


@final
class Writer(nn.Module):
    """Sources and texts [B, 3 L + T] -> places [B, T + L, D + 1]."""

    vocabulary: Tensor

    def __init__(self, encoder: PooledModel, decoder: Decoder, longest: int, vocabulary_bytes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.longest = longest
        self.register_buffer("vocabulary", torch.zeros(vocabulary_bytes, dtype=torch.uint8))

    @property
    def modality(self) -> TextInput:
        """The encoder's own way of reading a text."""
        assert isinstance(self.encoder.modality, TextInput)
        return self.encoder.modality

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns the states of the texts' tokens, then what is read of the sources; zeros where either has ended."""
        source_BL, tokens_BT = inputs_B[:, : -self.longest], inputs_B[:, -self.longest :]
        source_B3L = torch.unflatten(source_BL, 1, (_ROWS_OF_SOURCE, -1))
        mask_BL = source_B3L[:, 1] > 0
        read_BLD = self.decoder.read_memory(self.encode(source_B3L).to(self.decoder.bias.dtype))
        own_BT, before_BT = tokens_BT != NONE, torch.roll(tokens_BT, 1, dims=1)
        before_BT[:, 0] = self.open_vocabulary().end
        states_BTD = self.decoder(before_BT.clamp(min=0), read_BLD, mask_BL | ~mask_BL.any(dim=1, keepdim=True))
        marked = [_mark(states_BTD, own_BT, SPEECH), _mark(read_BLD, mask_BL, QUIET)]
        # All states have one length, by which they are divided; so are those that are read.
        return torch.cat(marked, dim=1) / _divisors(self.decoder.width, inputs_B.device)

    def encode(self, source_B3L: Tensor) -> Tensor:
        """Returns the encoder's states of sources beside its embeddings of their tokens, [B, L, M]; zeros behind."""
        embed = self.encoder.model.get_input_embeddings()  # type: ignore[operator]
        if torch.compiler.is_exporting():
            output, mask_BL = self.modality.run(self.encoder.model, source_B3L)
            assert mask_BL is not None
            return torch.cat([output.last_hidden_state, embed(source_B3L[:, 0])], dim=2) * mask_BL.unsqueeze(2)
        positions, states = [torch.zeros(0, dtype=torch.long, device=source_B3L.device)], []
        for rows, group_B in self.modality.groups(source_B3L):
            output, mask_BL = self.modality.run(self.encoder.model, group_B)
            assert mask_BL is not None
            both_BLM = torch.cat([output.last_hidden_state, embed(group_B[:, 0])], dim=2) * mask_BL.unsqueeze(2)
            missing = source_B3L.shape[2] - both_BLM.shape[1]
            positions.append(rows)
            states.append(nn.functional.pad(both_BLM, (0, 0, 0, missing))[: len(rows)])
        return torch.cat(states)[torch.argsort(torch.cat(positions))]

    def open_vocabulary(self) -> Vocabulary:
        """Returns the vocabulary whose bytes travelled with the weights. Raises BadInput for other bytes."""
        found: Vocabulary | None = getattr(self, "_opened", None)
        if found is None:
            found = Vocabulary(self.vocabulary.cpu().numpy().tobytes())
            # At a site it comes from elsewhere: one text with a token without a row would end a round.
            if max(found.tokenizer.get_vocab().values()) >= len(self.decoder.embedding.weight):
                raise BadInput("weights: expected a tokenizer whose tokens all have a row, got a number beyond them")
            self._opened = found
        return found

    def preprocess(self, item: Any) -> Tensor:
        """Returns a source and, where there is one, its text, as integers. Raises BadRecord."""
        if not isinstance(item, Text):
            raise BadRecord("expected a text")
        source_3L = self.modality.preprocess(Text(item.first))
        tokens = []
        if item.second is not None:
            if not item.second.strip():
                raise BadRecord("expected a text to write, got an empty one")
            vocabulary = self.open_vocabulary()
            tokens = [*vocabulary.read(item.second), vocabulary.end]
        if len(tokens) > self.longest:
            raise BadRecord(f"expected a text of at most {self.longest - 1} tokens")
        return torch.cat([source_3L.flatten(), torch.tensor(tokens + [NONE] * (self.longest - len(tokens)))])


@final
class _Sources(nn.Module):
    """Tokens of sources as a tokenizer gives them -> inputs of a writer, without a text."""

    def __init__(self, longest_source: int, longest_text: int) -> None:
        super().__init__()
        self.longest_source = longest_source
        self.longest_text = longest_text

    def forward(self, *rows_BL: Tensor) -> Tensor:
        types = [torch.zeros_like(rows_BL[0])] if len(rows_BL) < _ROWS_OF_SOURCE else []
        source_B3L = torch.stack([*rows_BL, *types], dim=1)
        source_B3L = nn.functional.pad(source_B3L, (0, self.longest_source - source_B3L.shape[2]))
        return nn.functional.pad(source_B3L.flatten(1), (0, self.longest_text), value=NONE)


def open_raw_sources(writer: Writer) -> RawInputs:
    """Returns the inputs of a writer that is handed on: a source's tokens; its vocabulary lies beside the tokenizer."""
    # A graph cannot read the bytes of a buffer.
    vocabulary, modality = writer.open_vocabulary(), writer.modality
    raw = open_raw_inputs(modality, None, writer.encoder.tokenizer.cpu().numpy().tobytes())
    files = {**raw.files, "vocabulary.json": vocabulary.data}

    def prepare(item: Any) -> tuple[Tensor, ...]:
        return raw.prepare(Text(item.first) if isinstance(item, Text) else item)

    return replace(raw, module=_Sources(modality.max_length, writer.longest), prepare=prepare, files=files)


def _mark(values_BPD: Tensor, own_BP: Tensor, mark: float) -> Tensor:
    """Returns values with a mark behind them, zeros where there is nothing."""
    marks_BP1 = torch.full_like(values_BPD[..., :1], mark)
    return torch.cat([values_BPD, marks_BP1], dim=2) * own_BP.unsqueeze(2)


def _divisors(width: int, device: torch.device) -> Tensor:
    divisors = torch.full((width + 1,), math.sqrt(width), device=device)
    divisors[-1] = 1.0
    return divisors


class _Known(NamedTuple):
    """State of a decoder while texts are written: what it reads of sources, and of the tokens so far."""

    read: Cache
    mask_BL: Tensor
    said: Cache | None


@dataclass(frozen=True)
class WriterLanguage:
    """The language of a writer (`common.backbones.Language`).

    Attributes:
        writer: the network, whose weights are read when they are asked for.
    """

    writer: Writer

    @property
    def longest(self) -> int:
        """Largest number of a text's tokens, with the one that ends it."""
        return self.writer.longest

    @property
    def end(self) -> int:
        """The token that ends a text."""
        return self.writer.open_vocabulary().end

    @property
    def start(self) -> int:
        """The token before a text."""
        return self.end

    @property
    def scale(self) -> float:
        """The length of a state times that of a usual token's row."""
        return math.sqrt(self.writer.decoder.width) * float(self._length)

    @property
    def embedding_VD(self) -> Tensor:
        """The rows of all tokens, whose mean square length is 1."""
        return self.writer.decoder.embedding.weight.detach() / self._length.float()

    @property
    def bias_V(self) -> Tensor:
        """The tokens' bias; the least number for padding and what is unknown."""
        bias_V = self.writer.decoder.bias.detach().clone()
        bias_V[self.writer.open_vocabulary().unwritten] = torch.finfo(bias_V.dtype).min
        return bias_V

    def read(self, text: str) -> list[int]:
        """Returns a text's tokens, without the one that ends it. Raises BadRecord."""
        return self.writer.open_vocabulary().read(text)

    def write(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""
        return self.writer.open_vocabulary().write(tokens)

    def begin(self, features_BPD: Tensor) -> _Known:
        """Returns what the decoder reads of sources."""
        source_BLD = features_BPD[:, self.longest :]
        mask_BL = source_BLD[..., -1] > 0
        decoder = self._open_decoder(features_BPD.device)
        read = decoder.prepare(source_BLD[..., :-1] * math.sqrt(decoder.width))
        return _Known(read, mask_BL | ~mask_BL.any(dim=1, keepdim=True), None)

    def step(self, known: _Known, tokens_B: Tensor, place: int) -> tuple[Tensor, _Known]:
        """Returns the features from which the token at a place is told, and what is known then.

        Args:
            known: what `begin` or the last step returned.
            tokens_B: the token before that place.
            place: the place, from 0.
        """
        decoder = self._open_decoder(tokens_B.device)
        states_BD, said = decoder.step(tokens_B, place, known.read, known.mask_BL, known.said)
        features_BD = nn.functional.pad(states_BD / math.sqrt(decoder.width), (0, 1), value=SPEECH)
        return features_BD, known._replace(said=said)

    def select(self, known: _Known, rows_B: Tensor) -> _Known:
        """Returns what is known of some rows."""
        said = None if known.said is None else _select(known.said, rows_B)
        return _Known(_select(known.read, rows_B), known.mask_BL[rows_B], said)

    @property
    def _length(self) -> Tensor:
        """The root mean square length of the tokens' rows; no number, because graphs have none."""
        return self.writer.decoder.embedding.weight.detach().double().square().sum(dim=1).mean().sqrt()

    def _open_decoder(self, device: torch.device) -> Decoder:
        decoder = self.writer.decoder
        return decoder if decoder.bias.device == device else copy.deepcopy(decoder).to(device)


def _select(cache: Cache, rows_B: Tensor) -> Cache:
    return [(keys[rows_B], values[rows_B]) for keys, values in cache]
