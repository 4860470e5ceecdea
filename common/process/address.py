"""Host and port, read in one place."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator


def _is_address(value: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})", value)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError(
            f"expected host:port, such as federation.example.org:9092, without http:// or https:// (it is always TLS), "
            f"got {value!r}"
        )
    return value


Address = Annotated[str, AfterValidator(_is_address)]
"""Host and port; no scheme, because a site never speaks anything but TLS."""
