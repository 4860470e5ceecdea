"""Environments of a few packages, without Headwater: exported models must work in them."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def make_environment(folder: Path, *packages: str) -> Path:
    """Returns the Python of a new environment with these installed packages, what they need, and nothing else.

    Args:
        folder: new folder of the environment.
        *packages: names of distributions that are installed here; their files are linked, not copied.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    waiting, known = list(packages), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in known:
            continue
        known.add(name)
        try:
            own = distribution(name)
        except PackageNotFoundError:
            continue  # Needed on another system only.
        for top in {path.parts[0] for path in own.files or () if path.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(own.locate_file(top)))
            if not (target / top).exists():
                (target / top).symlink_to(source, target_is_directory=source.is_dir())
        for need in own.requires or ():
            match = re.match(r"([\w.-]+)(?:\[(.+?)\])?", need)
            if match is not None and "extra ==" not in need:
                # Some name parts of a package as its extras: cuda-toolkit[cublas].
                waiting += [match[1], *(f"{match[1]}-{part}" for part in (match[2] or "").split(",") if part)]
    return folder / "bin" / "python"


def run_python(python: Path, folder: Path, *arguments: object) -> str:
    """Returns what a Python wrote to stdout; it works in a folder and sees nothing of this project.

    Args:
        python: of the environment.
        folder: working directory.
        *arguments: of the command.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    done = subprocess.run(
        [python, *map(str, arguments)],
        cwd=folder,
        env={**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / ".cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
