"""Sites of a few records, in every kind of source, for tests that compare two that differ by one unit.

One run has a task of every kind, on one backbone, so that a unit's part is a vector over all of them.
"""

from __future__ import annotations

import csv
import io
import json
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from PIL import Image

from client.app import make_app
from client.config import SiteConfig
from common import messages
from common.model.backbones import Backbone, open_backbones
from common.model.moments import list_parts
from common.model.parameters import parameters
from common.offers import list_digests, make_offer
from common.plugins import plugin_class
from common.privacy.noise import SeededEntropy
from common.run import ONLY_BACKBONE, RunConfig
from common.tasks import open_task
from common.types import Heads, heads_digest
from common.yaml import parse
from simulations.executors.in_process import FIRST_NODE_ID, InProcessGrid

MEASURED = {"bias": False, "centre": True, "prior": True}
TASKS: dict[str, dict[str, Any]] = {
    "age": {"kind": "regression", "range": [0, 100]},
    "death": {"kind": "survival", "boundaries": [100, 200, 400], "head": MEASURED},
    "finding": {"kind": "classification", "labels": ["tumour", "edema", "none"], "head": MEASURED},
    "odd": {"kind": "anomaly", "normal": "none", "anomalous": "edema"},
    "signs": {"kind": "multilabel", "labels": ["fever", "cough"], "smoothing": 0.1, "head": MEASURED},
    "voice": {"kind": "embedding", "labels": ["ann", "bob"], "head": {"bias": False}},
}
COLUMNS: dict[str, str | list[str]] = {
    "age": "age",
    "death": ["days", "died"],
    "finding": "finding",
    "odd": "finding",
    "signs": "signs",
    "voice": "voice",
}
LABELS = ("age", "days", "died", "finding", "signs", "voice")
PUBLIC_SIZE = 20
RATE = 0.5


@dataclass(frozen=True)
class Row:
    """A record that a test writes.

    Attributes:
        patient: whose it is.
        split: its side.
        cells: its labels by column.
        content: what the source knows how to write; None for a file that is not written.
        file: name of its file, where a table lists files; "" for one of its own.
    """

    patient: str
    split: str
    cells: Mapping[str, str]
    content: Any
    file: str = ""


def honest_rows(content: Callable[[np.random.Generator], Any], count: int = 8) -> list[Row]:
    """Returns two records for each of some patients, a third of them held out."""
    rng = np.random.default_rng(count)
    rows = []
    for patient in range(count):
        for number in range(2):
            cells = {
                "age": str(int(rng.integers(0, 100))),
                "days": str(int(rng.integers(0, 600))),
                "died": str(int(rng.integers(2))),
                "finding": TASKS["finding"]["labels"][int(rng.integers(3))],
                "signs": ["fever", "cough", "fever|cough"][int(rng.integers(3))],
                "voice": ["ann", "bob"][int(rng.integers(2))],
            }
            name, split = f"p{count}{patient}", "test" if patient % 3 == 2 else "train"
            rows.append(Row(name, split, cells, content(rng), f"{name}-{number}"))
    return rows


# --- kinds of sources ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Medium:
    """A kind of source with a backbone that reads it.

    Attributes:
        write: writes rows to a folder and returns the source's settings.
        backbone: returns the settings of a backbone, whose files it writes to a folder.
        content: content of an honest record.
        hostile: contents of hostile records, by what is wrong with them.
        splits: whether each record's side is a cell, which may hold another word.
    """

    write: Callable[[Path, Sequence[Row]], dict[str, Any]]
    backbone: Callable[[Path], dict[str, Any]]
    content: Callable[[np.random.Generator], Any]
    hostile: Mapping[str, Any]
    splits: bool = True


def _write_csv(path: Path, rows: Sequence[Row], names: Sequence[str], cells: Callable[[int, Row], list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["patient", "split", *LABELS, *names])
        for number, row in enumerate(rows):
            writer.writerow([row.patient, row.split, *(row.cells[name] for name in LABELS), *cells(number, row)])


_LISTED = {"patient": "patient", "split": "split"}
_NUMBERS = ("x0", "x1", "x2")


def _write_table(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    _write_csv(folder / "rows.csv", rows, _NUMBERS, lambda _, row: list(row.content))
    return {"kind": "table", "path": str(folder / "rows.csv"), "columns": list(_NUMBERS), **_LISTED}


def _columns(folder: Path) -> dict[str, Any]:
    del folder
    return {"kind": "identity", "columns": [{"name": name, "range": [-4, 4], "missing": "refuse"} for name in _NUMBERS]}


def _write_npz(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for side in ("train", "test"):
        part = [row for row in rows if row.split == side]
        arrays |= {f"{side}_{name}": np.array([row.cells[name] for row in part]) for name in LABELS}
        arrays[f"{side}_x"] = np.stack([row.content for row in part])
        arrays[f"{side}_patient"] = np.array([row.patient for row in part])
    np.savez(folder / "rows.npz", **arrays)
    parts = {
        side: {
            "inputs": f"{side}_x",
            "labels": {name: f"{side}_{name}" for name in LABELS},
            "patient": f"{side}_patient",
        }
        for side in ("train", "test")
    }
    return {"kind": "npz", "path": str(folder / "rows.npz"), "parts": parts}


def _write_texts(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    _write_csv(folder / "rows.tsv", rows, ["note"], lambda _, row: [row.content])
    return {"kind": "text", "path": str(folder / "rows.tsv"), "text": "note", **_LISTED}


def _write_series(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    _write_csv(folder / "rows.csv", rows, [f"t{step}" for step in range(16)], lambda _, row: list(row.content))
    names = ["patient", "split", *LABELS]
    return {"kind": "series", "path": str(folder / "rows.csv"), "labels": names, **_LISTED}


def _write_files(folder: Path, rows: Sequence[Row], suffix: str) -> list[str]:
    """Writes each content to a file whose name says the cells; returns the names."""
    names = []
    for number, row in enumerate(rows):
        cells = "_".join([row.patient, row.split, *(row.cells[name] for name in LABELS)])
        # In the rows' order: sources sort by name.
        names.append(f"{number:03d}_{cells}_{suffix}")
        (folder / names[-1]).write_bytes(row.content)
    return names


_PATTERN = "^[0-9]+_" + "_".join(f"(?P<{name}>[^_]*)" for name in ("patient", "split", *LABELS)) + "_"


def _named(kind: str, suffix: str) -> Callable[[Path, Sequence[Row]], dict[str, Any]]:
    def write(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
        (folder / "files").mkdir()
        _write_files(folder / "files", rows, suffix)
        test = {"split": ["test"]}
        return {
            "kind": kind,
            "path": str(folder / "files"),
            "pattern": _PATTERN,
            "patient": "patient",
            "test": test,
        }

    return write


def _listed(column: str, suffix: str) -> Callable[[Path, Sequence[Row]], dict[str, Any]]:
    def write(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
        names = [(row.file or f"{number:03d}") + suffix for number, row in enumerate(rows)]
        for name, row in zip(names, rows, strict=True):
            if row.content is not None:
                (folder / name).write_bytes(row.content)
        _write_csv(folder / "rows.csv", rows, ["file"], lambda number, _: [names[number]])
        return {"kind": "manifest", "path": str(folder / "rows.csv"), column: "file", **_LISTED}

    return write


def _example(kind: str, **changes: Any) -> Callable[[Path], dict[str, Any]]:
    """The settings of a backbone's own example."""
    return lambda folder: {**plugin_class("common.backbones", kind).example(folder).settings, **changes}


def _png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _picture(rng: np.random.Generator) -> bytes:
    return _png(rng.integers(0, 256, (12, 12)))


def _wav(samples: Any, rate: int = 8000) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return stream.getvalue()


def _recording(rng: np.random.Generator) -> bytes:
    pitch = rng.uniform(200, 3000)
    return _wav(8000 * np.sin(2 * np.pi * pitch * np.arange(2000) / 8000))


def _note(rng: np.random.Generator) -> str:
    return " ".join(rng.permutation(["the", "scan", "shows", "no", "tumour", "an", "edema"])[: rng.integers(2, 7)])


_GOOD_PNG = _png(np.arange(144).reshape(12, 12))
_PICTURES = {
    "empty file": b"",
    "garbage": b"\x00garbage\xff",
    "cut off": _GOOD_PNG[:-30],
    "damaged header": _GOOD_PNG[:16] + b"\xff\xff\xff\xff\xff\xff\xff\xff" + _GOOD_PNG[24:],
    "one pixel": _png([[255]]),
    "one row": _png([[255] * 5000]),
    "white": _png(np.full((12, 12), 255)),
}
_RECORDINGS = {
    "empty file": b"",
    "garbage": b"\x00garbage\xff",
    "no samples": _wav([]),
    "one sample": _wav([32767]),
    "silence": _wav(np.zeros(2000)),
    "absurd rate": _wav(np.zeros(2000), 2**31 - 1),
    "clipped": _wav(np.where(np.arange(2000) % 2, 32767, -32768)),
}
_TEXTS = {
    "empty": "",
    "long": "edema " * 3000,
    "unknown words": "q" * 5000,
    "controls": "\x01\x02\u202e\ufeff",
    "null": "the \x00 scan",
}
_CELLS = {
    "text for a number": ["1", "zwei", "0"],
    "infinite": ["inf", "-inf", "1e999"],
    "not a number": ["nan", "0", "0"],
    "empty": ["", "", ""],
    "extreme": ["1e300", "-1e300", "4"],
    "tiny": ["1e-310", "-1e-310", "1e-45"],
}
_VECTORS = {
    "infinite": np.full(3, np.inf, np.float32),
    "not a number": np.full(3, np.nan, np.float32),
    "largest": np.full(3, 3e38, np.float32),
    "denormal": np.full(3, 1e-45, np.float32),
    "zero": np.zeros(3, np.float32),
}
_SERIES = {
    "short": ["1", "2"] + [""] * 14,
    "empty": [""] * 16,
    "constant": ["7"] * 16,
    "text": ["1", "zwei"] + ["1"] * 14,
    "infinite": ["inf"] * 16,
    "extreme": ["1e300", "-1e300"] * 8,
}

MEDIA: dict[str, Medium] = {
    "table": Medium(_write_table, _columns, lambda rng: [f"{value:.3f}" for value in rng.normal(size=3)], _CELLS),
    "npz": Medium(
        _write_npz,
        lambda folder: {"kind": "identity", "dim": 3},
        lambda rng: rng.normal(size=3).astype(np.float32),
        _VECTORS,
        splits=False,
    ),
    "text": Medium(_write_texts, _example("transformers"), _note, _TEXTS),
    "series": Medium(
        _write_series,
        _example("series_cnn"),
        lambda rng: [f"{value:.3f}" for value in rng.normal(size=16)],
        _SERIES,
    ),
    "image_folder": Medium(_named("image_folder", ".png"), _example("small_cnn"), _picture, _PICTURES, splits=False),
    "manifest": Medium(_listed("image", ".png"), _example("small_cnn"), _picture, {**_PICTURES, "missing file": None}),
    "audio": Medium(_named("audio", ".wav"), _example("log_mel"), _recording, _RECORDINGS, splits=False),
}


# --- a site that answers ---------------------------------------------------------------------------------------------


def make_run(backbone: Mapping[str, Any], unit: str, **changes: Any) -> RunConfig:
    """Returns a run of one full-batch step with every kind of task; `changes` replace whole keys."""
    values: dict[str, Any] = {
        "name": "worlds",
        "seed": 3,
        "rounds": 1,
        "backbone": backbone,
        "tasks": TASKS,
        "solver": {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": RATE},
        "privacy": {"unit": unit, "delta": 1e-6, "noise_multiplier": 2.0},
        "aggregation": {"kind": "mean"},
        "moments": {"means": 0.2, "counts": 0.2},
        "evaluation": {"every": 1},
    }
    return parse(RunConfig, {**values, **changes}, base=Path.cwd())


def make_site(
    folder: Path, source: Mapping[str, Any], unit: str, columns: Mapping[str, str | list[str]] = COLUMNS
) -> SiteConfig:
    """Returns the file of a site with this source, whose tasks have these columns."""
    values = {
        "name": "north",
        "registry": "north",
        "unit": unit,
        "budget": {"epsilon": 100.0, "delta": 1e-6},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {"records": source},
        "tasks": {
            task: {"source": "records", "label": column, "missing": "refuse", "public_size": PUBLIC_SIZE}
            for task, column in columns.items()
        },
        "split": {"test_fraction": 0.3},
        "on_bad_record": "skip",
        "evaluation": {"share": 0.5, "evaluations": 1},
        "approval": "automatic",
        "ledger_dir": str(folder / "ledgers"),
        "state_dir": str(folder / "state"),
        "device": "cpu",
    }
    return parse(SiteConfig, values, base=folder)


@dataclass(frozen=True)
class Replies:
    """Everything that a site sent in a run of one round.

    Attributes:
        plain: bytes of every reply, in order, without the noised sums.
        moments: the sums before the first round, with noise, each times its factor: a unit's part has length 1 at most.
        update: the clipped sum of the round, with noise, in clip norms.
        statistics: the sums of the evaluation, with noise, in units of each task's bound.
    """

    plain: tuple[bytes, ...]
    moments: np.ndarray[Any, Any]
    update: np.ndarray[Any, Any]
    statistics: np.ndarray[Any, Any]


def answer_run(config: SiteConfig, run: RunConfig, backbone: Backbone) -> Replies:
    """Returns what a site answers to an honest coordinator. Its noise is the same each time."""
    grid = InProcessGrid(make_app(lambda context: config, SeededEntropy(0)), 1)

    def send(kind: str, payload: Any) -> RecordDict:
        message = Message(messages.encode(payload), dst_node_id=FIRST_NODE_ID, message_type=kind)
        [reply] = grid.send_and_receive([message])
        return reply.content

    blob, digest = backbone.blob(), backbone.digest
    only = {ONLY_BACKBONE: backbone}
    heads = make_heads(run, backbone.feature_dim)
    asked = [
        (messages.JOIN, messages.JoinRequest("run-1", make_offer(run, only), list_digests(only))),
        (messages.PART, messages.PartRequest("run-1", digest, 0, 1, blob.weights)),
        (messages.PREPARE, messages.PrepareRequest("run-1", {digest: blob.spec})),
        *([] if run.moments is None else [(messages.MOMENTS, messages.MomentsRequest("run-1"))]),
        (messages.TRAIN, messages.TrainRequest("run-1", 1, heads)),
        (messages.EVALUATE, messages.EvaluateRequest("run-1", 1, heads)),
        (messages.FINISH, messages.FinishRequest("run-1", heads, heads_digest(heads))),
    ]
    plain, sums = [], {}
    for kind, payload in asked:
        records = send(kind, payload)
        if kind == messages.MOMENTS:
            released = messages.decode(records, messages.MomentsReply).sums
            factors = list_parts(run, {name: open_task(spec, name) for name, spec in run.tasks.items()})
            sums[kind] = _flatten({part: {"sum": factors[part] * each["sum"]} for part, each in released.items()})
        if kind == messages.TRAIN:
            sums[kind] = _flatten(messages.decode(records, messages.TrainReply).delta.heads)
        if kind == messages.EVALUATE:
            sums[kind] = _flatten(messages.decode(records, messages.EvaluateReply).sums)
        plain += [kind.encode(), str(len(messages.to_bytes(records))).encode()]
        plain += [
            messages.to_bytes(RecordDict({key: records[key] for key in records if key not in ("heads", "public")}))
        ]
        plain += [_without_keyed_digests(str(records["public"]["json"])).encode()]  # type: ignore[index]
    update = sums[messages.TRAIN] * (PUBLIC_SIZE / RATE)
    return Replies(tuple(plain), sums.get(messages.MOMENTS, np.zeros(0)), update, sums[messages.EVALUATE])


def _without_keyed_digests(public: str) -> str:
    """Returns a reply's public part; of the witness its length alone: its digests have a key of the ledger's own."""
    values = json.loads(public)
    if values.get("witness"):
        values["witness"] = values["witness"]["length"]
    return json.dumps(values)


def make_heads(run: RunConfig, feature_dim: int) -> Heads:
    """Returns heads of random weights: those of new heads are zero, which hides much."""
    import torch

    heads = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, spec in run.tasks.items():
            head = open_task(spec, name).head(feature_dim)
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
            heads[name] = parameters(head)
    return heads


def _flatten(heads: Heads) -> np.ndarray[Any, Any]:
    return np.concatenate([heads[name][key].ravel() for name in sorted(heads) for key in sorted(heads[name])]).astype(
        np.float64
    )


@dataclass(frozen=True)
class Experiment:
    """A medium's run; its sites differ by their rows alone."""

    folder: Path
    medium: Medium
    unit: str
    run: RunConfig
    backbone: Backbone

    @classmethod
    def of(cls, folder: Path, medium: str, unit: str, **changes: Any) -> Experiment:
        """Returns the experiment of a medium, by name; `changes` replace whole keys of the run."""
        (folder / "backbone").mkdir(parents=True)
        run = make_run(MEDIA[medium].backbone(folder / "backbone"), unit, **changes)
        return cls(folder, MEDIA[medium], unit, run, open_backbones(run)[ONLY_BACKBONE])

    def answers(self, name: str, rows: Sequence[Row]) -> Replies:
        """Returns what a new site with these rows answers."""
        folder = self.folder / name
        folder.mkdir()
        return answer_run(make_site(folder, self.medium.write(folder, rows), self.unit), self.run, self.backbone)
