"""The one boundary around everything that is done to one record: whatever happens, that record alone cannot be used.

A record is opened, indexed, labelled, preprocessed and encoded within it. What a library raises on bytes that nobody
foresaw, or when memory does not suffice, is the record's fault and no reason to stop: else one record would decide what
a site answers (PRIVACY.md, non-interference). Time and memory are bounded by public numbers before a record is read:
bytes of a file, pixels, voxels, samples and slices. A record within these bounds is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from common.types import BadRecord

_Made = TypeVar("_Made")


def try_record(make: Callable[[], _Made]) -> tuple[_Made, None] | tuple[None, str]:
    """Returns what was made of one record and None, or None and why it cannot be used, for the site's staff."""
    try:
        return make(), None
    except BadRecord as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 - the boundary: any error of one record is that record's alone
        # Never the error's text: it may quote the record.
        return None, f"it cannot be read or encoded ({type(error).__name__})"
