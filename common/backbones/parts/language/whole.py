"""A whole pre-trained encoder-decoder: its encoder makes the features, its decoder writes, and a part of that trains.

Features are what the encoder says of a source, a place for each frame or token, with a mark behind; the decoder is no
part of them. A copy of it stands in the head of a task, so that the encoder runs once for each record and each step of
training runs the decoder alone. No place behind a source's own is ever attended to.

# Shapes: B records, P places of a source, T places of a text, M width of the encoder, D of the decoder, V tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import tokenizers
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from common.backbones import SPEECH
from common.backbones.parts.boundary import drop_nothing, train_opened_parts
from common.backbones.parts.hub.frames import FrameInput
from common.backbones.parts.hub.modalities import TextInput
from common.backbones.parts.layers import read_width
from common.inputs import Text
from common.types import BadInput, BadRecord


class Known(NamedTuple):
    """State of a decoder while texts are written. Writing a token changes the cache in place: it is used once."""

    cache: EncoderDecoderCache
    memory_BPM: Tensor
    mask_BP: Tensor


@final
class WholeDecoder(nn.Module):
    """Encoded sources and tokens -> states, from which the token behind each is told, and a mark: [B, T, D + 1].

    States are divided by one public number, so that most are about equally long whatever the model is.

    Attributes:
        follows_source: whether encoded sources take a gradient while it trains, as layers that read them alone need.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int], length: float) -> None:
        """Stores a decoder, which computes the same in training as in use.

        Args:
            model: the decoder of a transformers model, frozen.
            prefix: tokens before every text, at least one.
            length: what states are divided by.
        """
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prefix = tuple(prefix)
        self.length = length
        self.follows_source = False
        drop_nothing(self)
        self.train(False)

    def train(self, mode: bool = True) -> WholeDecoder:
        """Puts only those parts in training mode that hold something to train."""
        super().train(False)
        self.training = mode
        train_opened_parts(self, mode)
        return self

    def forward(self, features_BPM: Tensor, before_BT: Tensor) -> Tensor:
        """Returns states and their marks.

        Args:
            features_BPM: encoded sources, [B, P, M + 1].
            before_BT: the token before each place, at the first place the prefix's last.
        """
        memory_BPM, mask_BP = _read_source(features_BPM)
        if self.follows_source and torch.is_grad_enabled():
            memory_BPM.requires_grad_()
        count = len(self.prefix) - 1
        tokens_BT = torch.cat([self._repeat_prefix(before_BT), before_BT], dim=1)
        embedded_BTD = self._embed(tokens_BT)
        if features_BPM.requires_grad:
            # Opacus' hooks expect inputs that take a gradient; that of sources would cost as much as all else.
            embedded_BTD = embedded_BTD + 0.0 * features_BPM[:, :1, :1]
        return self._mark(self._run(embedded_BTD, memory_BPM, mask_BP, None)[:, count:])

    def begin(self, features_BPM: Tensor) -> Known:
        """Returns what is known of sources before any token is written."""
        memory_BPM, mask_BP = _read_source(features_BPM)
        known = Known(EncoderDecoderCache(DynamicCache(), DynamicCache()), memory_BPM, mask_BP)
        first_BT = self._repeat_prefix(mask_BP)
        if first_BT.shape[1]:
            self._run(self._embed(first_BT), memory_BPM, mask_BP, known.cache)
        return known

    def step(self, known: Known, tokens_B: Tensor) -> tuple[Tensor, Known]:
        """Returns the state [B, D + 1] behind one more token, and what is known then."""
        embedded_B1D = self._embed(tokens_B[:, None])
        states_B1D = self._run(embedded_B1D, known.memory_BPM, known.mask_BP, known.cache)
        return self._mark(states_B1D)[:, 0], known

    def select(self, known: Known, rows_B: Tensor) -> Known:
        """Returns what is known of some rows."""
        known.cache.reorder_cache(rows_B)
        return Known(known.cache, known.memory_BPM[rows_B], known.mask_BP[rows_B])

    def keep_tokens(self, tokens: Sequence[int], prefix: Sequence[int]) -> None:
        """Leaves the decoder the rows of some tokens, in place; their numbers are then their positions there.

        Args:
            tokens: tokens that stay, in the order of their new numbers.
            prefix: the prefix in new numbers.
        """
        whole = self.model.get_input_embeddings()
        assert isinstance(whole, nn.Embedding)
        kept = nn.Embedding(len(tokens), whole.embedding_dim, device=whole.weight.device).requires_grad_(False)
        kept.weight.copy_(whole.weight[torch.tensor(tokens, device=whole.weight.device)])
        self.model.set_input_embeddings(kept)
        self.prefix = tuple(prefix)

    def _repeat_prefix(self, like_BT: Tensor) -> Tensor:
        first_T = torch.tensor(self.prefix[:-1], dtype=torch.long, device=like_BT.device)
        return first_T.expand(like_BT.shape[0], -1)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(tokens_BT)
        return embedded

    def _mark(self, states_BTD: Tensor) -> Tensor:
        return nn.functional.pad(states_BTD / self.length, (0, 1), value=SPEECH)

    def _run(
        self, embedded_BTD: Tensor, memory_BPM: Tensor, mask_BP: Tensor, cache: EncoderDecoderCache | None
    ) -> Tensor:
        given = {"cache": cache, "use_cache": cache is not None}
        if not isinstance(self.model, WhisperDecoder):
            output = self.model(
                inputs_embeds=embedded_BTD,
                encoder_hidden_states=memory_BPM,
                encoder_attention_mask=mask_BP.long(),
                **given,
            )
            states: Tensor = output.last_hidden_state
            return states
        # Whisper's own `forward` takes no mask of its source, which it expects to be thirty seconds long.
        first, count = 0 if cache is None else cache.get_seq_length(), embedded_BTD.shape[1]
        causal_TS = torch.ones(count, first + count, dtype=torch.bool, device=mask_BP.device).tril(first)
        masks = [_make_additive(each, embedded_BTD) for each in (causal_TS[None, None], mask_BP[:, None, None])]
        hidden_BTD = embedded_BTD + self.model.embed_positions.weight[first : first + count]
        for layer in self.model.layers:
            output = layer(hidden_BTD, masks[0], memory_BPM, encoder_attention_mask=masks[1], **given)
            hidden_BTD = output[0] if isinstance(output, tuple) else output
        normed_BTD: Tensor = self.model.layer_norm(hidden_BTD)
        return normed_BTD


@final
class WholeModel(nn.Module):
    """Sources as inputs -> their encoded places with marks [B, P, M + 1]; the decoder and its tokens beside."""

    told_bias: Tensor
    tokenizer: Tensor

    def __init__(self, whole: PreTrainedModel, prefix: Sequence[int], end: int, tokenizer_bytes: int) -> None:
        """Stores a model's two sides.

        Args:
            whole: an encoder-decoder of transformers with the layer that tells tokens.
            prefix: tokens before every text.
            end: the token that ends a text.
            tokenizer_bytes: length of its tokenizer.
        """
        super().__init__()
        self.encoder = whole.get_encoder()
        self.decoder = WholeDecoder(whole.get_decoder(), prefix, 1.0)
        told = whole.get_output_embeddings()
        assert isinstance(told, nn.Linear)
        # Most tell a token by the row by which they read it.
        is_tied = told.weight is self.decoder.model.get_input_embeddings().weight
        self.told_rows = None if is_tied else told
        bias = getattr(whole, "final_logits_bias", None)
        bias = told.bias if bias is None else bias
        self.register_buffer("told_bias", torch.zeros(told.out_features) if bias is None else bias.detach().flatten())
        config = whole.config
        self.width = read_width(self.encoder, config)
        # T5 tells tokens of states that are shorter, where both embeddings are one.
        self.told_scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
        self.end = end
        self.longest = 0
        self.places = 0
        self.modality: FrameInput | TextInput | None = None
        self.register_buffer("tokenizer", torch.zeros(tokenizer_bytes, dtype=torch.uint8))

    @property
    def told_VD(self) -> Tensor:
        """The rows by which tokens are told."""
        own = self.told_rows or self.decoder.model.get_input_embeddings()
        rows_VD: Tensor = own.weight.detach() * self.told_scale
        return rows_VD

    @property
    def unwritten(self) -> list[int]:
        """The tokens that are never written: special ones but the end, and those that the tokenizer does not know."""
        opened = self.open_tokenizer()
        special = [token for token, added in opened.get_added_tokens_decoder().items() if added.special]
        beyond = range(opened.get_vocab_size(), len(self.told_bias))
        return [token for token in (*special, *beyond) if token != self.end and token < len(self.told_bias)]

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns what the encoder says of each source; zeros where it has ended."""
        assert self.modality is not None
        parts = []
        for rows, group_B in self.modality.groups(inputs_B):
            output, mask_BP = self.modality.run(self.encoder, group_B)
            assert mask_BP is not None
            # Of recordings frames, of texts what the model returns.
            states = output if isinstance(output, Tensor) else output.last_hidden_state
            own_BP1 = (mask_BP[:, : states.shape[1]] > 0).unsqueeze(2)
            marked = nn.functional.pad(states.float(), (0, 1), value=SPEECH) * own_BP1
            parts.append((rows, nn.functional.pad(marked, (0, 0, 0, self.places - marked.shape[1]))[: len(rows)]))
        whole_BPM = torch.zeros(len(inputs_B), self.places, self.width + 1, device=inputs_B.device)
        for rows, part in parts:
            whole_BPM[rows] = part
        return whole_BPM

    def preprocess(self, item: Any) -> Tensor:
        """Returns a recording, or the source of a text, as an input; a text beside it is its label and not read."""
        assert self.modality is not None
        return self.modality.preprocess(Text(item.first) if isinstance(item, Text) else item)

    def open_tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer whose bytes travelled with the weights. Raises BadInput for other bytes."""
        found: tokenizers.Tokenizer | None = getattr(self, "_opened", None)
        if found is None:
            try:
                data = self.tokenizer.cpu().numpy().tobytes()
                json.loads(data)
                found = tokenizers.Tokenizer.from_buffer(data)
            except (ValueError, RecursionError) as error:
                raise BadInput("weights: expected a tokenizer among the weights, got other bytes") from error
            found.no_padding()
            found.no_truncation()
            self._opened = found
        return found

    def open_source_tokenizer(self) -> tokenizers.Tokenizer:
        """Returns a tokenizer that cuts sources to their places."""
        found: tokenizers.Tokenizer | None = getattr(self, "_opened_for_sources", None)
        if found is None:
            found = tokenizers.Tokenizer.from_str(self.open_tokenizer().to_str())
            found.enable_truncation(self.places)
            self._opened_for_sources = found
        return found

    def read(self, text: str) -> list[int]:
        """Returns a text's tokens. Raises BadRecord: it has none that are written."""
        opened = self.open_tokenizer()
        # Tokens of bytes hold the blank before a word; others set a mark there themselves.
        probe = opened.decode(opened.encode(" a", add_special_tokens=False).ids)
        blank = " " if probe.startswith(" ") else ""
        tokens: list[int] = opened.encode(blank + text.strip(), add_special_tokens=False).ids
        unwritten, known = {*self.unwritten, self.end}, min(len(self.told_bias), self._count_read())
        # A tokenizer may give numbers for which the model has no row.
        if not tokens or not unwritten.isdisjoint(tokens) or max(tokens) >= known:
            raise BadRecord("expected a text of the backbone's own tokens, got one with others")
        return tokens

    def _count_read(self) -> int:
        return len(self.decoder.model.get_input_embeddings().weight)

    def write(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens."""
        text: str = self.open_tokenizer().decode(list(tokens), skip_special_tokens=True)
        return text.strip()


def _read_source(features_BPM: Tensor) -> tuple[Tensor, Tensor]:
    """Returns encoded places, which take no gradient, and true for those of the source; of none, for all."""
    mask_BP = features_BPM[..., -1] > 0
    return features_BPM[..., :-1].detach(), mask_BP | ~mask_BP.any(dim=1, keepdim=True)


def _make_additive(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(~mask, torch.finfo(like.dtype).min)
