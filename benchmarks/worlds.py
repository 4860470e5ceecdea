"""Worlds that a head was not trained for: records of the public test data, changed in a way that is written here.

A world is features and labels as one unseen site would hold them. Features are those of the run's own backbone, and are
kept in a folder, because encoding takes minutes.

# Shapes: R records, D features, L samples.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from client.data.sources import SourceRecord, open_source
from common.inputs import Audio
from common.model.backbones import open_backbones
from common.yaml import load
from simulations.config import RUN_PREFIX, SimulationConfig
from simulations.partition import build_sites

Change = Callable[[Any, np.random.Generator], Any]
"""A record's content and a stream of its world -> its content in that world."""


@dataclass(frozen=True)
class World:
    """The records of one unseen site.

    Attributes:
        family: set of worlds that a table's row is about.
        name: what is different in it.
        left_out: site that does not train, because these are its records; None where no site's are.
        features_RD: features of all records.
        labels_R: number of each record's label.
    """

    family: str
    name: str
    left_out: str | None
    features_RD: NDArray[np.float32]
    labels_R: NDArray[np.int64]


def make_fed_heart_worlds(file: Path) -> list[World]:
    """Returns each hospital's patients.

    Args:
        file: simulation file with one source for each hospital.
    """
    config = load(SimulationConfig, file, [])
    (backbone,), (task,) = open_backbones(config.run, RUN_PREFIX).values(), config.tasks.values()
    labels = list(next(iter(config.run.tasks.values())).settings()["labels"])
    worlds = []
    for site, sources in sorted((config.partition.sites or {}).items()):
        source = open_source(sources[task.source], site).open()
        index = source.index()
        features_RD = backbone.encode([backbone.preprocess(source.load(at)) for at in range(len(index))]).numpy()
        named = [task.values[record.cells[task.label]] for record in index]
        worlds.append(World("fed-heart", site, site, features_RD, np.array([labels.index(name) for name in named])))
    return worlds


def make_fsdd_worlds(file: Path, cache: Path) -> list[World]:
    """Returns each speaker's recordings as they are, and in `SOUNDS`.

    Args:
        file: simulation file with one site for each speaker.
        cache: folder of features.
    """
    config = load(SimulationConfig, file, [])
    (source,), (task,) = config.sources, config.run.tasks
    labels = list(config.run.tasks[task].settings()["labels"])
    records = _Records(file, source, lambda record: True)
    speakers = [record.cells["speaker"] for record in records.index]
    labels_R = np.array([labels.index(record.cells["digit"]) for record in records.index])
    worlds = []
    for name, change in {"as recorded": _keep, **SOUNDS}.items():
        features_RD = records.encode(change, cache / f"fsdd-{name.replace(' ', '-')}.npy")
        for speaker in sorted(set(speakers)):
            own_R = np.array(speakers) == speaker
            family = "fsdd" if change is _keep else "fsdd changed"
            worlds.append(World(family, f"{speaker}, {name}", speaker, features_RD[own_R], labels_R[own_R]))
    return worlds


def make_picture_worlds(
    file: Path,
    cache: Path,
    task: str,
    changes: Mapping[str, Change],
    overrides: Sequence[str] = (),
    left_out: str | None = None,
) -> list[World]:
    """Returns the test pictures of a simulation as they are, and in each of the changes.

    Args:
        file: simulation file of pictures with a split of their own.
        cache: folder of features.
        task: the task whose labels are in a column of the source.
        changes: name of a world -> what is different in it.
        overrides: settings that replace those of the file.
        left_out: site whose training pictures are in each world too.
    """
    config = load(SimulationConfig, file, overrides)
    (source,) = config.sources
    labels = list(config.run.tasks[task].settings()["labels"])
    own = set() if left_out is None else _list_rows(config, source, left_out)
    records = _Records(file, source, lambda record: record.split == "test" or record.row in own, overrides)
    labels_R = np.array([labels.index(record.cells["label"]) for record in records.index])
    family = config.run.name
    return [
        World(
            family if change is _keep else f"{family} changed",
            name,
            left_out,
            records.encode(change, cache / f"{family}-{name.replace(' ', '-')}.npy"),
            labels_R,
        )
        for name, change in {"as it is": _keep, **changes}.items()
    ]


def shift_labels(world: World, alpha: float, rng: np.random.Generator, least: int = 200) -> World:
    """Returns a world with another mix of labels, drawn from a Dirichlet distribution, without repeating a record.

    Args:
        world: the world.
        alpha: concentration of the distribution.
        rng: source of the draws.
        least: number of records; a mix that has fewer is drawn again.
    """
    num_classes = int(world.labels_R.max()) + 1
    counts_C = np.bincount(world.labels_R, minlength=num_classes)
    while True:
        mix_C = rng.dirichlet(np.full(num_classes, alpha))
        num = int(np.floor(np.min(counts_C / np.maximum(mix_C, 1e-9))))
        if num >= least:
            break
    rows = [
        rng.choice(np.flatnonzero(world.labels_R == label), int(num * mix_C[label]), replace=False)
        for label in range(num_classes)
    ]
    taken_R = np.sort(np.concatenate(rows))
    name = f"{world.name}, other mix"
    return World("cifar10 mix", name, world.left_out, world.features_RD[taken_R], world.labels_R[taken_R])


def _list_rows(config: SimulationConfig, source: str, site: str) -> set[int]:
    """Returns the numbers of the records that a site is dealt."""
    with tempfile.TemporaryDirectory() as folder:
        (dealt,) = [each for each in build_sites(config, Path(folder)) if each.name == site]
        with Path(str(dealt.sources[source].settings()["rows"])).open(newline="", encoding="utf-8") as file:
            return {int(line["row"]) for line in csv.DictReader(file)}


class _Records:
    """Records of a source and the backbone that encodes them; both are opened when they are first needed."""

    def __init__(
        self, file: Path, source: str, select: Callable[[SourceRecord], bool], overrides: Sequence[str] = ()
    ) -> None:
        self._config = load(SimulationConfig, file, overrides)
        self._source = open_source(self._config.sources[source], source).open()
        index = self._source.index()
        self._positions = [at for at, record in enumerate(index) if select(record)]
        self.index = [index[at] for at in self._positions]
        self._backbone: Any = None

    def encode(self, change: Change, path: Path) -> NDArray[np.float32]:
        """Returns the features of all records after a change, from the cache where they are there.

        Args:
            change: what is different in each record.
            path: file of the features.
        """
        if path.exists():
            features_RD: NDArray[np.float32] = np.load(path)
            return features_RD
        if self._backbone is None:
            (self._backbone,) = open_backbones(self._config.run, RUN_PREFIX).values()
        rng = np.random.default_rng(0)
        parts = []
        for start in range(0, len(self._positions), 50):
            items = [change(self._source.load(at), rng) for at in self._positions[start : start + 50]]
            parts.append(self._backbone.encode([self._backbone.preprocess(item) for item in items]).numpy())
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(parts))
        return np.concatenate(parts)


def _keep(item: Any, rng: np.random.Generator) -> Any:
    del rng
    return item


# --- changes of pictures ---------------------------------------------------------------------------------------------


def _of_values(change: Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]) -> Change:
    """Returns a change of a picture from one of its values between 0 and 1."""

    def apply(item: Any, rng: np.random.Generator) -> Any:
        values = change(np.asarray(item, np.float64) / 255.0, rng)
        return np.round(255.0 * values.clip(0.0, 1.0)).astype(np.uint8)

    return apply


def _of_picture(change: Callable[[Image.Image], Image.Image]) -> Change:
    """Returns a change of a picture from one of a PIL image."""

    def apply(item: Any, rng: np.random.Generator) -> Any:
        del rng
        picture = item if isinstance(item, Image.Image) else Image.fromarray(item)
        return np.asarray(change(picture))

    return apply


def _add_noise(deviation: float) -> Change:
    return _of_values(lambda values, rng: values + deviation * rng.standard_normal(values.shape))


def _set_contrast(factor: float) -> Change:
    return _of_values(lambda values, rng: values.mean() + factor * (values - values.mean()))


def _set_gamma(gamma: float) -> Change:
    return _of_values(lambda values, rng: values**gamma)


def _set_resolution(side: int) -> Change:
    return _of_picture(
        lambda picture: picture.resize((side, side), Image.Resampling.BOX).resize(
            picture.size, Image.Resampling.BILINEAR
        )
    )


def _compress(quality: int) -> Change:
    def apply(picture: Image.Image) -> Image.Image:
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=quality)
        return Image.open(io.BytesIO(stored.getvalue()))

    return _of_picture(apply)


def _both(first: Change, second: Change) -> Change:
    return lambda item, rng: second(first(item, rng), rng)


PICTURES: Mapping[str, Change] = {
    "noise": _add_noise(0.1),
    "blur": _of_picture(lambda picture: picture.filter(ImageFilter.GaussianBlur(1.0))),
    "half resolution": _set_resolution(16),
    "contrast 0.3": _set_contrast(0.3),
    "dark": _of_values(lambda values, rng: 0.4 * values),
    "bright": _of_values(lambda values, rng: 0.5 + 0.5 * values),
    "grey": _of_picture(lambda picture: picture.convert("L").convert("RGB")),
    "JPEG 10": _compress(10),
}

SLICES: Mapping[str, Change] = {
    **{f"contrast {factor:g}": _set_contrast(factor) for factor in (0.3, 0.5, 0.7, 1.5)},
    **{f"gamma {gamma:g}": _set_gamma(gamma) for gamma in (0.4, 0.6, 1.6, 2.5)},
    **{f"resolution {side}": _set_resolution(side) for side in (64, 43, 32)},
    "noise": _add_noise(0.08),
    "contrast 0.5, resolution 64": _both(_set_contrast(0.5), _set_resolution(64)),
    "gamma 1.6, resolution 64": _both(_set_gamma(1.6), _set_resolution(64)),
}


# --- changes of sound ------------------------------------------------------------------------------------------------


def _of_samples(
    change: Callable[[NDArray[np.float64], int, np.random.Generator], NDArray[np.float64]],
) -> Change:
    """Returns a change of a recording from one of its samples at its rate."""

    def apply(item: Audio, rng: np.random.Generator) -> Audio:
        samples_L = np.asarray(item.samples_T, np.float64)
        return Audio(change(samples_L, item.sample_rate, rng).astype(np.float32), item.sample_rate)

    return apply


def _filter_below(samples_L: NDArray[np.float64], rate: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns the samples without what is above 1 kHz."""
    del rng
    spectrum = np.fft.rfft(samples_L)
    frequencies = np.fft.rfftfreq(len(samples_L), 1.0 / rate)
    return np.fft.irfft(spectrum / np.sqrt(1.0 + (frequencies / 1000.0) ** 16), len(samples_L))


def _filter_above(samples_L: NDArray[np.float64], rate: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns the samples without what is below 1 kHz."""
    return samples_L - _filter_below(samples_L, rate, rng)


def _add_hiss(samples_L: NDArray[np.float64], rate: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns the samples with white noise of a tenth of their power."""
    del rate
    return samples_L + np.sqrt(0.1 * np.mean(samples_L**2)) * rng.standard_normal(len(samples_L))


def _reverberate(samples_L: NDArray[np.float64], rate: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns the samples as in a room whose sound falls by 60 dB in half a second."""
    times = np.arange(rate // 2) / rate
    room = np.random.default_rng(1).standard_normal(len(times)) * 10.0 ** (-6.0 * times)
    room[0] = 3.0
    heard_L = np.convolve(samples_L, room)[: len(samples_L)]
    return heard_L / max(1e-9, np.abs(heard_L).max()) * np.abs(samples_L).max()


def _overdrive(samples_L: NDArray[np.float64], rate: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns the samples cut off at a tenth of their peak."""
    del rate, rng
    most = 0.1 * np.abs(samples_L).max()
    return samples_L.clip(-most, most)


SOUNDS: Mapping[str, Change] = {
    "white noise 10 dB": _of_samples(_add_hiss),
    "below 1 kHz": _of_samples(_filter_below),
    "above 1 kHz": _of_samples(_filter_above),
    "reverberation": _of_samples(_reverberate),
    "overdriven": _of_samples(_overdrive),
}
