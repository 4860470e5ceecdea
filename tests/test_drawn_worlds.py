"""As tests/test_two_worlds.py, for boxes and transcripts: one hostile unit moves only the noised sums, by its part.

Annotations and recordings are damaged, empty or as full as they may be, and a patient has several.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from client.data.sources.voc import write_annotation
from common.backbones.parts.hub.huggingface import silence
from common.model.backbones import open_backbones
from common.run import ONLY_BACKBONE
from tests.finished import write_maps
from tests.test_places_worlds import write_png
from tests.worlds import Replies, answer_run, make_run, make_site

pytestmark = pytest.mark.usefixtures("two_threads")

RATE = 16000


@dataclass(frozen=True)
class Entry:
    """A record that a test writes: whose it is, its side, and the bytes of its files; None for one that is missing."""

    patient: str
    split: str
    item: bytes | None
    label: bytes | None


@dataclass(frozen=True)
class Medium:
    """A task with a source and a backbone.

    Attributes:
        task: its settings.
        column: column of its labels.
        backbone: returns the settings of a backbone, whose files it writes to a folder.
        write: writes records to a folder and returns the source's settings.
        draw: patient, side and seed -> an honest record.
        hostile: returns units by what is wrong with them; the first ones are those of the quick test.
    """

    task: Mapping[str, Any]
    column: str
    backbone: Callable[[Path], dict[str, Any]]
    write: Callable[[Path, Sequence[Entry]], dict[str, Any]]
    draw: Callable[[str, str, int], Entry]
    hostile: Callable[[], dict[str, list[Entry]]]


# --- boxes -----------------------------------------------------------------------------------------------------------

HEIGHT, WIDTH = 20, 16


def annotate(*boxes: tuple[str, float, float, float, float]) -> bytes:
    return write_annotation(WIDTH, HEIGHT, boxes).encode()


def draw_objects(patient: str, split: str, seed: int) -> Entry:
    rng = np.random.default_rng(seed)
    pixels, boxes = rng.integers(0, 90, (HEIGHT, WIDTH, 3)), []
    for _ in range(seed % 3):
        left, top = rng.integers(0, 10, 2).tolist()
        pixels[top : top + 5, left : left + 5] += 140
        boxes.append((str(rng.choice(["cell", "grain"])), left, top, left + 5, top + 5))
    return Entry(patient, split, write_png(pixels), annotate(*boxes))


def list_hostile_objects() -> dict[str, list[Entry]]:
    good = draw_objects("pX", "train", 98)

    def of(*boxes: tuple[str, float, float, float, float]) -> list[Entry]:
        return [Entry("pX", "train", good.item, annotate(*boxes))]

    def with_label(label: bytes | None) -> list[Entry]:
        return [Entry("pX", "train", good.item, label)]

    whole, small = ("cell", 0, 0, WIDTH, HEIGHT), ("cell", 0, 0, 3, 3)
    return {
        "good": [good],
        "as many as may be": of(*[whole] * 8),
        "too many": of(*[small] * 10_001),
        "held out, as many as may be": [Entry("pX", "test", good.item, annotate(*[whole] * 8))],
        "a document type": with_label(b'<!DOCTYPE l [<!ENTITY a "x">]><a>&a;</a>'),
        "several": [good, draw_objects("pX", "train", 96), draw_objects("pX", "train", 95)],
        "none": of(),
        "one too many": of(*[small] * 9),
        "an unknown name": of(("q7", 0, 0, 3, 3)),
        "without area": of(("cell", 3, 3, 3, 3)),
        "outside": of(("cell", -900, -900, -3, -3)),
        "everywhere": of(("cell", -1e300, -1e300, 1e300, 1e300)),
        "no number": with_label(annotate(small).replace(b"<xmin>0", b"<xmin>inf")),
        "of another size": with_label(annotate(small).replace(b"<width>16", b"<width>17")),
        "deep": with_label(b"<a>" * 500_000 + b"</a>" * 500_000),
        "no annotation": with_label(None),
        "no picture": [Entry("pX", "train", None, annotate(small))],
        "a damaged picture": [Entry("pX", "train", b"garbage", annotate(small))],
        "many": [good] * 40,
    }


def write_objects(folder: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for each in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / each).mkdir(parents=True)
    for number, each in enumerate(entries):
        name = f"{number:03d}-{each.patient}"
        for path, data in ((f"JPEGImages/{name}.png", each.item), (f"Annotations/{name}.xml", each.label)):
            if data is not None:
                (folder / path).write_bytes(data)
        lists[each.split].append(name)
    for side, names in lists.items():
        (folder / "ImageSets" / "Main" / f"{side}.txt").write_text("\n".join(names) + "\n")
    sides = {"train": ["train"], "test": ["test"]}
    return {"kind": "voc", "path": str(folder), "sides": sides, "patient_pattern": r"^\d+-(\w+)"}


def make_maps(folder: Path) -> dict[str, Any]:
    return {**write_maps(folder, num_classes=1000, resize=16, grid=4, colours=True), "projection": {"normalize": True}}


# --- transcripts -----------------------------------------------------------------------------------------------------


def write_wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    wavfile.write(stream, rate, samples)
    return stream.getvalue()


def draw_speech(patient: str, split: str, seed: int, samples: int | None = None) -> Entry:
    rng = np.random.default_rng(seed)
    time = np.arange(samples or 2000 + 300 * (seed % 9)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * rng.choice([300, 3000]) * time) + rng.normal(scale=0.01, size=len(time))
    said = ["low high", "high", "low low high", "low"][seed % 4]
    return Entry(patient, split, write_wav((2**15 * tone).astype(np.int16)), said.encode())


def list_hostile_speech() -> dict[str, list[Entry]]:
    good, full = draw_speech("pX", "train", 97), draw_speech("pX", "train", 98, 6400)
    assert good.item is not None

    def of(item: bytes | None, label: str = "low", split: str = "train") -> list[Entry]:
        return [Entry("pX", split, item, label.encode())]

    def forge(start: int, value: int) -> list[Entry]:
        data = bytearray(good.item or b"")
        data[start : start + 4] = value.to_bytes(4, "little")
        return of(bytes(data))

    return {
        "good": [good],
        "as long as may be": of(full.item, "low low high low"),
        "a header that promises more": forge(40, 2**31),
        "held out, as long as may be": of(full.item, "low low low low", "test"),
        "shorter than what is said": of(draw_speech("pX", "train", 1, 200).item, "low high low high"),
        "several": [good, full, draw_speech("pX", "train", 95, 900)],
        "one word too many": of(full.item, "low " * 5),
        "far too many": of(good.item, "low " * 100_000),
        "an unknown word": of(good.item, "q7"),
        "nothing said": of(good.item, ""),
        "silence": of(write_wav(np.zeros(3000, np.int16))),
        "no sample": of(write_wav(np.zeros(0, np.int16))),
        "too long": of(draw_speech("pX", "train", 1, 7000).item),
        "not a number": of(write_wav(np.full(3000, np.nan, np.float32))),
        "a header that promises nothing": forge(40, 0),
        "a sample a second": forge(24, 1),
        "billions of samples a second": forge(24, 4 * 10**9),
        "no recording": of(None),
        "a damaged recording": of(b"garbage"),
        "many": [good] * 40,
    }


def write_speech(folder: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    folder.mkdir()
    rows = []
    for number, each in enumerate(entries):
        if each.item is not None:
            (folder / f"{number}.wav").write_bytes(each.item)
        rows.append((f"{number}.wav", (each.label or b"").decode(), each.patient, each.split))
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("audio", "said", "patient", "split"), *rows])
    listed = {"patient": "patient", "split": "split"}
    return {"kind": "manifest", "audio": "audio", "path": str(folder / "rows.csv"), **listed}


def make_frames(folder: Path) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    layers = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(feat_extract_norm="layer", num_conv_pos_embedding_groups=4, **sizes, **layers)
    with silence(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Wav2Vec2Model(config).save_pretrained(folder / "network")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "network")
    own = {"kind": "transformers", "folder": str(folder / "network"), "modality": "audio", "pooling": "frames"}
    return {**own, "every": 10, "seconds": 0.4, "projection": {"normalize": True}}


# --- two sites -------------------------------------------------------------------------------------------------------

DETECTION = {
    "kind": "detection",
    "labels": ["cell", "grain"],
    "sizes": {"cell": [0.3, 0.3]},
    "most_boxes": 8,
    "weights": {"cell": 100, "grain": 0.01},
}
CTC = {"kind": "ctc", "symbols": ["low", "high"], "unit": "words", "max_symbols": 4}
MEDIA = {
    "boxes": Medium(DETECTION, "boxes", make_maps, write_objects, draw_objects, list_hostile_objects),
    "speech": Medium({**CTC, "even_part": 1.0}, "said", make_frames, write_speech, draw_speech, list_hostile_speech),
    "aligned speech": Medium(
        {**CTC, "even_part": 0.0}, "said", make_frames, write_speech, draw_speech, list_hostile_speech
    ),
}


def compare(folder: Path, name: str, unit: str, *, quick: bool) -> None:
    """Asserts that each hostile unit moves only the sums of its own side, by its part, first and last alike."""
    medium = MEDIA[name]
    run = make_run(medium.backbone(folder), unit, tasks={"own": medium.task}, moments=None)
    backbone, columns = open_backbones(run)[ONLY_BACKBONE], {"own": medium.column}
    others = [
        medium.draw(f"p{patient}", "test" if patient % 3 == 2 else "train", 10 * patient + number)
        for patient in range(6)
        for number in range(2)
    ]

    def answer(path: str, entries: Sequence[Entry]) -> Replies:
        source = medium.write(folder / path, entries)
        return answer_run(make_site(folder / path, source, unit, columns), run, backbone)

    before = answer("before", others)
    for number, (what, hostile) in enumerate(list(medium.hostile().items())[: 5 if quick else None]):
        if unit == "example" and len(hostile) > 1:
            continue  # They are several units.
        orders = [[*others, *hostile]] if quick else [[*others, *hostile], [*hostile, *others]]
        parts = []
        for place, entries in enumerate(orders):
            after = answer(f"{number} {place}", entries)
            assert after.plain == before.plain, what
            part = {"train": after.update - before.update, "test": after.statistics - before.statistics}
            for side, own in part.items():
                # Sums travel as float32.
                assert np.linalg.norm(own) <= 1.0 + 1e-5, what
                assert any(each.split == side for each in hostile) or not own.any(), what
            assert what not in ("good", "as many as may be", "as long as may be") or part["train"].any(), what
            assert not what.startswith("held out") or part["test"].any(), what
            parts.append(part)
        for side in parts[0]:
            np.testing.assert_allclose(parts[0][side], parts[-1][side], atol=2e-5, err_msg=f"{what}: {side}")


@pytest.mark.parametrize("name", ["boxes", "aligned speech"])
def test_a_hostile_patient_moves_the_sums_by_its_own_part_alone(tmp_path: Path, name: str) -> None:
    compare(tmp_path, name, "patient", quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MEDIA))
@pytest.mark.parametrize("unit", ["example", "patient"])
def test_a_units_part_is_the_same_wherever_it_stands(tmp_path: Path, name: str, unit: str) -> None:
    compare(tmp_path, name, unit, quick=False)
