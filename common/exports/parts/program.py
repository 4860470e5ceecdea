"""A network as a program: traced once by torch, for any number of records."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from common.exports.parts.exported import Exported
from common.serving.network import ITEMS
from common.types import BadInput

UNTRACEABLE = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, NotImplementedError)
TOLERANCE = 1e-4
"""Largest distance of a program's outputs from the network's, on random inputs."""


def list_axes(exported: Exported) -> tuple[dict[int, Any], ...]:
    """Returns for each input the axes that may have any length."""
    batch = Dim("batch", min=1)
    named = {
        # The layers that read samples say themselves how many they need at least.
        axis: Dim.DYNAMIC if tensor.dtype == "float32" else Dim(axis, min=2, max=tensor.longest)
        for tensor in exported.raw.tensors
        for axis in tensor.shape
        if isinstance(axis, str) and axis != ITEMS
    }
    named[ITEMS] = Dim(ITEMS, min=1)
    return tuple(
        {0: batch, **{1 + index: named[axis] for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}}
        for tensor in exported.raw.tensors
    )


def draw_inputs(exported: Exported) -> tuple[torch.Tensor, ...]:
    """Returns the random inputs of a few records, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return exported.make_example()


def trace(exported: Exported) -> ExportedProgram:
    """Returns the network as a program of torch, compared with the network on random inputs.

    Raises:
        BadInput: torch cannot trace the network, or the program computes something else.
    """
    inputs = draw_inputs(exported)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(exported.network, inputs, dynamic_shapes=(list_axes(exported),))
        except UNTRACEABLE as error:
            raise BadInput(
                f"backbone {exported.backbone}: expected a network that torch can trace, got one that it cannot "
                f"({type(error).__name__})"
            ) from error
        check(exported, inputs, program.module()(*inputs))
    return program


def check(exported: Exported, inputs: tuple[torch.Tensor, ...], outputs: Any) -> None:
    """Checks that a program gives the network's outputs.

    Args:
        exported: the network.
        inputs: what the program was given.
        outputs: what it returned, for one task or in a sequence for all.

    Raises:
        BadInput: the outputs differ.
    """
    expected = exported.network(*inputs)
    pairs = [(outputs, expected)] if isinstance(expected, torch.Tensor) else zip(outputs, expected, strict=True)
    for got, own in pairs:
        if not torch.allclose(torch.as_tensor(got), own, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise BadInput(
                f"backbone {exported.backbone}: the exported program computes something else; export another format"
            )
