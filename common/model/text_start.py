"""A linear head before its first round from what texts mean: class names and phrases through the text backbone.

A row of the head points from the middle of all classes' texts to its own class's. No record has a part in it, so it
costs no privacy; under noise it saves what the first rounds would have found. It helps where records are few.

# Shapes: D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.inputs import Text
from common.tasks import StartsFromTexts, Task
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from common.model.backbones import Backbone

ROW_LENGTH = 4.0
"""Length of a row, as the square root of their mean square. Seen on training sentences of SST-2 at epsilon 1 with the
words negative and positive: 500 sentences .605 from zero, .630 from length 2, .657 from 6; 5400: .778, .779, .776."""


def start_from_texts(
    heads: Mapping[str, nn.Module], tasks: Mapping[str, Task], backbones: Mapping[str, Backbone]
) -> None:
    """Sets the weights of heads whose tasks have texts for their labels, in place.

    Args:
        heads: task -> its head, linear.
        tasks: task -> its definition.
        backbones: task -> open backbone.

    Raises:
        BadInput: a backbone reads no texts, or its texts are all alike to it.
    """
    for name, task in tasks.items():
        texts = task.list_start_texts() if isinstance(task, StartsFromTexts) else []
        # Where a trunk trains, what a site opens of the backbone ends before the features; its weights are sent to it.
        if not texts or backbones[name].trunk is not None:
            continue
        rows_KD = encode_rows(texts, backbones[name], f"tasks.{name}.start")
        (weight_KD,) = (values for key, values in heads[name].named_parameters() if key.endswith("weight"))
        with torch.no_grad():
            weight_KD.copy_(rows_KD)


def encode_rows(texts: Sequence[Sequence[str]], backbone: Backbone, key: str) -> Tensor:
    """Returns the rows of a head, float32 [K, D], each from the middle of all classes' texts to its own class's.

    Args:
        texts: the texts of each class.
        backbone: open backbone.
        key: key of the setting, for messages.

    Raises:
        BadInput: the backbone reads no texts, or they are all alike to it.
    """
    try:
        means = [backbone.encode([backbone.preprocess(Text(text)) for text in own]).double().mean(0) for own in texts]
    except BadRecord as error:
        raise BadInput(
            f"{key}.texts: expected a backbone that reads these texts, got one that says: {error}"
        ) from error
    rows_KD = torch.stack(means)
    rows_KD = rows_KD - rows_KD.mean(0)
    length = float(rows_KD.square().sum(1).mean().sqrt())
    if not length > 1e-6:
        raise BadInput(f"{key}.texts: expected texts that differ between labels, got texts alike to the backbone")
    return (rows_KD * (ROW_LENGTH / length)).float()
