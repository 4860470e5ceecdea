"""The part of a network up to one of its layers, as a network that gives features.

Nothing behind the layer is computed or kept: modules that a trial without memory does not reach are left out, so that
the decoder of a U-shaped net neither travels nor takes memory.

# Shapes: B records, C channels, T tokens, D features.
"""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.errors import nearest
from common.types import BadInput

_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of a network on inputs that it does not take."""


class _Reached(Exception):
    """Ends a forward pass at a layer, and carries what it gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@final
class NumbersOnCpu(TorchFunctionMode):
    """Lets a network that is built without memory read the rates of its layers, which are numbers of a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    del module, inputs
    raise _Reached(output)


@final
class Encoder(nn.Module):
    """A network up to a layer, whose output is averaged over all places or tokens.

    Attributes:
        feature_dim: number of features.
    """

    def __init__(self, net: nn.Module, layer: str, shape: tuple[int, ...]) -> None:
        """Leaves out of a network what the layer does not need.

        Args:
            net: the network; not to be used afterwards.
            layer: name of the layer.
            shape: shape of one input, without a batch dimension.

        Raises:
            BadInput: there is no such layer, or the network does not take such inputs.
        """
        super().__init__()
        known = [name for name, _ in net.named_modules() if name]
        if layer not in known:
            raise BadInput(f"layer: expected a layer of the network, got {layer!r}{nearest(layer, known)}")
        self.net = net.train(False)
        self.net.get_submodule(layer).register_forward_hook(_stop)
        used, self.feature_dim = _try_without_memory(self.net, shape)
        _leave_out(self.net, "", used)

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns features_BD."""
        return _average(_run(self.net, inputs_B))


def _run(net: nn.Module, inputs_B: Tensor) -> Any:
    try:
        net(inputs_B)
    except _Reached as reached:
        return reached.output
    raise RuntimeError("the layer was not reached")


def _average(output: Any) -> Tensor:
    """Returns features_BD of B x C x places, B x T x D tokens, or the last of several such tensors."""
    values_B = output
    while isinstance(values_B, list | tuple) and values_B:
        values_B = values_B[-1]
    if not isinstance(values_B, Tensor) or values_B.ndim < 2:
        raise BadInput("layer: expected one that gives a tensor for each record")
    if values_B.ndim == 2:
        return values_B
    return values_B.mean(1) if values_B.ndim == 3 else values_B.flatten(2).mean(2)


def _try_without_memory(net: nn.Module, shape: tuple[int, ...]) -> tuple[set[str], int]:
    """Returns the names of the modules that run before the layer has ended, and the number of features."""
    tensors = [*net.parameters(), *net.buffers()]
    trial = copy.deepcopy(net, {id(tensor): _without_memory(tensor) for tensor in tensors})
    used: set[str] = set()
    # Some nets hold a layer under two names.
    for name, part in trial.named_modules(remove_duplicate=False):
        part.register_forward_pre_hook(lambda module, inputs, name=name: used.add(name))
    try:
        with torch.device("meta"), torch.no_grad():
            features_BD = _average(_run(trial, torch.zeros(2, *shape)))
    except _ERRORS as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"reads: expected inputs that the network takes, got {' x '.join(map(str, shape))}, with which it raises "
            f"{type(error).__name__}; choose another size, or the network's `options`"
        ) from error
    if len(features_BD) != 2:
        raise BadInput("layer: expected one that gives a tensor for each record")
    return used, features_BD.shape[1]


def _without_memory(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


def _leave_out(module: nn.Module, prefix: str, used: set[str]) -> None:
    for name, child in list(module.named_children()):
        full = f"{prefix}{name}"
        # Lists and some wrappers are never called themselves.
        if any(each == full or each.startswith(f"{full}.") for each in used):
            _leave_out(child, f"{full}.", used)
        else:
            setattr(module, name, nn.Identity())
