"""A small transformer decoder of texts, which reads the states of a frozen encoder.

Its last norm has no factors of its own: every state has the same length, so that a head on states needs no other scale.
Input and output share one embedding.

# Shapes: B sentences, T places of a target, S places of a source, D width, M width of the source's states, V tokens.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, of the places before."""


@final
class Attention(nn.Module):
    """Attention with several heads, of queries [B, T, D] to what `split` made of others."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.memory = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, states_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values, each [B, heads, S, D / heads]."""
        keys, values = self.memory(states_BSD).chunk(2, dim=-1)
        return self._divide(keys), self._divide(values)

    def forward(self, states_BTD: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Returns what is read, [B, T, D].

        Args:
            states_BTD: states that ask.
            memory: keys and values, as `split` returns them.
            mask: True for what is read, broadcast to [B, heads, T, S]; None for all.
        """
        read = functional.scaled_dot_product_attention(self._divide(self.query(states_BTD)), *memory, attn_mask=mask)
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out

    def _divide(self, values_BTD: Tensor) -> Tensor:
        return torch.unflatten(values_BTD, 2, (self.heads, -1)).transpose(1, 2)


@final
class Layer(nn.Module):
    """Attention to what was said, attention to the source, two linear layers; each behind a norm and added."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.said_norm, self.read_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.said, self.read = Attention(width, heads), Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        states_BTD: Tensor,
        read: tuple[Tensor, Tensor],
        read_mask: Tensor,
        said_mask: Tensor | None,
        before: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns states and the keys and values of all places so far.

        Args:
            states_BTD: states of some places.
            read: keys and values of the source.
            read_mask: True where the source has a token, broadcast to [B, heads, T, S].
            said_mask: True for the places that each place reads; None for all.
            before: keys and values of the places before; None where there are none.
        """
        normed_BTD = self.said_norm(states_BTD)
        said = self.said.split(normed_BTD)
        if before is not None:
            said = (torch.cat([before[0], said[0]], dim=2), torch.cat([before[1], said[1]], dim=2))
        states_BTD = states_BTD + self.dropout(self.said(normed_BTD, said, said_mask))
        states_BTD = states_BTD + self.dropout(self.read(self.read_norm(states_BTD), read, read_mask))
        hidden = functional.gelu(self.up(self.hidden_norm(states_BTD)))
        return states_BTD + self.dropout(self.down(self.dropout(hidden))), said


@final
class Decoder(nn.Module):
    """Tokens and a source's states -> states before the output's embedding."""

    def __init__(
        self,
        vocabulary: int,
        memory_width: int,
        longest: int,
        *,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.memory = nn.Linear(memory_width, width)
        self.memory_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, dropout) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.normal_(self.positions.weight, std=0.1)

    def read_memory(self, memory_BSM: Tensor) -> Tensor:
        """Returns what the layers read of a source's states, [B, S, D]."""
        read: Tensor = self.memory_norm(self.memory(memory_BSM))
        return read

    def forward(self, tokens_BT: Tensor, read_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """Returns the states from which the token behind each is told.

        Args:
            tokens_BT: tokens, the first of which begins a text.
            read_BSD: what `read_memory` returned.
            mask_BS: True where a source has a token.
        """
        length = tokens_BT.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=tokens_BT.device).tril()
        states_BTD = self._embed(tokens_BT, 0)
        for layer in self._list_layers():
            states_BTD, _ = layer(states_BTD, layer.read.split(read_BSD), mask_BS[:, None, None], causal_TT, None)
        return self._norm(states_BTD)

    def prepare(self, read_BSD: Tensor) -> Cache:
        """Returns each layer's keys and values of sources."""
        return [layer.read.split(read_BSD) for layer in self._list_layers()]

    def step(
        self, tokens_B: Tensor, position: int, read: Cache, mask_BS: Tensor, said: Cache | None
    ) -> tuple[Tensor, Cache]:
        """Returns the state [B, D] behind one more token, and the keys and values of all so far.

        Args:
            tokens_B: the tokens.
            position: their place, from 0.
            read: what `prepare` returned.
            mask_BS: True where a source has a token.
            said: keys and values of the places before; None at the first.
        """
        states_B1D = self._embed(tokens_B[:, None], position)
        after: Cache = []
        for number, layer in enumerate(self._list_layers()):
            before = None if said is None else said[number]
            states_B1D, own = layer(states_B1D, read[number], mask_BS[:, None, None], None, before)
            after.append(own)
        return self._norm(states_B1D)[:, 0], after

    def _list_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _embed(self, tokens_BT: Tensor, first: int) -> Tensor:
        places_T = torch.arange(first, first + tokens_BT.shape[1], device=tokens_BT.device)
        embedded: Tensor = self.dropout(self.embedding(tokens_BT) * math.sqrt(self.width) + self.positions(places_T))
        return embedded

    def _norm(self, states_BTD: Tensor) -> Tensor:
        return functional.layer_norm(states_BTD, (self.width,))
