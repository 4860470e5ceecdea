"""The file with a declared public mean of a backbone's raw features: one tensor, and whose features it is the mean of.

It is declared, not proven: nobody can see in a mean which records it is of. It must be of public records, and of ones
like the task's: a mean of sharp photographs under blurred ones costs a point or two (PRIVACY.md, section 11).

# Shapes: D raw features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.files import write_atomic
from common.types import BadInput

_KEY = "projection.shift.public"
_MAKE = "`headwater simulate public-mean` makes it from public records"


def write_public_mean(
    path: Path,
    mean_D: Tensor,
    *,
    digest: str,
    num_records: int,
    others: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a mean as a file that `read_public_mean` reads.

    Args:
        path: the file.
        mean_D: float32 [D], mean of the raw features.
        digest: digest of the backbone without a projection.
        num_records: number of public records whose mean it is.
        others: further tensors of the file by name, such as the records' home sample (`common.serving.means`).
        notes: what is known of them, as text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {**(notes or {}), "backbone": digest, "records": str(num_records)}
    write_atomic(path, save({**(others or {}), "mean": mean_D}, metadata=about))


def read_public_mean(path: Path | None, digest: str) -> Tensor:
    """Returns the mean of a file, float32 [D].

    Args:
        path: the file; None in settings that travel without their weights.
        digest: digest of the backbone without a projection, to which the mean must belong.

    Raises:
        BadInput: there is no such file, or it is damaged, or of another backbone.
    """
    if path is None:
        raise BadInput(f"{_KEY}: expected a file with the mean of this backbone's features, got nothing; {_MAKE}")
    if not path.is_file():
        raise BadInput(f"{_KEY}: expected the mean of this backbone's features, found no file {path}; {_MAKE}")
    try:
        with safe_open(path, framework="pt") as file:
            belongs_to = (file.metadata() or {}).get("backbone")
            mean_D: Tensor = file.get_tensor("mean")
        whole = mean_D.dim() == 1 and mean_D.dtype == torch.float32 and bool(torch.isfinite(mean_D).all())
    except (ArithmeticError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise BadInput(f"{_KEY}: expected a file that holds a mean, got something else in {path}; {_MAKE}") from error
    if not whole:
        raise BadInput(f"{_KEY}: expected a file that holds a mean, got something else in {path}; {_MAKE}")
    if belongs_to != digest:
        raise BadInput(
            f"{_KEY}: expected the mean of this backbone's features, got that of another backbone, weights file or "
            f"preprocessing in {path}; {_MAKE}"
        )
    return mean_D
