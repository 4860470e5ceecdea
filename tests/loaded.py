"""Modules that reading a kind's settings loads, seen in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Mapping

_REPORT = """
import json, sys
settings, heavy = json.loads(sys.argv[1]), json.loads(sys.argv[2])
loaded = {}
for kind, own in settings.items():
    read(own)
    loaded[kind] = [name for name in heavy if name in sys.modules]
    for name in loaded[kind]:
        heavy.remove(name)
print(json.dumps(loaded))
"""


def list_loaded(
    code: str, settings: Mapping[str, Mapping[str, object]], heavy: Collection[str]
) -> dict[str, list[str]]:
    """Returns kind -> those of some modules that the first reading of its settings loaded, kind after kind.

    Args:
        code: Python that defines `read`, which takes settings.
        settings: kind -> its settings, as JSON can write them.
        heavy: names of modules.
    """
    command = [sys.executable, "-c", code + _REPORT, json.dumps(dict(settings)), json.dumps(list(heavy))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, list[str]] = json.loads(done.stdout)
    return loaded
