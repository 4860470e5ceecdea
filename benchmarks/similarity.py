"""How well distances of released means order pairs of picture sets, beside the exact Frechet distance of all features.

    python -m benchmarks.similarity [--cache FOLDER] [--draws 200]

Twelve sets in one backbone, MobileNetV2 on 128 pixels and its classifier's 128 top directions as in
`configs/simulations/brain_mri.yaml`, and for comparison two other projections: MRI slices (two halves; of the second
also darker and blurred ones), CIFAR-10 (two halves; of the second also blurred and noisy ones), nuclei, blood cells,
scanned digits, and parts of two photographs. Each set is one site, which releases the sum of its features of length 1
with Gaussian noise: for the whole epsilon (delta 1e-5), or for the part of it that `solver: {kind: auto}` spends on
means. The sets are fixed; what is drawn anew is the noise (`numpy.random.default_rng(0)`, add/remove of one record).
Features are encoded once; `--cache` keeps them.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import spearmanr
from sklearn.datasets import load_digits, load_sample_images

from common.model.auto import MEANS
from common.model.backbones import open_pretrained
from common.privacy.gaussian import gdp_mu
from common.serving.means import FeatureMean, compute_distance

ASSETS = Path(os.environ.get("HEADWATER_ASSETS", "../shared/assets"))
PROJECTIONS: Mapping[str, Mapping[str, Any] | None] = {
    "128 directions, shifted by batch_norm": {"dim": 128, "shift": "batch_norm", "normalize": True},
    "128 directions": {"dim": 128, "normalize": True},
    "all 1280 features": None,
}
EPSILONS, DELTA = (0.5, 1.0, 3.0, 8.0), 1e-5
_SIDE, _BATCH, _CROPS = 128, 64, 300

Array = NDArray[np.float64]


def list_sets() -> dict[str, Callable[[], list[Image.Image]]]:
    """Returns the name of each set and what opens its pictures."""
    return {
        "MRI, first half": lambda: _open_mri(0),
        "MRI, second half": lambda: _open_mri(1),
        "MRI, second half, gamma 2": lambda: [_change(each, lambda x: x**2) for each in _open_mri(1)],
        "MRI, second half, 32 pixels": lambda: [_shrink(each, 32) for each in _open_mri(1)],
        "CIFAR-10, first half": lambda: _open_cifar(0),
        "CIFAR-10, second half": lambda: _open_cifar(1),
        "CIFAR-10, second half, blurred": lambda: [
            each.filter(ImageFilter.GaussianBlur(1.0)) for each in _open_cifar(1)
        ],
        "CIFAR-10, second half, noisy": _open_noisy,
        "nuclei": lambda: [Image.fromarray(each) for each in _read("nuclei_dsb2018/nuclei_128.npz")["images"]],
        "blood cells": _open_blood_cells,
        "digits": lambda: [Image.fromarray((each * 15.9).astype(np.uint8)) for each in load_digits().images],
        "photographs": _crop_photographs,
    }


def _read(name: str) -> Any:
    return np.load(ASSETS / "data" / name)


def _open_mri(half: int) -> list[Image.Image]:
    file = _read("brain_mri_4class/brain_mri_128.npz")
    return [Image.fromarray(each) for each in np.concatenate([file["train_images"], file["test_images"]])[half::2]]


def _open_zip(path: Path, chosen: Callable[[str], bool]) -> Iterator[Image.Image]:
    with zipfile.ZipFile(path) as file:
        for name in sorted(filter(chosen, file.namelist())):
            yield Image.open(io.BytesIO(file.read(name))).convert("RGB")


def _open_cifar(half: int) -> list[Image.Image]:
    path = ASSETS / "data" / "cifar10_jpg" / "cifar10_jpg_5000_2000.zip"
    return list(_open_zip(path, lambda name: "train" in name and name.endswith(".jpg")))[half::2]


def _open_noisy() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [_change(each, lambda x: x + 0.1 * rng.normal(size=x.shape)) for each in _open_cifar(1)]


def _open_blood_cells() -> list[Image.Image]:
    return list(_open_zip(ASSETS / "data" / "bccd" / "bccd_voc.zip", lambda name: name.endswith((".jpg", ".jpeg"))))


def _crop_photographs() -> list[Image.Image]:
    rng, crops = np.random.default_rng(2), []
    for pixels in load_sample_images().images:
        for _ in range(_CROPS // 2):
            top, left = (int(rng.integers(0, length - _SIDE)) for length in pixels.shape[:2])
            crops.append(Image.fromarray(pixels[top : top + _SIDE, left : left + _SIDE]))
    return crops


def _change(picture: Image.Image, change: Callable[[Array], Array]) -> Image.Image:
    pixels = np.clip(change(np.asarray(picture, np.float64) / 255.0), 0.0, 1.0)
    return Image.fromarray((pixels * 255.0).astype(np.uint8))


def _shrink(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC).resize(picture.size, Image.Resampling.BICUBIC)


def open_settings(projection: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns a backbone's settings."""
    return {
        "kind": "torchvision",
        "model": "mobilenet_v2",
        "weights": str(ASSETS / "backbones" / "mobilenet_v2" / "model.safetensors"),
        "preprocess": {"resize": _SIDE, "crop": None, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "projection": projection,
    }


def encode_sets(cache: Path) -> dict[str, torch.Tensor]:
    """Returns the raw features of each set, float32 [N, 1280], from a cache where they are there."""
    backbone, encoded = open_pretrained(open_settings(None), "backbone"), {}
    for number, (name, open_pictures) in enumerate(list_sets().items()):
        path = cache / f"{number}.npy"
        if not path.is_file():
            inputs = [backbone.preprocess(each) for each in open_pictures()]
            batches = [backbone.encode(inputs[first : first + _BATCH]) for first in range(0, len(inputs), _BATCH)]
            np.save(path, torch.cat(batches).numpy())
        encoded[name] = torch.from_numpy(np.load(path))
    return encoded


@dataclass(frozen=True)
class PictureSet:
    """A set as what is needed of it: mean, covariance and its square root of features of length 1, and their number."""

    mean_D: Array
    covariance_DD: Array
    root_DD: Array
    count: int


def summarise(features_ND: torch.Tensor) -> PictureSet:
    """Returns what is needed of a set."""
    unit_ND = torch.nn.functional.normalize(features_ND.double(), dim=1).numpy()
    covariance_DD = np.cov(unit_ND.T, bias=True)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    root_DD = (vectors_DD * np.sqrt(np.clip(values_D, 0.0, None))) @ vectors_DD.T
    return PictureSet(unit_ND.mean(0), covariance_DD, root_DD, len(unit_ND))


def compute_frechet(one: PictureSet, other: PictureSet) -> float:
    """Returns the squared Frechet distance of two sets (Dowson and Landau 1982)."""
    values_D = np.linalg.eigvalsh(one.root_DD @ other.covariance_DD @ one.root_DD)
    traces = np.trace(one.covariance_DD) + np.trace(other.covariance_DD)
    cross = 2.0 * np.sqrt(np.clip(values_D, 0.0, None)).sum()
    return float(np.square(one.mean_D - other.mean_D).sum() + traces - cross)


def release(sets: Sequence[PictureSet], noise: float, rng: np.random.Generator) -> list[FeatureMean]:
    """Returns each set's mean as a site releases it: a sum with noise, divided by the number of records."""
    means = []
    for number, each in enumerate(sets):
        deviation = noise / each.count
        mean_D = each.mean_D + deviation * rng.normal(size=each.mean_D.shape)
        means.append(FeatureMean(f"site-{number}", "backbone", mean_D, deviation, each.count, ""))
    return means


def correlate(sets: Sequence[PictureSet], exact: Sequence[float], noise: float, draws: int) -> Array:
    """Returns Spearman's correlation of noised distances with the exact ones, for each draw of the noise.

    Args:
        sets: the sets.
        exact: the distance of each pair.
        noise: deviation of the noise in each value of a sum.
        draws: number of draws.
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        means = release(sets, noise, rng)
        found.append(spearmanr([compute_distance(*pair).shown for pair in combinations(means, 2)], exact).statistic)
    return np.array(found)


def report(title: str, sets: Mapping[str, PictureSet], draws: int) -> None:
    """Prints what is found in one projection."""
    pairs = list(combinations(sets, 2))
    exact = [compute_frechet(sets[one], sets[other]) for one, other in pairs]
    counts = [each.count for each in sets.values()]
    print(f"\n{title}: {len(pairs)} pairs, {min(counts)} to {max(counts)} records", flush=True)
    without = correlate(list(sets.values()), exact, 0.0, 1)[0]
    print(f"Spearman of the mean part without noise: {without:.3f}")
    for epsilon in EPSILONS:
        cells = []
        for share, words in ((1.0, "one release of all"), (MEANS, f"{MEANS:.0%} of mu^2, as auto")):
            noise = 1.0 / (gdp_mu(epsilon, DELTA) * math.sqrt(share))
            found = correlate(list(sets.values()), exact, noise, draws)
            cells.append(f"{words} {found.mean():.3f} (deviation {found.std(ddof=1):.3f}, least {found.min():.3f})")
        print(f"epsilon {epsilon:g}: {'; '.join(cells)}")


def main() -> None:
    """Encodes the sets and prints the correlations in each projection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        raw = encode_sets(options.cache or Path(folder))
    for title, projection in PROJECTIONS.items():
        with torch.inference_mode():
            layer = open_pretrained(open_settings(projection), "backbone").module.projection
            sets = {name: summarise(layer(features_ND)) for name, features_ND in raw.items()}
        report(title, sets, options.draws)
        for one, other in combinations(sets, 2):
            means = [FeatureMean("", "", sets[name].mean_D, 0.0, sets[name].count, "") for name in (one, other)]
            frechet = compute_frechet(sets[one], sets[other])
            print(f"  {one} | {other}: mean part {compute_distance(*means).value:.3f}, whole {frechet:.3f}")


if __name__ == "__main__":
    main()
