"""The mean of public records' features, which a backbone's projection subtracts (`shift: {public: FILE}`).

Features of most networks have a large common part. Heads without a bias learn faster under noise once it is subtracted,
and what it is can be seen on any records like those of the task: on public ones it costs no budget.

# Shapes: N records, D raw features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.data.feature_store import FeatureStore, decode_rows
from client.data.sources import Source, SourceRecord, open_source
from common.backbones import Kind, find_public_mean_file
from common.backbones.parts.public_mean import write_public_mean
from common.errors import instead
from common.model.backbones import Backbone, open_pretrained
from common.plugins import Spec, resolve
from common.run import Name, RunConfig
from common.types import BadInput, BadRecord
from common.yaml import parse, read_yaml
from server.rounds.messenger import Observe

_ROWS_AT_ONCE = 4096
_FEWEST = 2
_RECORDS = "pictures, recordings, or texts, one a line"


@dataclass(frozen=True)
class PublicMean:
    """A mean that was written.

    Attributes:
        path: its file.
        num_records: number of records whose mean it is.
        reasons: why a record could not be used, for each that could not.
        error: standard error of the mean, relative to its length.
    """

    path: Path
    num_records: int
    reasons: list[str]
    error: float


def measure_public_mean(
    run: RunConfig, records: Path, *, prefix: str, backbone: Name | None, shrink: int | None, observe: Observe
) -> PublicMean:
    """Writes the mean of public records' features to the file that a run's backbone names.

    Args:
        run: the run; its backbone's projection says `shift: {public: FILE}`.
        records: a folder or zip of pictures or recordings, a folder or file of texts, one a line, or a YAML file with
            the settings of a source.
        prefix: beginning of keys in error messages, where the run stands inside another file.
        backbone: name of the backbone; None where the run has one.
        shrink: pixels of the shorter side that larger pictures are shrunk to first; None leaves them as they are.
        observe: receives the progress in records.

    Raises:
        BadInput: the run's backbone names no file, or cannot be opened; there are no records, or too few that the
            backbone reads; the file cannot be written.
    """
    name = _choose_backbone(run, backbone)
    key = prefix + run.backbone_key(name)
    kind: Kind = resolve("common.backbones", run.backbone_specs[name], key)
    path = find_public_mean_file(kind)
    if path is None:
        raise BadInput(f"{key}.projection.shift: expected `{{public: FILE}}`, the file to write the mean to")
    plain = open_pretrained({**kind.model_dump(mode="json", by_alias=True), "projection": None}, key)
    sources = list(_open_sources(records))
    if shrink is not None:
        sources = [ShrunkPictures(source, shrink) for source in sources]
    sums = _add_up(sources, plain, observe)
    if sums.count < _FEWEST:
        because = f" ({sums.reasons[0]})" if sums.reasons else ""
        raise BadInput(f"{records}: expected at least {_FEWEST} records that {key} reads, got {sums.count}{because}")
    mean_D = sums.sum_D / sums.count
    try:
        write_public_mean(path, mean_D.float(), digest=plain.digest, num_records=sums.count)
    except OSError as error:
        raise BadInput(f"{key}.projection.shift.public: expected a file that can be written{instead(error)}") from error
    return PublicMean(path, sums.count, sums.reasons, _estimate_error(mean_D, sums.squares, sums.count))


def _choose_backbone(run: RunConfig, name: Name | None) -> Name:
    names = list(run.backbone_specs)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        raise BadInput(f"--backbone: expected one of {', '.join(names)}, got {name or 'nothing'}")
    return name


def _open_sources(records: Path) -> Iterator[Source]:
    """Yields the sources of public records that a path stands for."""
    if records.suffix.lower() in (".yaml", ".yml"):
        yield open_source(parse(Spec, read_yaml(records), base=records.resolve().parent), str(records)).open()
        return
    if not records.exists():
        raise BadInput(f"{records}: expected a folder or file of public {_RECORDS}, found none")
    if records.is_dir() or records.suffix.lower() in (".zip", ".whl"):
        for kind in ("image_folder", "audio"):
            try:
                yield open_source({"kind": kind, "path": str(records), "pattern": "(?P<name>.*)"}, "records").open()
                return
            except BadInput:
                continue  # None of this kind in it.
    texts = sorted(records.rglob("*.txt")) if records.is_dir() else [records]
    if not texts or records.suffix.lower() in (".zip", ".whl"):
        raise BadInput(f"{records}: expected {_RECORDS}, got none")
    for file in texts:
        # No text holds this separator: a line is a text, whatever else stands in it.
        settings = {"path": str(file), "separator": "\x1f", "header": ["text"]}
        yield open_source({"kind": "text", "text": "text", **settings}, "records").open()


@dataclass(frozen=True)
class _Sums:
    sum_D: Tensor
    squares: float
    count: int
    reasons: list[str]


def _add_up(sources: list[Source], backbone: Backbone, observe: Observe) -> _Sums:
    """Returns the sums over all features of some sources, in float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before, total = 0, sum(len(source.index()) for source in sources)

    def observe_records(done: int, _: int) -> None:
        observe("encoding", before + done, total)

    sum_D, squares, count = torch.zeros(backbone.feature_dim, dtype=torch.float64), 0.0, 0
    reasons: list[str] = []
    for source in sources:
        with TemporaryDirectory() as folder:
            store = FeatureStore(Path(folder))
            features = store.open_or_encode(source, backbone, device=device, progress=observe_records)
            before += len(features.rows_N)
            reasons += [reason for _, reason in sorted(features.unusable.items())]
            for positions in torch.split(torch.from_numpy(features.valid_N).nonzero().flatten(), _ROWS_AT_ONCE):
                features_ND = decode_rows(features.rows_N[positions.numpy()]).double()
                sum_D += features_ND.sum(0)
                squares += float(features_ND.square().sum())
                count += len(features_ND)
    return _Sums(sum_D, squares, count, reasons)


def _estimate_error(mean_D: Tensor, squares: float, count: int) -> float:
    """Returns the standard error of a mean of `count` records, relative to its length.

    Args:
        mean_D: float64 [D], the mean.
        squares: sum of all records' squared norms.
        count: number of records, at least 2.
    """
    length = float(mean_D.norm())
    variance = max(0.0, squares - count * length**2) / (count - 1)
    return math.sqrt(variance / count) / length if length > 0 else math.inf


@dataclass(frozen=True)
class ShrunkPictures:
    """A source whose larger pictures are shrunk, so that sharp ones become as blurred as the task's.

    Attributes:
        source: the pictures.
        side: pixels of the shorter side of a shrunk picture.
    """

    source: Source
    side: int

    def digest(self) -> str:
        """Returns the digest of the pictures as they are; nothing that is cached outlives the call."""
        return self.source.digest()

    def index(self) -> list[SourceRecord]:
        """Returns the pictures' entries."""
        return self.source.index()

    def load(self, position: int) -> Any:
        """Returns a picture, shrunk. Raises BadRecord: it is none."""
        item = self.source.load(position)
        picture = Image.fromarray(item) if isinstance(item, np.ndarray) else item
        if not isinstance(picture, Image.Image):
            raise BadRecord("expected a picture to shrink, got another record")
        shorter = min(picture.size)
        if shorter <= self.side:
            return picture
        # A palette's numbers cannot be averaged.
        picture = picture.convert("RGB") if picture.mode in ("1", "P") else picture
        width, height = (max(1, round(length * self.side / shorter)) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC)
