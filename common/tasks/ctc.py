"""Transcripts of recordings, from a head on their frames.

Nobody says which frame belongs to which word. The loss is that of all alignments together (connectionist temporal
classification: Graves et al. 2006, Section 4). From an untrained head it finds none under noise, and says nothing at
all instead; so in the first rounds the frames that are not quiet are divided evenly among the symbols, by a rule that
looks at this recording alone, and each frame is trained on its own.

# Shapes: B recordings, P places (frames) of them, S symbols of the longest transcript, K outputs: blank and symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, PrivateAttr, model_validator

from common.backbones import QUIET, SPEECH
from common.inputs import CellNames
from common.plugins import Plugin
from common.tasks import Statistic, TaskExample
from common.tasks.parts.head import HeadSettings
from common.tasks.parts.transcripts.bigrams import Bigrams, compute_prior
from common.tasks.parts.transcripts.errors import ErrorRates
from common.tasks.parts.transcripts.symbols import Symbols
from common.types import BadRecord

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NONE = -1
"""Behind the last symbol of a label."""

_USUAL_PLACES = 30
"""Places of a short utterance, of 80 ms each."""

_ENDED, _STILL, _LOUD = 0, 1, 2
"""Kinds of a place, in a placed label."""


@final
class Ctc(Plugin):
    """Settings of a transcript.

    Attributes:
        symbols: what transcripts are made of, in the order of the head's outputs behind that of the blank.
        unit: whether symbols are words, or characters with blanks between words.
        figures: ten words that stand for the figures from 0 to 9, each figure apart; without them a figure is a symbol
            itself or makes the record a bad one.
        max_symbols: most symbols of a transcript; records with more are bad ones.
        even_part: part of the rounds, from the first, in which symbols are divided evenly among frames.
        beam: number of prefixes that decoding keeps; 1 takes the most probable path.
        language: what follows what in public texts, with a `beam` above 1; none leaves it to the frames alone.
        scale: public factor on this task's loss, applied before joint clipping.
        head_settings: shape of the head, `head` in a file; without a bias, because the mark of a frame serves as one.
    """

    kind: Literal["ctc"] = "ctc"
    symbols: Annotated[CellNames, Field(min_length=1, max_length=30_000)]
    unit: Literal["words", "characters"]
    figures: Annotated[tuple[str, ...], Field(min_length=10, max_length=10)] | None = None
    max_symbols: Annotated[int, Field(ge=1, le=1000)]
    even_part: Annotated[float, Field(ge=0, le=1)] = 0.5
    beam: Annotated[int, Field(ge=1, le=1000)] = 1
    language: Bigrams | None = None
    scale: Annotated[float, Field(gt=0)] = 1.0
    head_settings: HeadSettings = Field(default=HeadSettings(bias=False), alias="head")
    _even: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _check(self) -> Ctc:
        if fault := self.codec.symbols.find_fault():
            raise ValueError(fault)
        if self.language is not None and self.beam == 1:
            raise ValueError(
                "beam: expected more than 1 beside `language`, which compares the beginnings that it keeps"
            )
        if self.language is not None and (fault := self.language.find_fault(self.codec.symbols)):
            raise ValueError(fault)
        own = self.head_settings
        if own.bias or own.centre or own.prior:
            raise ValueError("head: expected `bias: false`, no `centre` and no `prior`; a frame's mark serves as bias")
        return self

    @classmethod
    def example(cls) -> TaskExample:
        """Returns short and long transcripts, one of them empty."""
        settings = {"kind": "ctc", "symbols": ["yes", "no"], "unit": "words", "max_symbols": 3}
        return TaskExample(settings, [["yes yes yes"], ["no"], [""], ["No, yes!"]], grid=(8,))

    @property
    def reads_places(self) -> bool:
        """The head's outputs are those of frames."""
        return True

    @property
    def codec(self) -> TranscriptCodec:
        """Transcripts as indices of symbols."""
        return TranscriptCodec(
            Symbols(self.symbols, self.unit, self.figures or ()), self.max_symbols, self.beam, self.language
        )

    def head(self, feature_dim: int) -> nn.Module:
        """Returns a head, features_BPD -> logits_BPK."""
        return self.head_settings.build(feature_dim, 1 + len(self.codec.symbols.all))

    def select_round(self, round_: int, rounds: int) -> Ctc:
        """Returns the task with symbols divided evenly in the first part of the rounds."""
        chosen = self.model_copy()
        chosen._even = round_ <= self.even_part * rounds
        return chosen

    def place_label(self, label: Tensor, marks_P: Tensor) -> Tensor:
        """Returns the symbols, and for each place whether it is the recording's own, and loud.

        Raises:
            BadRecord: there are fewer frames than the transcript needs.
        """
        import torch

        own_P, loud_P = marks_P > QUIET / 2, marks_P > (QUIET + SPEECH) / 2
        said = label[label != NONE]
        needed = len(said) + int((said[1:] == said[:-1]).sum())
        if int(own_P.sum()) < max(1, needed):
            raise BadRecord("expected a recording that is long enough for its transcript")
        place_P = torch.where(loud_P, _LOUD, _STILL).where(own_P, _ENDED)
        return torch.cat([label, place_P.to(label.dtype)])

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each recording over its number of frames; a label that is not placed has all of them."""
        # Audits look at records of one place.
        outputs_BPK = outputs if outputs.dim() > 2 else outputs.unsqueeze(1)
        log_BPK = outputs_BPK.log_softmax(dim=-1)
        symbols_BS, count_B = self._gather_symbols(labels)
        place_BP = labels[:, self.max_symbols :]
        if not place_BP.shape[1]:
            place_BP = labels.new_full(log_BPK.shape[:2], _LOUD)
        lengths_B = (place_BP > _ENDED).sum(dim=1)
        if self._even:
            total_B = self._sum_even(log_BPK, symbols_BS, count_B, place_BP)
        else:
            import torch

            total_B = torch.nn.functional.ctc_loss(
                log_BPK.transpose(0, 1), symbols_BS + 1, lengths_B, count_B, reduction="none"
            )
        return total_B / lengths_B.clamp(min=1)

    def _sum_even(self, log_BPK: Tensor, symbols_BS: Tensor, count_B: Tensor, place_BP: Tensor) -> Tensor:
        """Returns the cross entropy of frames with symbols divided evenly among the loud ones, the others blank."""
        own_BP, loud_BP = place_BP > _ENDED, place_BP == _LOUD
        loud_BP = loud_BP | (own_BP & ~loud_BP.any(dim=1, keepdim=True))
        rank_BP = loud_BP.cumsum(dim=1) - 1
        symbol_BP = rank_BP * count_B[:, None] // loud_BP.sum(dim=1, keepdim=True).clamp(min=1)
        said_BP = symbols_BS.gather(1, symbol_BP.clamp(min=0, max=self.max_symbols - 1)) + 1
        target_BP = said_BP.where(loud_BP & (count_B[:, None] > 0), 0)
        found_BP: Tensor = log_BPK.gather(-1, target_BP.unsqueeze(-1)).squeeze(-1)
        return -found_BP.where(own_BP, 0.0).sum(dim=1)

    def _gather_symbols(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the symbols of each label, those behind the last one 0, and their number."""
        symbols_BS = labels[:, : self.max_symbols].long()
        known_BS = symbols_BS != NONE
        order_BS = known_BS.logical_not().byte().argsort(dim=1, stable=True)
        return symbols_BS.clamp(min=0).gather(1, order_BS), known_BS.sum(dim=1)

    @property
    def smoothness(self) -> float:
        """Curvature of the mean cross entropy if all frames had the same outputs; that of alignments is no larger."""
        return 0.5

    @property
    def first_slope(self) -> float:
        """Length of uniform probabilities minus a unit vector, over frames that are not alike: their mean is gone."""
        return math.sqrt((1.0 - 1.0 / (1 + len(self.codec.symbols.all))) / _USUAL_PLACES)

    @property
    def later_slope(self) -> float:
        """Length of a recording's usual gradient in the middle of a run: of spoken digits .3 at first, .04 at last."""
        return 0.12

    @property
    def tolerated_noise(self) -> float:
        """A little more than that of a logit: what is divided evenly must be learned well enough to begin from."""
        return 0.8

    @property
    def centres(self) -> bool:
        """Each recording's own mean is gone already."""
        return False

    def read_text(self, cell: str) -> str:
        """Returns a transcript in its normal form. Raises BadRecord: it is not made of the task's symbols."""
        symbols = self.codec.symbols
        return symbols.write(symbols.read(cell, self.max_symbols))

    def allows_piece(self, piece: str) -> bool:
        """Returns whether a piece of text is made of symbols, or the comma between them."""
        return bool(self.codec.symbols.find_indices(piece)) or piece.strip() == ","

    def compare_heard(self, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Returns word and character error rates of texts, which may hold other words, beside transcripts."""
        return self._errors.compare_heard([(self.codec.symbols.normalise(heard), meant) for heard, meant in pairs])

    def name_served(self, num_outputs: int) -> list[str]:
        """Returns the name of the only column."""
        del num_outputs
        return ["confidence"]

    def serve(self, outputs: Tensor) -> Tensor:
        """Returns confidence_B1: the geometric mean, over a recording's frames, of the most probable output's."""
        outputs_BPK = outputs if outputs.dim() > 2 else outputs.unsqueeze(1)
        own_BP = (outputs_BPK != 0).any(dim=-1)
        best_BP = outputs_BPK.log_softmax(dim=-1).amax(dim=-1) * own_BP
        return (best_BP.sum(dim=1, keepdim=True) / own_BP.sum(dim=1, keepdim=True).clamp(min=1)).exp().float()

    def describe_texts(self) -> dict[str, Any]:
        """Returns the rule by which a transcript is read from the outputs of frames."""
        symbols = self.codec.symbols
        join = " " if self.unit == "words" else ""
        prior = None if self.language is None else compute_prior(self.language, symbols)
        rule = {"rule": "ctc", "symbols": symbols.all, "join": join, "most": self.max_symbols, "beam": self.beam}
        return {**rule, "prior": prior}

    def serve_texts(self, outputs: Tensor) -> Tensor:
        """Returns the outputs of frames, that of the blank first; zeros where a recording has ended."""
        return outputs.float() if outputs.dim() > 2 else outputs.unsqueeze(1).float()

    def statistic(self, buckets: int) -> Statistic:
        """Returns word and character errors and the numbers of words and characters, each over its largest number."""
        del buckets
        return self._errors.open_statistic(self._compare)

    @property
    def _errors(self) -> ErrorRates:
        most_words, most_chars = self.max_symbols, self.max_symbols * (self.codec.symbols.longest + 1) - 1
        if self.unit == "characters":
            most_words, most_chars = (self.max_symbols + 1) // 2, self.max_symbols
        return ErrorRates(most_words, most_chars)

    def _compare(self, outputs: Tensor, labels: Tensor) -> list[tuple[str, str]]:
        """Returns what is told of each recording, beside its transcript."""
        symbols_BS, count_B = self._gather_symbols(labels)
        meant = [self.codec.symbols.write(row[:count]) for row, count in zip(symbols_BS.tolist(), count_B, strict=True)]
        return [(said, own) for (said,), own in zip(self.codec.decode(outputs), meant, strict=True)]


@dataclass(frozen=True)
class TranscriptCodec:
    """Labels are S indices of symbols (int16), NONE behind the last.

    Attributes:
        symbols: what transcripts are made of.
        max_symbols: S.
        beam: number of prefixes that decoding keeps; 1 takes the most probable path.
        language: what follows what in public texts; None for none.
    """

    symbols: Symbols
    max_symbols: int
    beam: int
    language: Bigrams | None

    def encode(self, cells: Sequence[str]) -> torch.Tensor:
        """Returns the symbols of a transcript. Raises BadRecord."""
        import torch

        if len(cells) != 1:
            raise BadRecord("expected a transcript in one column")
        indices = self.symbols.read(cells[0], self.max_symbols)
        return torch.tensor(indices + [NONE] * (self.max_symbols - len(indices)), dtype=torch.int16)

    def missing(self) -> torch.Tensor:
        """Returns a transcript without symbols."""
        import torch

        return torch.full((self.max_symbols,), NONE, dtype=torch.int16)

    def decode(self, outputs: torch.Tensor) -> list[list[str]]:
        """Returns the transcript of each recording, in one cell; places whose outputs are all zero are not its own.

        A head without a bias has such outputs where a recording has ended, and nowhere else once it is trained.
        """
        from common.tasks.parts.transcripts.decoding import find_symbols

        outputs_BPK = outputs if outputs.dim() > 2 else outputs.unsqueeze(1)
        prior = None if self.language is None else compute_prior(self.language, self.symbols)
        texts = []
        for outputs_PK in outputs_BPK.detach().double().cpu().numpy():
            own_TK = outputs_PK[(outputs_PK != 0.0).any(axis=1)]
            texts.append([self.symbols.write(find_symbols(own_TK, self.beam, prior)[: self.max_symbols])])
        return texts
