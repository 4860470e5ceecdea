"""Values that are remembered while they are in use: a cache whose limit is the size of its values, not their number.

Invariant: beside the value that was kept last, all together are no larger than the limit. Any number of threads may use
one.
"""

from __future__ import annotations

import threading
from typing import Generic, TypeVar, final

Value = TypeVar("Value")


@final
class Recent(Generic[Value]):
    """Values by key; those that were kept longest ago are forgotten first."""

    def __init__(self, limit: int) -> None:
        """Begins with none.

        Args:
            limit: the size of all values together, in any unit.
        """
        self._limit = limit
        self._lock = threading.Lock()
        self._values: dict[str, tuple[Value, int]] = {}
        self._size = 0

    def take(self, key: str) -> Value | None:
        """Returns a key's value, which is forgotten until it is kept again; None where there is none."""
        with self._lock:
            value, size = self._values.pop(key, (None, 0))
            self._size -= size
        return value

    def keep(self, key: str, value: Value, size: int) -> None:
        """Remembers a value.

        Args:
            key: its key; what was remembered under it is forgotten.
            value: the value.
            size: its size, in the unit of the limit.
        """
        self.take(key)
        with self._lock:
            while self._values and self._size + size > self._limit:
                self._size -= self._values.pop(next(iter(self._values)))[1]
            self._values[key] = (value, size)
            self._size += size

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._values.clear()
            self._size = 0
