"""Bound the size of a network that somebody else names, before memory is taken for it.

Settings of a few words can ask for any number of layers of any width. Invariant: a network is first built without
memory (device meta), and its parts are counted while they are registered; beyond the bound nothing more is built.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from common.backbones import Kind
from common.types import BadInput

MAX_COUNTED = 1 << 24
"""Numbers that a network counts up to at most, such as rates of its layers or positions."""

MAX_PARTS = 1_000_000
"""Layers of a network at most: also those without weights take memory and time."""


@final
class _BoundedCounting(TorchFunctionMode):
    """Refuses rows of numbers that are longer than any network's: some are made on the CPU whatever device is asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if func in (torch.linspace, torch.arange, torch.logspace):
            count = func(*args, **{**kwargs, "device": "meta"}).numel()
            if count > MAX_COUNTED:
                raise BadInput(f"expected a network that counts to at most {MAX_COUNTED:,}, got {count:,}")
        return func(*args, **kwargs)


@contextmanager
def bound_network(max_bytes: int) -> Iterator[None]:
    """Refuses networks that are built inside, by this thread, as soon as they are too large.

    Args:
        max_bytes: most bytes of parameters and buffers together, at the size of their number formats.

    Raises:
        BadInput: a network is larger.
    """
    own, size, parts = threading.get_ident(), 0, 0

    def count(holder: nn.Module, name: str, tensor: Any) -> None:
        nonlocal size
        del holder, name
        if threading.get_ident() == own and isinstance(tensor, Tensor):
            size += tensor.numel() * tensor.element_size()
            if size > max_bytes:
                raise BadInput(
                    f"expected a network of at most {max_bytes / 2**30:.3g} GiB, got a larger one; name a smaller one, "
                    "or ask the site for another `backbone_limit_gib`"
                )

    def count_part(holder: nn.Module, name: str, part: Any) -> None:
        nonlocal parts
        del holder, name, part
        parts += threading.get_ident() == own
        if parts > MAX_PARTS:
            raise BadInput(f"expected a network of at most {MAX_PARTS:,} layers, got a larger one")

    handles = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
        registration.register_module_module_registration_hook(count_part),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_network(kind: Kind, max_bytes: int) -> None:
    """Builds a backbone's network without memory.

    Args:
        kind: its settings, resolved.
        max_bytes: most bytes of the network.

    Raises:
        BadInput: it is larger, or cannot be built so.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), _BoundedCounting(), bound_network(max_bytes):
            kind.architecture()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise BadInput(
            f"expected a network that can be built without memory, got {type(error).__name__} from {kind.kind!r}"
        ) from error
