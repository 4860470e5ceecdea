"""A frozen backbone made fast without changing what it computes: BatchNorms folded, channels last, oneDNN's kernels.

The digest names the original: this copy is derived from it at the place that encodes, never sent and never hashed. In
float32 it is used only where it gives the original's features, which is checked on the first items it encodes; in
bfloat16, which a site must ask for, the difference is measured there and reported.

Left to itself, torch on one thread gives convolutions of one pixel in batches of less than 16, and all linear layers,
to other kernels than oneDNN's. These took up to 2.3 times as long (docs/benchmarks.md, Encoding).
"""

from __future__ import annotations

import copy
import logging
from typing import Any, TypeGuard, TypeVar, final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.backbones import Precision

TOLERANCE = 1e-4
"""Largest distance of the float32 copy's features from the original's, relative to their norm."""

WAY = "folded, oneDNN"
"""Name of what this module does to a backbone: with another one, features have other last bits."""

_CHECKED = 4

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)

_log = logging.getLogger(__name__)


@final
class FastBackbone:
    """Encodes batches as a `FrozenBackbone` does, faster.

    Attributes:
        error: the largest distance of a checked item's features from the original's, relative to their norm; None
            before the first batch.
    """

    def __init__(self, original: nn.Module, precision: Precision, device: torch.device) -> None:
        """Makes the fast copy.

        Args:
            original: a `FrozenBackbone`; it stays as it is.
            precision: number format inside the network.
            device: the device that it encodes on.
        """
        self.error: float | None = None
        self._original = original
        self._precision = precision
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._images = any(isinstance(part, nn.Conv2d) for part in original.modules())
        self._fast = self._copy(original).to(device)
        if device.type == "cpu" and precision == "float32" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            _pack(self._fast)

    def __call__(self, items_B: Tensor) -> Tensor:
        """Returns features_BD in float32, on the backbone's device."""
        if self.error is None:
            first_B = items_B[:_CHECKED]
            original_BD: Tensor = self._original(first_B)
            error = self._try(first_B, original_BD)
            if self._precision == "float32" and not error <= TOLERANCE:
                _log.info("the fast copy of a backbone is not used: its features differ by %.1e", error)
                self._fast, self._images, error = self._original, False, 0.0
            self.error = error
        return self._encode(items_B)

    def _try(self, items_B: Tensor, original_BD: Tensor) -> float:
        """Returns the error of the copy's features of items that the original encodes; NaN where it encodes none."""
        if self._precision != "float32":
            return _compute_error(self._encode(items_B), original_BD)
        try:
            return _compute_error(self._encode(items_B), original_BD)
        except RuntimeError:  # A processor for which a kernel is missing.
            return float("nan")

    def _encode(self, items_B: Tensor) -> Tensor:
        if items_B.is_floating_point():
            items_B = items_B.to(self._dtype)
        if self._images and items_B.dim() == 4:
            items_B = items_B.contiguous(memory_format=torch.channels_last)
        features_BD: Tensor = self._fast(items_B)
        return features_BD

    def _copy(self, original: nn.Module) -> nn.Module:
        fast = copy.deepcopy(original)
        network = fast.encoder
        assert isinstance(network, nn.Module)
        if any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
            network = _fold_batch_norms(network)
        # The projection stays in float32: it is small, and it amplifies what differs.
        network = network.to(self._dtype).requires_grad_(False).train(False)
        fast.encoder = network.to(memory_format=torch.channels_last) if self._images else network
        return fast


@final
class _Tracer(fx.Tracer):
    """Follows a network down to its convolutions and norms, also those of libraries' own classes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Returns whether a module is one step of the graph."""
        return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or fx.Tracer.is_leaf_module(self, m, module_qualified_name)


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """Returns the network without the BatchNorms whose only input is a convolution that nothing else reads."""
    try:
        graph = _Tracer().trace(network)
    except (TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError):
        return network  # A forward pass that depends on values cannot be traced: it keeps its BatchNorms.
    parts = dict(network.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    for node in calls:
        before, norm = node.args[0] if node.args else None, parts[node.target]
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = parts[str(before.target)]
        # A module that is called twice may stand before something else there.
        if not isinstance(convolution, nn.Conv2d) or targets.count(before.target) + targets.count(node.target) > 2:
            continue
        after = _find_after(norm)
        if after is not None:
            _replace(network, str(before.target), fuse_conv_bn_eval(convolution, norm))
            _replace(network, str(node.target), after)
    return fx.GraphModule(network, graph)


def _find_after(norm: nn.BatchNorm2d) -> nn.Module | None:
    """Returns what a BatchNorm does behind its normalising: nothing, or its own parts in order; None for anything else.

    Libraries have classes that also hold the activation that follows.
    """
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, affine=norm.affine)
    plain.load_state_dict(norm.state_dict(), strict=False)
    after = nn.Sequential(*norm.children())
    values = torch.linspace(-9.0, 9.0, 8 * norm.num_features).reshape(2, norm.num_features, 2, 2)
    with torch.no_grad():
        same = torch.allclose(norm(values), after(plain.train(False)(values)), rtol=1e-5, atol=1e-5)
    return after if same else None


def _replace(network: nn.Module, name: str, part: nn.Module) -> None:
    holder, _, own = name.rpartition(".")
    setattr(network.get_submodule(holder), own, part)


def _pack(network: nn.Module) -> None:
    """Lets a copy's convolutions and linear layers compute with oneDNN, on weights in its own order, in place."""
    for part in network.modules():
        # Set at the instance, so that what a library hangs on a layer, or reads of it, is still there.
        if _is_plain(part, nn.Linear):
            part.forward = _PackedLinear(part)  # type: ignore[method-assign]
        elif _is_plain(part, nn.Conv2d) and part.padding_mode == "zeros" and isinstance(part.padding, tuple):
            part.forward = _PackedConvolution(part)  # type: ignore[method-assign]


def _is_plain(part: nn.Module, layer: type[_Layer]) -> TypeGuard[_Layer]:
    """Returns whether a part computes what torch's own layer does, in float32."""
    return isinstance(part, layer) and type(part).forward is layer.forward and part.weight.dtype == torch.float32


@final
class _PackedConvolution:
    """The forward pass of a convolution."""

    def __init__(self, part: nn.Conv2d) -> None:
        self._how = (list(part.padding), list(part.stride), list(part.dilation), part.groups)
        self._bias = part.bias
        self._weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(part.weight.detach(), *self._how, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackedConvolution:
        return self  # Its weights never change, and torch cannot copy them.

    def __call__(self, input: Tensor) -> Tensor:
        nothing: tuple[str, list[Any], str] = ("none", [], "")
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(input, self._weight, self._bias, *self._how, *nothing)
        return output


@final
class _PackedLinear:
    """The forward pass of a linear layer."""

    def __init__(self, part: nn.Linear) -> None:
        self._bias = part.bias
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(part.weight.detach(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _PackedLinear:
        return self  # Its weights never change, and torch cannot copy them.

    def __call__(self, input: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._weight, self._bias, "none", [], "")
        return output


def _compute_error(features_BD: Tensor, original_BD: Tensor) -> float:
    distance_B = (features_BD - original_BD).double().flatten(1).norm(dim=1)
    return float((distance_B / original_BD.double().flatten(1).norm(dim=1).clamp(min=1e-12)).max())
