"""Checks of what a program hands to operators whose kernels believe it.

Some of torch's operators take a shape, a number of outputs or a divisor as it comes: with a wrong one they read memory
that is not their tensors', end the process, or go on for ever. Python's front doors to them check this; a program
calls them directly. Each such operator was found by a search with tensors between pages that may not be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MAX_KERNEL = 1 << 16
"""Places that a pool looks at along one axis at most."""

MAX_PIECES = 4096
"""Tensors that one call gives at most."""

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_DTYPES = ("dtype", "out_dtype")
_DIVIDED = ("unbind", "split", "unsafe_split", "chunk", "unsafe_chunk")
_INDEXED = {"embedding": "indices", "index_select": "index", "gather": "index", "scatter": "index"}


def check_operands(name: str, arguments: Mapping[str, Any]) -> None:
    """Checks one call.

    Args:
        name: `OPERATOR.OVERLOAD`.
        arguments: what it is called with, by the operator's own names; tensors perhaps without memory (device meta).

    Raises:
        ValueError: torch would not check itself what is wrong.
        IndexError: a number of a place lies beyond what is indexed.
    """
    packet, _, overload = name.partition(".")
    if any(isinstance(arguments.get(key), int) for key in _DTYPES):
        raise ValueError("expected a number format by its name")
    if packet in _GATES:
        _check_recurrent(packet, overload, arguments)
    elif packet in _CHECKS:
        _CHECKS[packet](arguments)
    elif "pool" in packet:
        _check_pool(arguments)
    elif packet in _DIVIDED:
        _check_pieces(arguments)
    if packet in _INDEXED or packet in ("index", "take_along_dim"):
        _check_places(packet, arguments)


def _check_recurrent(packet: str, overload: str, arguments: Mapping[str, Any]) -> None:
    """Checks the shapes of states and weights, which one of torch's implementations reads by those that it expects."""
    if overload != "input":
        raise ValueError("expected series of one length")
    inputs, params, states = arguments["input"], arguments["params"], arguments["hx"]
    states = states if isinstance(states, list) else [states]
    _expect(all(each.dim() == 3 for each in [inputs, *states]) and arguments["num_layers"] > 0)
    _expect(len({each.dtype for each in [inputs, *params, *states]}) == 1)
    hidden, sides = states[0].shape[-1], 1 + bool(arguments["bidirectional"])
    if any(state.shape[-1] != hidden for state in states):
        return  # States of another width have an implementation that checks.
    records = inputs.shape[0 if arguments["batch_first"] else 1]
    expected = (arguments["num_layers"] * sides, records, hidden)
    rows = _GATES[packet] * hidden
    for layer in range(arguments["num_layers"]):
        width = inputs.shape[2] if layer == 0 else sides * hidden
        wanted = [(rows, width), (rows, hidden), *([(rows,), (rows,)] if arguments["has_biases"] else [])]
        for side in range(sides):
            first = (layer * sides + side) * len(wanted)
            _expect([tuple(each.shape) for each in params[first : first + len(wanted)]] == wanted)
    _expect(all(tuple(state.shape) == expected for state in states))
    _expect(len(params) == arguments["num_layers"] * sides * (4 if arguments["has_biases"] else 2))


def _check_norm(arguments: Mapping[str, Any]) -> None:
    """Checks the statistics of a batch norm: there, and one for each channel."""
    values = next(iter(_pick(arguments, "input", "self")))
    needed = [arguments.get(key) for key in ("running_mean", "running_var")]
    further = [each for each in (arguments.get("weight"), arguments.get("bias")) if each is not None]
    channels = (values.shape[1],) if values.dim() >= 2 else None
    _expect(all(isinstance(each, Tensor) and tuple(each.shape) == channels for each in [*needed, *further]))


def _check_weight_norm(arguments: Mapping[str, Any]) -> None:
    rows, lengths, dim = arguments["v"], arguments["g"], arguments.get("dim", 0)
    _expect(rows.dtype == lengths.dtype and -rows.dim() <= dim < max(1, rows.dim()))
    if dim in (0, rows.dim() - 1):
        wanted = [size if axis == dim else 1 for axis, size in enumerate(rows.shape)]
        _expect(list(lengths.shape) == wanted and rows.numel() > 0)


def _check_resampled(arguments: Mapping[str, Any]) -> None:
    """Checks that an antialiased picture has the size that its scales say."""
    sizes = arguments["self" if "self" in arguments else "input"].shape[2:]
    for size, wanted, key in zip(sizes, arguments.get("output_size") or (), ("scales_h", "scales_w"), strict=False):
        scale = arguments.get(key)
        _expect(scale is None or (math.isfinite(scale) and scale > 0 and math.floor(size * scale) == wanted))


def _check_division(arguments: Mapping[str, Any]) -> None:
    """Refuses whole numbers rounded towards zero: the least by -1 ends the process."""
    if arguments.get("rounding_mode") == "trunc":
        both = (arguments["self"], arguments["other"])
        _expect(any(_is_fraction(each) for each in both))


def _check_pool(arguments: Mapping[str, Any]) -> None:
    _expect(max(arguments.get("kernel_size") or (1,)) <= MAX_KERNEL)


def _check_pieces(arguments: Mapping[str, Any]) -> None:
    length = arguments["self"].shape[arguments.get("dim", 0)]
    size = arguments.get("split_size", 1)
    if "chunks" not in arguments and not isinstance(size, list):
        _expect(size > 0 and length // size <= MAX_PIECES)
    _expect(arguments.get("chunks", 1) <= MAX_PIECES)


def _check_places(packet: str, arguments: Mapping[str, Any]) -> None:
    """Checks places before the call: on a GPU one that lies outside ends everything that follows as well."""
    if packet == "index":
        values = arguments["self"]
        for axis, index in enumerate(arguments["indices"]):
            if index is not None:
                _check_range(index, -values.shape[axis], values.shape[axis])
        return
    values = arguments["weight" if packet == "embedding" else "self"]
    index = arguments["indices" if packet == "take_along_dim" else _INDEXED[packet]]
    dim = 0 if packet == "embedding" else arguments.get("dim")
    length = values.numel() if dim is None else values.shape[dim] if values.dim() else 1
    _check_range(index, 0, length)


def _check_range(index: Tensor, low: int, high: int) -> None:
    if index.device.type != "meta" and index.numel():
        least, most = torch.aminmax(index)
        if int(least) < low or int(most) >= high:
            raise IndexError("expected places of the tensor")


def _is_fraction(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)


def _pick(arguments: Mapping[str, Any], *keys: str) -> list[Any]:
    return [arguments[key] for key in keys if key in arguments]


def _expect(fits: bool) -> None:
    if not fits:
        raise ValueError("expected operands that fit one another")


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "native_batch_norm": _check_norm,
    "_native_batch_norm_legit_no_training": _check_norm,
    "_weight_norm": _check_weight_norm,
    "_upsample_bilinear2d_aa": _check_resampled,
    "_upsample_bicubic2d_aa": _check_resampled,
    "div": _check_division,
}


def count_numbers(values: Iterable[Any]) -> int:
    """Returns how many numbers tensors show, however few of them are kept."""
    return sum(
        value.numel() if isinstance(value, Tensor) else count_numbers(value)
        for value in values
        if isinstance(value, Tensor | list)
    )
