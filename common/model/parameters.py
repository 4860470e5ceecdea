"""Heads as values: modules to train, float32 arrays to send, and the way between the two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.tasks import Task
from common.types import FIXED, BadInput, Params

MAX_ROW_NORM = 2.0**14
"""Norm of the weights of one output at most: products with features are then exact (docs/exact-sums.md)."""


def create_heads(tasks: Mapping[str, Task], feature_dims: Mapping[str, int], seed: int) -> dict[str, nn.Module]:
    """Returns a new head for each task, reproducible from the seed and the task's name alone.

    Adding, removing or reordering other tasks does not change a head; torch's generators are left as they were.

    Args:
        tasks: task -> its definition.
        feature_dims: task -> number of features that its head reads.
        seed: seed of the run.
    """
    return {name: _initial_head(name, task, feature_dims[name], seed) for name, task in tasks.items()}


def _initial_head(name: str, task: Task, feature_dim: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(compute_seed(name, seed))
        return task.head(feature_dim)


def compute_seed(name: str, seed: int) -> int:
    """Returns the seed of torch's generator for one parameter group of a run."""
    return int.from_bytes(hashlib.sha256(f"headwater head {seed} {name}".encode()).digest()[:8], "little")


def parameters(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Returns float32 copies of what travels of a head, by name: its parameters that train, and its fixed numbers."""
    return {name: values.detach().cpu().numpy().astype(np.float32) for name, values in _list_travelling(module)}


def load_parameters(module: nn.Module, params: Params) -> None:
    """Put parameters into a head, in place.

    Raises:
        BadInput: names or shapes are not the head's, or a value is not finite; the head is unchanged.
    """
    own = dict(_list_travelling(module))
    _check(params, {name: tuple(parameter.shape) for name, parameter in own.items()})
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(np.array(params[name], dtype=np.float32)))


def _list_travelling(module: nn.Module) -> list[tuple[str, Tensor]]:
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return trained + [(name, buffer) for name, buffer in module.named_buffers() if name.startswith(FIXED)]


def _check(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if set(params) != set(shapes):
        raise BadInput(f"head: expected parameters {sorted(shapes)}, got {sorted(params)}")
    for name, shape in shapes.items():
        if params[name].shape != shape:
            raise BadInput(f"head: expected shape {shape} for {name}, got {params[name].shape}")
        if not np.isfinite(params[name]).all():
            raise BadInput(f"head: expected finite values in {name}")
        rows = params[name].reshape(len(params[name]), -1) if params[name].ndim > 1 else params[name].reshape(-1, 1)
        if not (np.linalg.norm(rows.astype(np.float64), axis=1) <= MAX_ROW_NORM).all():
            raise BadInput(f"head: expected rows of norm at most {MAX_ROW_NORM:g} in {name}, got a longer one")
