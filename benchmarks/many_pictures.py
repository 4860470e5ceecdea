"""A hundred thousand pictures: encoded, killed in the middle, gone on with, and their features read.

    python -m benchmarks.many_pictures FOLDER [COUNT]

FOLDER receives the pictures (JPEG, 32 x 32) where they are not there yet. The network is torchvision's
mobilenet_v3_small at 32 pixels, its weights random: 1024 features, kept in 16 bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.features import CPU, backbone_of
from benchmarks.measure import compare, stated
from client.data.encoding.partial import BLOCK_S
from client.data.feature_store import FeatureStore, rows_of
from client.data.sources import open_source
from tests.counted import Counted

COUNT, SIDE = 100_000, 32
_TOLD_EACH_S = 0.2


def write_pictures(folder: Path, count: int) -> None:
    """Writes pictures of two labels that are not there yet."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            image = Image.fromarray(np.roll(coarse[number % 256], number // 256, axis=(0, 1)))
            image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(path, quality=90)


def read_memory_mib() -> float:
    """Returns the memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def encode(pictures: Path, place: Path) -> None:
    """Encodes; prints lines of what is done, and at the end one of what was read."""
    torch.set_num_threads(2)
    source = Counted(open_source({"kind": "image_folder", "path": str(pictures)}, "source").open())
    source.digest()
    told = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TOLD_EACH_S or done == total:
            told = time.monotonic()
            print(json.dumps({"done": done, "at_s": told, "mib": read_memory_mib()}), flush=True)

    features = FeatureStore(place / "store").open_or_encode(
        source, backbone_of(place, side=SIDE), device=CPU, progress=tell
    )
    print(json.dumps({"loads": len(source.loads), "path": str(features.path)}), flush=True)


def run_child(pictures: Path, place: Path, kill_at: int | None) -> Iterator[dict[str, Any]]:
    """Yields the lines of a process that encodes, which is killed once so many records are done."""
    command = [sys.executable, "-m", "benchmarks.many_pictures", "--child", str(pictures), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            values: dict[str, Any] = json.loads(line)
            yield values
            if kill_at is not None and values.get("done", 0) >= kill_at:
                process.kill()
                return


def main() -> None:
    """The run that is killed, the one that goes on, and what it costs to read rows."""
    if sys.argv[1] == "--child":
        encode(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    pictures, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else COUNT
    write_pictures(pictures, count)
    with tempfile.TemporaryDirectory(dir=pictures.parent) as name:
        place = Path(name)
        killed = list(run_child(pictures, place, count // 2))
        *going_on, end = run_child(pictures, place, None)
        rate = (killed[-1]["done"] - killed[0]["done"]) / (killed[-1]["at_s"] - killed[0]["at_s"])
        twice = killed[-1]["done"] + end["loads"] - count
        note = "records; a part is what is encoded in the seconds of a block, twice, because one may not be told yet"
        stated(
            "records encoded twice after SIGKILL / a part", twice, 2 * BLOCK_S * rate, target=1.0, repeats=1, note=note
        )
        early = next(each["mib"] for each in killed if each["done"] >= count // 20)
        note = "MiB of memory that is no file's, in two processes"
        most = max(each["mib"] for each in killed + going_on)
        stated("memory: most / after a twentieth of the records", most, early, target=1.1, repeats=1, note=note)
        print(f"{rate:.0f} records a second, {killed[-1]['done']} before and {end['loads']} after SIGKILL", flush=True)
        path = Path(end["path"])
        gib = path.stat().st_size / 2**30
        every = np.arange(count)
        some = np.sort(np.random.default_rng(0).permutation(count)[: count // 2])
        for what, rows_R in (("all rows", every), ("half of the rows", some)):
            result = compare(
                f"{what} of the cache / NumPy's copy of a mapped array",
                lambda rows_R=rows_R: rows_of(path, rows_R),  # type: ignore[misc]
                lambda rows_R=rows_R: np.load(path, mmap_mode="r")[rows_R],  # type: ignore[misc]
                target=1.1,
                repeats=7,
                clock=time.process_time,
            )
            print(f"{gib * len(rows_R) / count / result.subject_s:.2f} GiB a second", flush=True)
        values = np.array(np.load(path, mmap_mode="r"))
        compare(
            "all rows of the cache / a copy in memory",
            lambda: rows_of(path, every),
            values.copy,
            target=1.5,
            repeats=7,
            clock=time.process_time,
        )


if __name__ == "__main__":
    main()
