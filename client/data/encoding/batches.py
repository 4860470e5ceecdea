"""Batches in which a record's features do not depend on the records beside it.

A network's kernels are chosen by the shape of a batch, and some give a row other last bits in another batch. So every
batch has one shape: the last one is filled up with zeros. Whether the rows of such a batch are independent is tried
before a source is encoded; where they are not, every record is encoded in a batch of its own. It is tried on made-up
inputs: no record decides how others are encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.data.sources.parts.boundary import try_record
from common.inputs import Audio, Text
from common.types import BadInput

Encode = Callable[[Tensor], Tensor]
"""Inputs [B, ...] -> features [B, D]."""

_DISTINCT = 8
"""Made-up inputs that differ."""


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


def draw_inputs(preprocess: Callable[[Any], Tensor], count: int) -> Tensor | None:
    """Returns made-up inputs [count, ...], the same on every call: of random pictures, texts or recordings.

    Args:
        preprocess: a backbone's preprocessing.
        count: number of inputs.

    Returns:
        The inputs; None where the backbone takes neither a picture nor a text nor a recording.
    """
    for inputs in _try_modalities(preprocess).values():
        return inputs[torch.arange(count) % _DISTINCT]
    return None


def find_modality(preprocess: Callable[[Any], Tensor]) -> str | None:
    """Returns `picture`, `text` or `sound`, whichever a backbone's preprocessing takes; None where it takes none."""
    return next(iter(_try_modalities(preprocess)), None)


def _try_modalities(preprocess: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Returns the first modality of which made-up items can be preprocessed, and the inputs that they become."""
    rng = np.random.default_rng(0)
    from PIL import Image  # Here: a round on cached features needs none.

    pictures = [Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(_DISTINCT)]
    texts = [Text("a word or two " * (number + 1)) for number in range(_DISTINCT)]
    noises = [rng.normal(scale=0.1, size=16000).astype(np.float32) for _ in range(_DISTINCT)]
    sounds = [Audio(noise, 16000) for noise in noises]
    made_up: dict[str, list[Any]] = {"picture": [*pictures], "text": [*texts], "sound": [*sounds]}
    for modality, items in made_up.items():
        inputs, _ = try_record(lambda items=items: torch.stack([preprocess(item) for item in items]))  # type: ignore[misc]
        if inputs is not None:
            return {modality: inputs}
    return {}


def draw_inputs_like(sample: Tensor, count: int) -> Tensor:
    """Returns made-up inputs [count, ...], the same on every call, of a sample's shape and type, not of its values.

    Args:
        sample: one input.
        count: number of inputs.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (count, *sample.shape)
    if sample.is_floating_point():
        return torch.randn(shape, generator=generator).to(sample.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(sample.dtype)


def choose_batch_size(encode: Encode, inputs: Tensor, batch_size: int) -> int:
    """Returns `batch_size` where rows of such a batch are independent to the bit, else 1.

    Args:
        encode: a backbone's encoding.
        inputs: up to `batch_size` made-up inputs, to try it on.
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
    # What is not a number is the same whatever stands beside it: it tells nothing of other inputs.
    return batch_size if independent and bool(together.isfinite().all()) else 1


def _are_same(first: Tensor, second: Tensor) -> bool:
    # NaN at the same places counts as the same: such a record is rejected for itself.
    return torch.equal(first.nan_to_num(), second.nan_to_num())
