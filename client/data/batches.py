"""Batches in which a record's features do not depend on the records beside it.

A network's kernels are chosen by the shape of a batch, and some give a row other last bits in another batch. So every
batch has one shape: the last one is filled up with zeros. Whether the rows of such a batch are independent is tried
before a source is encoded; where they are not, every record is encoded in a batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.types import BadInput

Encode = Callable[[Tensor], Tensor]
"""Inputs [B, ...] -> features [B, D]."""


def encode_padded(encode: Encode, inputs: Tensor, batch_size: int) -> Tensor:
    """Returns features [I, D] of inputs [I, ...], encoded in batches of exactly `batch_size`.

    Args:
        encode: encoding of a backbone.
        inputs: preprocessed inputs [I, ...].
        batch_size: number of inputs of every batch; zeros fill the last.
    """
    missing = -len(inputs) % batch_size
    padded = torch.cat([inputs, inputs.new_zeros((missing, *inputs.shape[1:]))]) if missing else inputs
    return torch.cat([encode(part) for part in torch.split(padded, batch_size)])[: len(inputs)]


def choose_batch_size(encode: Encode, inputs: Tensor, batch_size: int) -> int:
    """Returns `batch_size` where rows of such a batch are independent to the bit, else 1.

    Args:
        encode: a backbone's encoding.
        inputs: up to `batch_size` inputs, to try it on.
        batch_size: number of inputs in a batch.

    Raises:
        BadInput: the same inputs have other features each time.
    """
    together = encode_padded(encode, inputs, batch_size)
    if not _are_same(encode_padded(encode, inputs, batch_size), together):
        raise BadInput(
            "backbone: expected one that gives a record the same features each time, got one that draws at random even "
            "in evaluation mode (a masked autoencoder does, for instance)"
        )
    elsewhere = torch.cat([inputs[1:], inputs[:1]])
    moved = encode_padded(encode, elsewhere, batch_size)
    alone = encode_padded(encode, inputs[:1], batch_size)
    independent = _are_same(torch.cat([moved[-1:], moved[:-1]]), together) and _are_same(alone, together[:1])
    return batch_size if independent else 1


def _are_same(first: Tensor, second: Tensor) -> bool:
    # NaN at the same places counts as the same: such a record is rejected for itself.
    return torch.equal(first.nan_to_num(), second.nan_to_num())
