"""The state from which a run continues after its process died: heads, aggregator state, number of rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import instead
from common.files import write_atomic
from common.types import BadInput, Heads
from server.rounds.aggregators import State


@dataclass(frozen=True)
class Checkpoint:
    """The coordinator's state after a number of rounds.

    Attributes:
        run_id: the run's unique id.
        rounds_done: number of whole rounds, 0 before the first.
        heads: heads and trunks after these rounds.
        states: what the aggregator keeps, for each head and trunk.
        updates: how often each head and trunk was updated.
        moments: what the release before the first round says of classes (`common.model.class_moments`).
    """

    run_id: str
    rounds_done: int
    heads: Heads
    states: Mapping[str, State]
    updates: Mapping[str, int]
    moments: Heads = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, whole or not at all."""
    flat: dict[str, np.ndarray] = {}
    for task, params in checkpoint.heads.items():
        flat |= {f"head/{task}/{name}": array for name, array in params.items()}
    for task, state in checkpoint.states.items():
        flat |= {f"state/{task}/{part}/{name}": array for part in state for name, array in state[part].items()}
    for group, params in checkpoint.moments.items():
        flat |= {f"moments/{group}/{name}": array for name, array in params.items()}
    flat = {name: np.asarray(array, order="C") for name, array in flat.items()}
    about = {
        "run_id": checkpoint.run_id,
        "rounds_done": str(checkpoint.rounds_done),
        "updates": json.dumps(dict(checkpoint.updates)),
    }
    write_atomic(path, save(flat, metadata=about))


def load_checkpoint(path: Path) -> Checkpoint:
    """Returns the checkpoint in a file.

    Raises:
        BadInput: the file is missing or not a checkpoint.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        updates = json.loads(about["updates"])
        heads: dict[str, dict[str, np.ndarray]] = {task: {} for task in updates}
        states: dict[str, dict[str, dict[str, np.ndarray]]] = {task: {} for task in updates}
        moments: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            kind, task, *rest = key.split("/")
            if kind == "head":
                heads[task][rest[0]] = array
            elif kind == "moments":
                moments.setdefault(task, {})[rest[0]] = array
            else:
                states[task].setdefault(rest[0], {})[rest[1]] = array
        return Checkpoint(about["run_id"], int(about["rounds_done"]), heads, states, updates, moments)
    except (OSError, KeyError, ValueError, TypeError, IndexError, SafetensorError) as error:
        raise BadInput(
            f"{path}: expected a checkpoint{instead(error)}; restore it, or remove it and resume the run: it begins "
            "again, and sites send the replies that they have stored at no further cost"
        ) from error
