"""Makes bags of real pictures whose label is whether any shows a class, as Ilse et al. (2018) do of digits.

    python -m benchmarks.bags FILE.npz

The CIFAR-10 pictures of the shared assets are dealt into bags without a picture in two of them, training and held-out
pictures apart. A bag has a normal number of pictures, at least two; its label says whether a ship is among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.sources import open_source

_PICTURES = "cifar10_jpg/cifar10_jpg_5000_2000.zip"
_CLASS = "ship"


def deal(count: int, *, mean: float, deviation: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns the number of the bag of each of so many pictures; the last bag may have fewer.

    Args:
        count: number of pictures.
        mean: mean number of pictures in a bag.
        deviation: standard deviation of that number.
        rng: decides the sizes.
    """
    bags: list[int] = []
    number = 0
    while len(bags) < count:
        bags += [number] * max(2, round(rng.normal(mean, deviation)))
        number += 1
    return np.array(bags[:count], dtype=np.int64)


def write_bags(out: Path, data: Path, *, mean: float, deviation: float, seed: int) -> None:
    """Writes an .npz file of pictures with their class, their bag and its label.

    Args:
        out: the file.
        data: folder of the shared data sets.
        mean: mean number of pictures in a bag.
        deviation: standard deviation of that number.
        seed: seed of the bags.
    """
    source = open_source({"kind": "image_folder", "path": str(data / _PICTURES), "splits": True}, "pictures").open()
    index, rng = source.index(), np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.generic]] = {}
    for side in ("train", "test"):
        positions = rng.permutation([at for at, record in enumerate(index) if record.split == side])
        names = np.array([index[at].cells["label"] for at in positions])
        bags = deal(len(positions), mean=mean, deviation=deviation, rng=rng)
        has_class = np.isin(bags, np.unique(bags[names == _CLASS]))
        arrays |= {
            f"{side}_x": np.stack([np.asarray(source.load(at).convert("RGB")) for at in positions]),
            f"{side}_class": names,
            f"{side}_bag": np.array([f"{side}-{bag}" for bag in bags]),
            f"{side}_label": np.where(has_class, "yes", "no"),
        }
        first = np.unique(bags, return_index=True)[1]
        print(f"{side}: {len(first)} bags, {has_class[first].mean():.2f} of them with a {_CLASS}")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **arrays)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/assets/data"))
    parser.add_argument("--mean", type=float, default=7.0)
    parser.add_argument("--deviation", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    write_bags(chosen.out, chosen.data, mean=chosen.mean, deviation=chosen.deviation, seed=chosen.seed)


if __name__ == "__main__":
    main()
