"""Texts that a backbone writes, such as translations, from a head on the states before its tokens are told.

The backbone has a decoder and a vocabulary of its own, of public text alone (`common.backbones.Language`). A head maps
each state to another, before the public embedding tells a token of it; it begins as the backbone's own way. The loss is
that of the true text's tokens, each told behind the true ones (teacher forcing); what is predicted is written with the
head inside the loop.

# Shapes: B texts, P places, T places of a text, C tokens of one, D features of a state, V tokens, S of a statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.backbones import DecoderLanguage, DecoderPart
from common.inputs import CellName, CellNames
from common.plugins import Plugin
from common.run import drop_unset
from common.tasks import SparseRows, Statistic, TaskExample
from common.tasks.parts.head import HeadSettings
from common.tasks.parts.rates import RATE, Array, compute_ratio
from common.tasks.parts.transcripts.errors import ErrorRates
from common.tasks.parts.transcripts.overlap import (
    CHAR_ORDER,
    WORD_ORDER,
    compute_bleu,
    compute_chrf,
    count_matches,
    split_words,
)
from common.tasks.parts.transcripts.spelling import Spelling
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from common.backbones import Language

NONE = -1
"""Behind the last token of a label."""

_CHARS_OF_TOKEN = 6
"""Characters of a usual token, with which the largest number of a text's characters is set."""

_USUAL_TOKENS = 16
_TEXTS = 64


@final
class Seq2seq(Plugin):
    """Settings of texts that a backbone writes.

    Attributes:
        max_tokens: largest number of a text's tokens, with the one that ends it, as the backbone has places for; texts
            with more are bad records.
        rates: whether texts are judged as translations (BLEU and chrF) or as transcripts (word and character errors).
        symbols: word -> what the backbone writes for it: nothing else is read or written then, and the head has a row
            of its own for each token of theirs. None for all that the backbone writes.
        decoder: what trains of the backbone's decoder, where it is a part of the head; null for nothing.
        terms: words of which is told how many of those in the references the written texts have too, such as a house's
            own terms.
        beam: number of texts that are kept at each token while one is written; 1 takes the most probable token.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file; without a bias, because the mark of a place serves as one.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    max_tokens: Annotated[int, Field(ge=2, le=1024)]
    rates: Literal["translation", "transcript"] = "translation"
    symbols: Annotated[dict[CellName, CellName], Field(min_length=1, max_length=10_000)] | None = None
    decoder: DecoderPart | None = None
    terms: CellNames = ()
    beam: Annotated[int, Field(ge=1, le=64)] = 1
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(bias=False), alias="head")
    _language: Language | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self) -> Seq2seq:
        own = self.head_settings
        if own.bias or own.centre or own.prior:
            raise ValueError("head: expected `bias: false`, no `centre` and no `prior`; a place's mark serves as bias")
        if self.terms and self.rates == "transcript":
            raise ValueError("terms: expected them only beside `rates: translation`")
        if self._spelling is not None and (fault := self._spelling.find_fault()):
            raise ValueError(fault)
        return self

    @model_serializer(mode="wrap")
    def _serialize_as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return drop_unset(self, handler(self), ("rates", "symbols", "decoder"))

    @classmethod
    def example(cls) -> TaskExample:
        """Returns short and long texts."""
        settings = {"kind": "seq2seq", "max_tokens": 8, "terms": ["Klampfe", "Fagott"]}
        long = ["Klampfe Fagott Fagott Klampfe Klampfe Fagott Klampfe"]
        return TaskExample(settings, [["Fagott"], long, ["Klampfe Klampfe Fagott Klampfe"], ["Klampfe"]], grid=(10,))

    def open_on(self, language: Language) -> Seq2seq:
        """Returns the task with the language of its backbone. Raises BadInput: it has places for other texts."""
        if language.longest != self.max_tokens:
            raise BadInput(
                f"max_tokens: expected {language.longest}, as the backbone has places for, got {self.max_tokens}"
            )
        chosen = self.model_copy()
        if isinstance(language, DecoderLanguage):
            if self._spelling is not None:
                language = language.restrict(list(self._spelling.written.values()))
        elif self.symbols is not None or self.decoder is not None:
            key = "symbols" if self.symbols is not None else "decoder"
            raise BadInput(f"{key}: expected it only on a backbone of kind encoder_decoder, got another")
        chosen._language = language
        return chosen

    @property
    def language(self) -> Language:
        """The language of the task's backbone."""
        # A programming error: whoever trains or judges has the backbone.
        assert self._language is not None, "expected a task that was opened on its backbone"
        return self._language

    @property
    def reads_places(self) -> bool:
        """The head's outputs are those of places."""
        return True

    @property
    def codec(self) -> TextCodec:
        """Texts as tokens."""
        return TextCodec(self.max_tokens, self._language, self._spelling)

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BPD -> outputs_BPD of which the public embedding makes logits.

        Where the backbone's decoder is a part of it, it reads the tokens before each place beside the features.
        """
        language = self._language
        if not isinstance(language, DecoderLanguage):
            return self.head_settings.build(feature_dim, feature_dim - 1)
        from common.tasks.parts.transcripts.writing import WritingHead

        outputs, features = language.find_map_shape()
        decoder = language.open_decoder()
        if self.decoder is not None:
            language.open_part(decoder, self.decoder)
        return WritingHead(decoder, self.head_settings.build(features, outputs))

    def start_head(self, head: nn.Module) -> None:
        """Sets a head's weights so that it tells what the backbone itself would. Raises BadInput: it is not linear."""
        import torch

        language, last = self.language, self._split_head(head)[1]
        if not isinstance(last, torch.nn.Linear):
            raise BadInput("head.hidden: expected none, because a head of texts begins as the backbone's own")
        with torch.no_grad():
            if isinstance(language, DecoderLanguage):
                last.weight.copy_(language.make_first_map())
            else:
                last.weight.copy_(language.scale * torch.eye(*last.weight.shape))

    def force(self, head: nn.Module, features_BPD: Tensor, labels: Tensor) -> Tensor:
        """Returns a head's outputs at the places of the true texts, each told behind the true tokens before it.

        Args:
            head: a head of the task.
            features_BPD: features of the records.
            labels: their labels.
        """
        if self._split_head(head)[0] is None:
            outputs_BPD: Tensor = head(features_BPD)
            return outputs_BPD
        import torch

        before_BT = torch.roll(labels.long().clamp(min=0), 1, dims=1)
        before_BT[:, 0] = self.language.start
        outputs_BTK: Tensor = head(features_BPD, before_BT)
        return outputs_BTK

    def generate(self, head: nn.Module, features_BPD: Tensor) -> Tensor:
        """Returns the outputs [B, T, D + 1] of texts that are written with a head (`generating.write_texts`)."""
        from common.tasks.parts.transcripts.generating import write_texts

        language, (decoder, last) = self.language, self._split_head(head)
        if decoder is not None and isinstance(language, DecoderLanguage):
            language = language.write_through(decoder)
        return write_texts(language, last, features_BPD, self.beam)

    def _split_head(self, head: nn.Module) -> tuple[nn.Module | None, nn.Module]:
        """Returns the decoder of a head, None where it has none, and its linear map."""
        from common.tasks.parts.transcripts.writing import WritingHead

        return (head.decoder, head.last) if isinstance(head, WritingHead) else (None, head)

    def place_label(self, label: Tensor, marks_P: Tensor) -> Tensor:
        """Returns the label as it is. Raises BadRecord: the record has places for a shorter text only."""
        if isinstance(self._language, DecoderLanguage):
            # The places are those of the source alone.
            return label
        if int((label != NONE).sum()) > int((marks_P[: self.max_tokens] > 0).sum()):
            raise BadRecord("expected the label to be the text that the backbone reads beside the source")
        return label

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns each text's mean loss of its tokens; 0 for a label that is missing."""
        import torch
        from torch.nn import functional

        from common.tasks.parts.transcripts.generating import open_logits

        outputs_BPD = outputs if outputs.dim() > 2 else outputs.unsqueeze(1)
        count = min(self.max_tokens, outputs_BPD.shape[1])
        outputs_BTD, tokens_BT = outputs_BPD[:, :count], labels[:, :count].long()
        # Logits of many texts would fill the memory.
        parts = zip(torch.split(outputs_BTD, _TEXTS), torch.split(tokens_BT.clamp(min=0), _TEXTS), strict=True)
        tell = open_logits(self.language, outputs.device)
        losses = [
            functional.cross_entropy(tell(own_BTD).movedim(2, 1), own_BT, reduction="none") for own_BTD, own_BT in parts
        ]
        losses_BT = torch.cat(losses).to(outputs.dtype)
        own_BT = tokens_BT != NONE
        return (losses_BT * own_BT).sum(dim=1) / own_BT.sum(dim=1).clamp(min=1)

    def loss_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the gradients of `losses` by the outputs; each text's tokens are computed apart from all others."""
        import torch

        from common.tasks.parts.transcripts.generating import open_logits

        gradient, tell = torch.zeros_like(outputs), open_logits(self.language, outputs.device)
        embedding_VD = self.language.embedding_VD.to(outputs.device)
        for row, tokens_T in enumerate(labels[:, : outputs.shape[1]].long()):
            (own_C,) = (tokens_T != NONE).nonzero(as_tuple=True)
            if len(own_C):
                slopes_CV = tell(outputs[row, own_C]).softmax(dim=1)
                slopes_CV[torch.arange(len(own_C)), tokens_T[own_C]] -= 1.0
                gradient[row, own_C] = ((slopes_CV @ embedding_VD) / len(own_C)).to(outputs.dtype)
        return gradient

    @property
    def smoothness(self) -> float:
        """Curvature of a token's loss by its outputs: the largest variance of tokens' rows along a direction."""
        return 1.0

    @property
    def first_slope(self) -> float:
        """Length of a text's gradient whose tokens are told as if by chance, over states that are not alike."""
        return 1.0 / math.sqrt(_USUAL_TOKENS / 3)

    @property
    def tolerated_noise(self) -> float:
        """The deviation of noise in an output that costs little."""
        return 0.1

    @property
    def centres(self) -> bool:
        """A state's mean is gone by its norm."""
        return False

    def read_text(self, cell: str) -> str:
        """Returns a text as it would be written. Raises BadRecord."""
        return self.codec.normalise(cell)

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the name of the only column."""
        del num_outputs
        return ["confidence"]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns confidence_B1: the geometric mean of the probabilities of a text's tokens."""
        told_BT, tokens_BT = self._tell(outputs)
        own_BT = tokens_BT != NONE
        return (told_BT.sum(dim=1, keepdim=True) / own_BT.sum(dim=1, keepdim=True).clamp(min=1)).exp().float()

    def describe_texts(self) -> dict[str, Any]:
        """Returns the rule by which a text is read. Raises BadInput: several texts are kept while one is written."""
        if self.beam > 1:
            raise BadInput(f"beam: expected 1, because an exported network takes the best token, got {self.beam}")
        return {"rule": "tokens", "file": "vocabulary.json", "end": self.language.end}

    def serve_texts(self, outputs: Tensor) -> Tensor:
        """Returns [B, T, 2]: the tokens of a text, -1 behind its last, and the logarithms of their probabilities."""
        import torch

        told_BT, tokens_BT = self._tell(outputs)
        return torch.stack([tokens_BT.float(), told_BT.float()], dim=2)

    def _tell(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logarithms of the probabilities of a text's tokens, 0 behind its last, and the tokens."""
        from common.tasks.parts.transcripts.generating import compute_logits

        states_BTD, tokens_BT = self._split(outputs)
        log_BTV = compute_logits(self.language, states_BTD).log_softmax(dim=-1)
        told_BT = log_BTV.gather(2, tokens_BT.clamp(min=0).unsqueeze(2)).squeeze(2) * (tokens_BT != NONE)
        return told_BT, tokens_BT

    def statistic(self, buckets: int) -> Statistic:
        """Returns shared n-grams of words and characters and further ones of either text, each over a largest number.

        Of what two texts share and what one has besides, the squares add up to at most that one's own: a sentence's
        row is shorter than its entries one by one would allow.
        """
        del buckets
        if self.rates == "transcript":
            return self._errors.open_statistic(self._compare)
        rates = ("bleu", "chrf", *(("terms",) if self.terms else ()))
        return Statistic(
            size=2 * WORD_ORDER + 1 + 3 * CHAR_ORDER + 2 * bool(self.terms),
            bound=math.sqrt(WORD_ORDER + 1 + 2 * CHAR_ORDER + bool(self.terms)),
            entries=self._entries,
            compute=self._compute_rates,
            ranges=dict.fromkeys(rates, RATE),
        )

    @property
    def _errors(self) -> ErrorRates:
        longest = _CHARS_OF_TOKEN if self._spelling is None else 1 + self._spelling.symbols.longest
        return ErrorRates(self.max_tokens, self.max_tokens * longest)

    def _compare(self, outputs: Tensor, labels: Tensor) -> list[tuple[str, str]]:
        """Returns each text that is written, beside its reference."""
        codec = self.codec
        return [(said, codec.write(own_T)) for (said,), own_T in zip(codec.decode(outputs), labels, strict=True)]

    def _entries(self, outputs: Tensor, labels: Tensor) -> SparseRows:
        import torch

        size = self.statistic(0).size
        values_BS = torch.zeros(len(outputs), size, dtype=torch.float64)
        for row, pair in enumerate(self._compare(outputs, labels)):
            values_BS[row] = torch.tensor(self._count(*pair), dtype=torch.float64)
        return SparseRows(torch.arange(size).expand(values_BS.shape), values_BS)

    def _count(self, said: str, meant: str) -> list[float]:
        """Returns the row of a text and its reference."""
        most_words, most_chars = self.max_tokens, self.max_tokens * _CHARS_OF_TOKEN
        said_words, meant_words = split_words(said)[:most_words], split_words(meant)[:most_words]
        values = []
        for order in range(1, WORD_ORDER + 1):
            both, one, _ = count_matches(said_words, meant_words, order)
            values += [both / most_words, (one - both) / most_words]
        values.append(len(meant_words) / most_words)
        said_chars, meant_chars = ("".join(text.split())[:most_chars] for text in (said, meant))
        for order in range(1, CHAR_ORDER + 1):
            both, one, other = count_matches(said_chars, meant_chars, order)
            # As sacrebleu counts them: where a reference has no n-grams, a text has none either.
            one = one if other else 0
            values += [each / most_chars for each in (both, one - both, other - both)]
        if self.terms:
            asked = [word for word in meant_words if word in self.terms]
            found, _, _ = count_matches(said_words, asked, 1)
            values += [found / most_words, (len(asked) - found) / most_words]
        return values

    def _compute_rates(self, sums_S: Array, clip: bool) -> dict[str, float]:
        most_words, most_chars = self.max_tokens, self.max_tokens * _CHARS_OF_TOKEN
        words, meant, rest = np.split(np.asarray(sums_S) * most_words, [2 * WORD_ORDER, 2 * WORD_ORDER + 1])
        both_N, more_N = words.reshape(WORD_ORDER, 2).T
        chars = rest[: 3 * CHAR_ORDER] * (most_chars / most_words)
        shared_N, said_N, asked_N = chars.reshape(CHAR_ORDER, 3).T
        rates = {
            "bleu": compute_bleu(both_N, both_N + more_N, float(meant[0]), clip=clip),
            "chrf": compute_chrf(shared_N, shared_N + said_N, shared_N + asked_N, clip=clip),
        }
        if self.terms:
            right, missed = rest[3 * CHAR_ORDER :]
            rates["terms"] = float(compute_ratio(np.asarray(right), np.asarray(right + missed), clip=clip))
        return rates

    @cached_property
    def _spelling(self) -> Spelling | None:
        return None if self.symbols is None else Spelling(self.symbols)

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the outputs [B, T, D] of texts and their tokens, NONE behind the last."""
        return split_outputs(outputs, self.language, self.max_tokens)


def split_outputs(outputs: Tensor, language: Language, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Returns the outputs [B, T, D] of texts and their tokens, the one that ends a text among them, NONE behind it.

    Args:
        outputs: outputs of a head, of which the most probable tokens are taken; or what was written, with its tokens.
        language: language of the backbone.
        max_tokens: T.
    """
    from common.tasks.parts.transcripts.generating import compute_logits

    outputs_BPD = (outputs if outputs.dim() > 2 else outputs.unsqueeze(1))[:, :max_tokens]
    width = language.embedding_VD.shape[1]
    if outputs_BPD.shape[2] > width:
        return outputs_BPD[..., :width], outputs_BPD[..., width].long() - 1
    tokens_BT = compute_logits(language, outputs_BPD).argmax(dim=-1)
    ended_BT = (tokens_BT == language.end).long().cumsum(dim=1)
    behind_BT = (ended_BT - (tokens_BT == language.end).long()) > 0
    return outputs_BPD, tokens_BT.masked_fill(behind_BT, NONE)


@dataclass(frozen=True)
class TextCodec:
    """Labels are T tokens (int32) with the one that ends the text, NONE behind it.

    Attributes:
        max_tokens: T.
        language: language of the backbone; None where only is asked whether a cell holds a text.
        spelling: words and what is written for them; None where texts are as they are written.
    """

    max_tokens: int
    language: Language | None
    spelling: Spelling | None = None

    def encode(self, cells: Sequence[str]) -> torch.Tensor:
        """Returns the tokens of a text. Raises BadRecord."""
        import torch

        if len(cells) != 1:
            raise BadRecord("expected a text in one column")
        if not cells[0].strip():
            raise BadRecord("expected a text to write, got an empty one")
        text = cells[0] if self.spelling is None else self.spelling.spell(cells[0])
        if self.language is None:
            return self.missing()
        tokens = [*self.language.read(text), self.language.end]
        if len(tokens) > self.max_tokens:
            raise BadRecord(f"expected a text of at most {self.max_tokens - 1} tokens")
        return torch.tensor(tokens + [NONE] * (self.max_tokens - len(tokens)), dtype=torch.int32)

    def missing(self) -> torch.Tensor:
        """Returns a label without tokens."""
        import torch

        return torch.full((self.max_tokens,), NONE, dtype=torch.int32)

    def decode(self, outputs: torch.Tensor) -> list[list[str]]:
        """Returns the text of each record, in one cell."""
        assert self.language is not None, "expected a task that was opened on its backbone"
        _, tokens_BT = split_outputs(outputs.detach(), self.language, self.max_tokens)
        return [[self.write(tokens_T)] for tokens_T in tokens_BT]

    def write(self, tokens_T: torch.Tensor) -> str:
        """Returns the text of a label's tokens."""
        assert self.language is not None, "expected a task that was opened on its backbone"
        return self._write([token for token in tokens_T.tolist() if token not in (NONE, self.language.end)])

    def normalise(self, text: str) -> str:
        """Returns a text of any length, also none, as it would be written. Raises BadRecord."""
        assert self.language is not None, "expected a task that was opened on its backbone"
        return self._write(self.language.read(text if self.spelling is None else self.spelling.spell(text)))

    def _write(self, tokens: Sequence[int]) -> str:
        assert self.language is not None
        text = self.language.write(tokens)
        return text if self.spelling is None else self.spelling.read(text)
