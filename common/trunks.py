"""Trunks: the parts of backbones that train, as further entries of a run's heads.

A trunk is one more module beside the heads of the tasks that use its backbone: it is sent, clipped, noised, aggregated
and kept as they are, under a name that no task can have (tasks' names have no dots). Nothing else knows of it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math

import torch
from torch import nn

from common.backbones import Backbone, FrozenEncoder
from common.backbones._boundary import INPUT, Divided, Divisible, Trunk, trainable_in
from common.backbones._projection import ProjectionLayer
from common.errors import nearest
from common.types import BadInput


@dataclasses.dataclass(frozen=True)
class Cut:
    """A backbone at a boundary.

    Attributes:
        below: the frozen part as a backbone of its own: its features are the outputs at the boundary, flattened.
        trunk: from those to the backbone's features; its initial weights are the backbone's.
    """

    below: Backbone
    trunk: Trunk


def cut(backbone: Backbone, block: str, key: str) -> Cut:
    """A backbone divided at a block; the backbone stays as it is.

    Args:
        backbone: whole.
        block: name of the first block that trains, or `input`.
        key: of the setting, for messages.

    Raises:
        BadInput: the kind or this encoder cannot be divided there; names the blocks.
    """
    module = backbone.module
    try:
        # Some kinds draw a probe at random.
        with torch.random.fork_rng(devices=[]):
            divided = _divide(backbone.kind, copy.deepcopy(module.encoder), block)
    except BadInput as error:
        raise BadInput(f"{key}.{error}") from error
    trunk = Trunk(divided, module.scale, copy.deepcopy(module.projection))
    trunk.open(trainable_in(trunk.above))
    flat = nn.Sequential(divided.below, nn.Flatten())
    num_values = math.prod(divided.shape)
    below = dataclasses.replace(
        backbone,
        digest=hashlib.sha256(f"{backbone.digest} {block}".encode()).hexdigest(),
        feature_dim=num_values,
        module=FrozenEncoder(flat, ProjectionLayer(None, num_values)),
        boundary=block,
    )
    return Cut(below, trunk)


def _divide(kind: object, encoder: nn.Module, block: str) -> Divided:
    if not isinstance(kind, Divisible):
        raise BadInput("from: expected a kind of backbone that can be divided, got one that is frozen as a whole")
    encoder.train(False)
    blocks = kind.blocks(encoder)
    if block == INPUT:
        block = blocks[0]
    if block not in blocks:
        raise BadInput(
            f"from: expected input or one of {', '.join(blocks)}, got {block!r}{nearest(block, [INPUT, *blocks])}"
        )
    return kind.divide(encoder, block)
