"""The language of a whole pre-trained encoder-decoder (`common.backbones.DecoderLanguage`).

Where what may be written is restricted to some public texts, tokens are counted anew: only theirs and the end's are
there, so that a head has a row of its own for each and no logits of others are computed.

# Shapes: B records, P places of a source, D width of the decoder, V tokens that may be written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from common.backbones import SPEECH, DecoderPart
from common.backbones.parts.language.adapters import add_adapters, open_last_block
from common.backbones.parts.language.whole import Known, WholeDecoder, WholeModel
from common.types import BadInput, BadRecord

STATE_LENGTH = 10.0
"""Length of a usual state that a head reads. The gradient of a row is then about as long as those of all adapters, so
that one clip keeps both (measured with Whisper tiny on spoken digits: 2.1 beside 3.4; undivided states 42)."""


@dataclass(frozen=True)
class WholeLanguage:
    """A model's tokens and its decoder.

    Attributes:
        model: the model, whose weights are read when they are asked for.
        tokens: the model's own numbers of the tokens that may be written, the end among them; None for all.
        decoder: the decoder that writes; None for the model's own.
    """

    model: WholeModel
    tokens: tuple[int, ...] | None = None
    decoder: WholeDecoder | None = None

    @property
    def longest(self) -> int:
        """Largest number of a text's tokens, with the one that ends it."""
        return self.model.longest

    @property
    def start(self) -> int:
        """The token before a text."""
        return self._number_prefix()[-1]

    @property
    def end(self) -> int:
        """The token that ends a text."""
        return self.model.end if self.tokens is None else self.tokens.index(self.model.end)

    @property
    def scale(self) -> float:
        """The divisor of states times the length of a usual token's row; 1 where a head has rows of its own."""
        return self._row_length * self._divisor if self.tokens is None else 1.0

    @property
    def embedding_VD(self) -> Tensor:
        """The rows of all tokens, whose mean square length is 1; each its own where a head has rows of its own."""
        return self.model.told_VD / self._row_length if self.tokens is None else torch.eye(len(self.tokens))

    @property
    def bias_V(self) -> Tensor:
        """The tokens' bias; the least number for tokens that are never written."""
        if self.tokens is not None:
            return torch.zeros(len(self.tokens))
        bias_V = self.model.told_bias.clone()
        bias_V[self.model.unwritten] = torch.finfo(bias_V.dtype).min
        return bias_V

    def make_first_map(self) -> Tensor:
        """Returns weights of a first head's linear map, by which it tells what the model itself would."""
        width = self.model.told_VD.shape[1]
        if self.tokens is None:
            return self.scale * torch.eye(width, width + 1)
        tokens = list(self.tokens)
        bias_V1 = self.model.told_bias[tokens][:, None] / SPEECH
        return torch.cat([self.model.told_VD[tokens] * self._divisor, bias_V1], dim=1)

    def find_map_shape(self) -> tuple[int, int]:
        """Returns the shape of those weights."""
        width = self.model.told_VD.shape[1]
        return (width if self.tokens is None else len(self.tokens), width + 1)

    def restrict(self, texts: Sequence[str]) -> WholeLanguage:
        """Returns the language of those tokens that some public texts are made of. Raises BadInput."""
        if self.model.tokenizer.device.type == "meta":
            # Its tokens are not known before the weights are: most words are one.
            some = [token for token in range(len(texts) + 1) if token != self.model.end][: len(texts)]
            return replace(self, tokens=(*some, self.model.end))
        try:
            # In an order of their own: the texts are keys of a file, which are sorted on the way to a site.
            found = sorted({token for text in texts for token in self.model.read(text)})
        except BadRecord as error:
            raise BadInput(f"symbols: {error}") from error
        return replace(self, tokens=(*found, self.model.end))

    def open_decoder(self) -> WholeDecoder:
        """Returns a frozen copy of the decoder, with the rows of those tokens that may be written."""
        copied = copy.deepcopy(self.model.decoder)
        copied.length = self._divisor
        if self.tokens is not None:
            copied.keep_tokens((*self.tokens, *self.model.decoder.prefix), self._number_prefix())
        return copied

    def open_part(self, decoder: nn.Module, part: DecoderPart) -> None:
        """Lets a part of a copy of the decoder train, in place. Raises BadInput: it has no such part."""
        assert isinstance(decoder, WholeDecoder)
        opened = open_last_block(decoder.model) if part.last else []
        decoder.follows_source = part.last
        if part.lora is not None:
            opened += add_adapters(decoder.model, part.lora.rank, part.lora.alpha, part.lora.targets, part.lora.seed)
        for parameter in opened:
            parameter.requires_grad_(True)

    def write_through(self, decoder: nn.Module) -> WholeLanguage:
        """Returns the language as another decoder writes it, such as one that was trained."""
        assert isinstance(decoder, WholeDecoder)
        return replace(self, decoder=decoder)

    def read(self, text: str) -> list[int]:
        """Returns a text's tokens, without the one that ends it. Raises BadRecord."""
        found = self.model.read(text)
        if self.tokens is None:
            return found
        if not set(found) <= set(self.tokens):
            raise BadRecord("expected a text of the task's symbols")
        return [self.tokens.index(token) for token in found]

    def write(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""
        return self.model.write(tokens if self.tokens is None else [self.tokens[token] for token in tokens])

    def begin(self, features_BPD: Tensor) -> Known:
        """Returns what is known of sources before any token is written."""
        return self._find_decoder(features_BPD.device).begin(features_BPD)

    def step(self, known: Known, tokens_B: Tensor, place: int) -> tuple[Tensor, Known]:
        """Returns the features from which the token at a place is told, and what is known then.

        Args:
            known: what `begin` or the last step returned; it is used up.
            tokens_B: the token before that place.
            place: the place, from 0; the cache knows it.
        """
        del place
        return self._find_decoder(tokens_B.device).step(known, tokens_B)

    def select(self, known: Known, rows_B: Tensor) -> Known:
        """Returns what is known of some rows; what was known is used up."""
        return self._find_decoder(rows_B.device).select(known, rows_B)

    def _find_decoder(self, device: torch.device) -> WholeDecoder:
        decoder = self.decoder or self._own_decoder
        return decoder if next(decoder.parameters()).device == device else copy.deepcopy(decoder).to(device)

    @cached_property
    def _own_decoder(self) -> WholeDecoder:
        return self.open_decoder()

    @cached_property
    def _divisor(self) -> float:
        """The divisor of states, from the length that the decoder's last norm gives them."""
        norms = [part for part in self.model.decoder.modules() if "norm" in type(part).__name__.lower()]
        weights = [each for part in norms[-1:] for each in part.parameters() if each.device.type != "meta"]
        return (_add_squares(weights) ** 0.5 or STATE_LENGTH) / STATE_LENGTH

    @cached_property
    def _row_length(self) -> float:
        """The length of a usual token's row."""
        rows_VD = self.model.told_VD
        return 1.0 if rows_VD.device.type == "meta" else (_add_squares([rows_VD]) / len(rows_VD)) ** 0.5

    def _number_prefix(self) -> tuple[int, ...]:
        prefix = self.model.decoder.prefix
        return prefix if self.tokens is None else tuple(range(len(self.tokens), len(self.tokens) + len(prefix)))


def _add_squares(values: Sequence[Tensor]) -> float:
    return sum(float(each.detach().double().square().sum()) for each in values)
