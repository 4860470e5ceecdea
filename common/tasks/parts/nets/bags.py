"""Heads of bags: the items of a record are pooled to one vector, on which the last layer stands.

With items h_n, of which only a record's own have a positive mark (`common.backbones.Bag`):

    mean             z = sum_n h_n / number of items
    max              z = the largest of each feature
    attention        z = sum_n a_n h_n,  a = softmax over n of w . tanh(V h_n)
    gated_attention  the same with w . (tanh(V h_n) * sigmoid(U h_n))

(Ilse et al. 2018, arXiv 1802.04712.) `hidden` is a layer with tanh that each item passes before it is pooled. All of it
is computed of one record alone, whose gradient is clipped as any other's.

Guarantee: what stands behind a record's last item enters no sum, maximum, softmax or gradient, whatever it holds.

# Shapes: B records, N items, D features (the mark is the last), H features of a pooled item, L units of the attention.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn

_LANES = 16
"""Items are filled up to a multiple of it: each record then begins at the same place of a matrix product's tile. With
five items, a record's values had other last bits at odd places of a block than at even ones (measured)."""

Pooling = Literal["mean", "max", "attention", "gated_attention"]


@final
class ItemScores(nn.Module):
    """The scores of items, whose softmax over a record's own is its attention."""

    def __init__(self, num_features: int, width: int, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_features, width, bias=bias)
        self.gate = nn.Linear(num_features, width, bias=bias) if gated else None
        # A bias would be the same for all items.
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, items_BNH: Tensor) -> Tensor:
        """Returns scores_BN."""
        hidden_BNL = self.hidden(items_BNH).tanh()
        if self.gate is not None:
            hidden_BNL = hidden_BNL * self.gate(items_BNH).sigmoid()
        scores_BN: Tensor = self.score(hidden_BNL).squeeze(-1)
        return scores_BN


@final
class BagHead(nn.Module):
    """features_BND -> outputs_BK. Rows without an axis of items are records of one item each.

    Marks stay among the features: they are the same for all of a record's own items, and are read as a bias is.
    """

    def __init__(self, items: nn.Module | None, last: nn.Module, pooling: Pooling, scores: ItemScores | None) -> None:
        super().__init__()
        # In this order: audits read the first weight, and one item's attention has no gradient.
        self.items = items
        self.last = last
        self.scores = scores
        self.pooling = pooling

    def forward(self, features_BND: Tensor) -> Tensor:
        """Returns outputs_BK."""
        if features_BND.dim() == 2:
            features_BND = features_BND.unsqueeze(1)
            own_BN = torch.ones_like(features_BND[..., -1], dtype=torch.bool)
        else:
            own_BN = find_own_items(features_BND)
        missing = -features_BND.shape[1] % _LANES
        own_BN = nn.functional.pad(own_BN, (0, missing))
        # Zeros, so that nothing that stands there reaches a product, not even as 0 * inf.
        features_BND = nn.functional.pad(features_BND, (0, 0, 0, missing)).masked_fill(~own_BN.unsqueeze(-1), 0.0)
        items_BNH = features_BND if self.items is None else self.items(features_BND).tanh()
        outputs_BK: Tensor = self.last(self._pool(items_BNH, own_BN))
        return outputs_BK

    def _pool(self, items_BNH: Tensor, own_BN: Tensor) -> Tensor:
        if self.pooling == "max":
            return items_BNH.masked_fill(~own_BN.unsqueeze(-1), -torch.inf).amax(dim=1)
        if self.scores is None:
            weights_BN = own_BN.to(items_BNH.dtype) / own_BN.sum(dim=1, keepdim=True)
        else:
            weights_BN = self.scores(items_BNH).masked_fill(~own_BN, -torch.inf).softmax(dim=1)
        # A product of one record's matrices: torch's sum over an axis in the middle depends on where a record stands.
        return torch.bmm(weights_BN.unsqueeze(1), items_BNH).squeeze(1)


def find_own_items(features_BND: Tensor) -> Tensor:
    """Returns own_BN, true for each record's own items; one without any has its first place, of zeros.

    Solvers fill a block up with records of zeros and weight zero: these must be finite.
    """
    own_BN = features_BND[..., -1] > 0.0
    first_N = torch.arange(own_BN.shape[1], device=own_BN.device) == 0
    return own_BN | (first_N & ~own_BN.any(dim=1, keepdim=True))
