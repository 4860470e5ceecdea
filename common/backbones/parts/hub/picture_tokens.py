"""Networks of timm as networks that give features: tokens pooled outside of the model, or divided at a block.

A transformer is divided between two of its blocks. Another network is divided where its forward pass begins with its
parts, one after the other; the whole is compared with both sides, so that a network that is none is refused.

# Shapes: B pictures, T tokens, D features of a token.
"""

from __future__ import annotations

import copy
from typing import final

import torch
from torch import Tensor, nn

from common.backbones import Divided
from common.backbones.parts.boundary import check_whole, create_probe, divide_chain, list_trainable
from common.types import BadInput


@final
class PooledTokens(nn.Module):
    """A model of timm that gives tokens, and their pooling."""

    def __init__(self, model: nn.Module, pooling: str) -> None:
        """Stores a model without a classifier.

        Args:
            model: the model.
            pooling: `cls`, `mean` or `cls_mean`.

        Raises:
            BadInput: it is no transformer with a first token, where the pooling needs one.
        """
        super().__init__()
        prefix = getattr(model, "num_prefix_tokens", None)
        if "blocks" not in dict(model.named_children()) or prefix is None or (not prefix and pooling != "mean"):
            raise BadInput(f"pooling: expected `model` for a network without tokens of its own kind, got {pooling!r}")
        self.model = model
        self.pooling = pooling
        self.feature_dim = int(model.num_features) * (2 if pooling == "cls_mean" else 1)  # type: ignore[arg-type]

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Returns features_BD."""
        return self.pool(self.model.forward_features(pixels_B3HW))  # type: ignore[operator]

    def pool(self, tokens_BTD: Tensor) -> Tensor:
        """Returns features_BD of a model's tokens; registers, and a first token, are none of places."""
        mean_BD = tokens_BTD[:, int(self.model.num_prefix_tokens) :].mean(1)  # type: ignore[arg-type]
        if self.pooling == "mean":
            return mean_BD
        first_BD = tokens_BTD[:, 0]
        return first_BD if self.pooling == "cls" else torch.cat([first_BD, mean_BD], dim=1)


@final
class _LowerTokens(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        tokens_BTD: Tensor = self.model.forward_features(pixels_B3HW)  # type: ignore[operator]
        return tokens_BTD


@final
class _UpperTokens(nn.Module):
    def __init__(self, layers: nn.Module, norm: nn.Module, ending: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.children())
        self.norm = norm
        self.ending = ending

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        for layer in self.layers:
            tokens_BTD = layer(tokens_BTD)
        tokens_BTD = self.norm(tokens_BTD)
        if isinstance(self.ending, PooledTokens):
            return self.ending.pool(tokens_BTD)
        features_BD: Tensor = self.ending.forward_head(tokens_BTD)  # type: ignore[operator]
        return features_BD


def list_picture_blocks(network: nn.Module) -> list[str]:
    """Returns the names of the blocks that a trunk can begin with, in order."""
    model = network.model if isinstance(network, PooledTokens) else network
    assert isinstance(model, nn.Module)
    if _is_transformer(model):
        return [f"blocks.{name}" for name, _ in model.get_submodule("blocks").named_children()]
    return [name for name, part in _list_parts(model).items() if list_trainable(part)]


def divide_picture_model(network: nn.Module, block: str, item_shape: tuple[int, ...]) -> Divided:
    """Returns both sides of a block.

    Args:
        network: a model of timm without a classifier, or `PooledTokens`; not to be used afterwards.
        block: one of `list_picture_blocks`.
        item_shape: shape of a preprocessed item.

    Raises:
        BadInput: the network cannot be divided there.
    """
    try:
        return _divide(network, block, item_shape)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        # Half of a network that is no chain fails in any way.
        raise BadInput(f"from: expected a block at which this backbone can be divided, got {block!r}") from error


def _divide(network: nn.Module, block: str, item_shape: tuple[int, ...]) -> Divided:
    model = network.model if isinstance(network, PooledTokens) else network
    assert isinstance(model, nn.Module)
    if not _is_transformer(model):
        return divide_chain(network, block, item_shape, _list_parts(network))
    first = int(block.rpartition(".")[2])
    with torch.no_grad():
        probe_B = create_probe(item_shape, network)
        whole_BD = network(probe_B)
        below = _LowerTokens(_keep_blocks(copy.deepcopy(model), first))
        blocks, norm = model.get_submodule("blocks"), model.get_submodule("norm")
        layers = nn.Sequential(*list(blocks.children())[first:])
        for name in ("blocks", "norm", "patch_embed"):
            model.set_submodule(name, nn.Identity())
        for name, _ in list(model.named_parameters(recurse=False)):
            # Positions and first tokens belong to the lower side.
            setattr(model, name, None)
        above = _UpperTokens(layers, norm, network)
        at_boundary_BTD = below(probe_B)
        check_whole(above(at_boundary_BTD), whole_BD, block)
    return Divided(below, above, tuple(at_boundary_BTD.shape[1:]))


def _is_transformer(model: nn.Module) -> bool:
    return {"patch_embed", "blocks", "norm"} <= set(dict(model.named_children()))


def _keep_blocks(model: nn.Module, number: int) -> nn.Module:
    blocks = model.get_submodule("blocks")
    kept = list(blocks.children())[:number]
    model.set_submodule("blocks", nn.ModuleList(kept) if isinstance(blocks, nn.ModuleList) else nn.Sequential(*kept))
    model.set_submodule("norm", nn.Identity())
    return model


def _list_parts(network: nn.Module) -> dict[str, nn.Module]:
    """Returns a network's children in their order; a sequence is replaced by its own children."""
    parts: dict[str, nn.Module] = {}
    for name, part in network.named_children():
        inner = part.named_children() if isinstance(part, nn.Sequential) else ()
        parts |= {f"{name}.{key}": each for key, each in inner} or {name: part}
    return parts
