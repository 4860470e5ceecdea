"""The file of a site's personal heads: how it is written, and who may read it.

A file begins with a line that says whether it may leave the site. What was computed from records without noise never
may: the loader gives it to a caller that states the purpose `AT_HOME`, and to no other. Whatever sends or exports heads
has another purpose, and gets a sentence. The line also keeps readers of the format behind it from opening the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import nn

from client.aligners import Alignment
from client.aligners.parts.head import AlignedHead
from client.personal.adapt import OwnHead
from client.protocol.site import PERSONAL_HEADS
from common.files import write_atomic
from common.model.parameters import load_parameters, parameters
from common.serving.folder import NEVER_LEAVES
from common.tasks import Task
from common.types import BadInput, DigestMismatch, Heads, Params

MAY_LEAVE = "computed from charged releases alone: may leave"

AT_HOME: Literal["at_home"] = "at_home"
"""The purpose of a caller that keeps everything at the site."""

_OWN = "own."
_OFFSET = f"{_OWN}offset"


@dataclass(frozen=True)
class PersonalHeads:
    """Heads that a site adapted to itself.

    Attributes:
        mode: `prior`, `fit`, `tied` or `adapt`.
        final_heads: digest of the federated heads that they were made from.
        may_leave: whether they were computed from what the site had released already, and from nothing else.
        heads: task -> parameters, with the site's offsets.
    """

    mode: str
    final_heads: str
    may_leave: bool
    heads: Heads


def list_head_parameters(head: nn.Module) -> dict[str, np.ndarray]:
    """Returns a personal head's parameters, and its offsets where it has any, by name."""
    if isinstance(head, AlignedHead):
        own = {f"{_OWN}{name}": values.detach().cpu().numpy() for name, values in head.named_buffers(recurse=False)}
        return {**parameters(head.head), **own}
    if not isinstance(head, OwnHead):
        return parameters(head)
    return {**parameters(head.head), _OFFSET: head.offset_K.detach().cpu().numpy()}


def open_personal_head(params: Params, task: Task, feature_dim: int) -> nn.Module:
    """Returns a personal head as a module.

    Args:
        params: parameters of the head, as `PersonalHeads` has them.
        task: the head's task.
        feature_dim: number of features that it reads.

    Raises:
        BadInput: they are not those of such a head.
    """
    module = task.head(feature_dim)
    load_parameters(module, {name: value for name, value in params.items() if not name.startswith(_OWN)})
    own = {name.removeprefix(_OWN): np.array(each) for name, each in params.items() if name.startswith(_OWN)}
    if "scale" in own:
        exact = {name: values.astype(np.float64) for name, values in own.items()}
        discriminant = (exact["weights_CD"], exact["bias_C"]) if "weights_CD" in exact else None
        return AlignedHead(
            module,
            Alignment(exact["scale"], exact["shift_D"]),
            discriminant,
            exact["log_mix_C"],
            exact["log_shares_C"],
            float(exact["temperature"]),
        )
    return OwnHead(module, torch.from_numpy(own["offset"])) if own else module


def save_personal_heads(folder: Path, personal: PersonalHeads) -> Path:
    """Writes personal heads to a run's folder, in place of earlier ones, and returns the file's path."""
    arrays = {
        f"{task}/{name}": np.asarray(value, order="C")
        for task, params in personal.heads.items()
        for name, value in params.items()
    }
    first = MAY_LEAVE if personal.may_leave else NEVER_LEAVES
    metadata = {"mode": personal.mode, "final_heads": personal.final_heads, "leaving": first}
    path = folder / PERSONAL_HEADS
    write_atomic(path, first.encode() + b"\n" + save(arrays, metadata=metadata))
    return path


def load_personal_heads(folder: Path, *, purpose: str) -> PersonalHeads:
    """Returns the personal heads of a run's folder.

    Args:
        folder: the run's folder at the site.
        purpose: what the caller does with them; anything but `AT_HOME` is refused heads that never leave.

    Raises:
        BadInput: there are none, or they never leave and the purpose is another.
        DigestMismatch: the file is damaged.
    """
    path = folder / PERSONAL_HEADS
    if not path.exists():
        raise BadInput(
            f"run {folder.name}: expected personal heads, but there are none; `headwater site adapt` makes them"
        )
    first, _, rest = path.read_bytes().partition(b"\n")
    if purpose != AT_HOME and first != MAY_LEAVE.encode():
        raise BadInput(f"{path}: {NEVER_LEAVES}; it is of use at this site only; the federated heads may leave")
    try:
        if first not in (MAY_LEAVE.encode(), NEVER_LEAVES.encode()):
            raise ValueError("the first line")
        # The header follows its length.
        metadata = json.loads(rest[8 : 8 + int.from_bytes(rest[:8], "little")])["__metadata__"]
        flat = load(rest)
        # Who changes the line alone changes nothing.
        if metadata["leaving"].encode() != first:
            raise ValueError("the first line and the metadata differ")
        heads: dict[str, dict[str, np.ndarray]] = {}
        for key, value in flat.items():
            task, _, name = key.partition("/")
            heads.setdefault(task, {})[name] = value
        return PersonalHeads(metadata["mode"], metadata["final_heads"], metadata["leaving"] == MAY_LEAVE, heads)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DigestMismatch(f"{path}: expected the personal heads of a run, got a damaged file") from error
