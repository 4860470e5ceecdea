"""The mean of public records' features, which a backbone's projection subtracts (`shift: {public: FILE}`).

Features of most networks have a large common part. Heads without a bias learn faster under noise once it is subtracted,
and what it is can be seen on any records like those of the task: on public ones it costs no budget.

Of a backbone that reads bags it is the mean of the items' features.

The file also holds the records as a home sample: the mean of the whole backbone's features of length 1, to which the
distance of a site can be measured (`common.serving.means`). Of records like those of the pre-training, it can be
written to a file of its own, and then any backbone has one.

# Shapes: N records, D raw features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.data.feature_store import Features, FeatureStore, decode_rows
from client.data.sources import Source, SourceRecord, open_source
from common.backbones import Kind, ReadsBags, find_public_mean_file
from common.backbones.parts.public_mean import write_public_mean
from common.errors import instead
from common.model.backbones import Backbone, open_pretrained
from common.plugins import Spec, resolve
from common.run import Name, RunConfig
from common.serving.means import HOME, FeatureMean, pack_means, write_means
from common.tasks.parts.adjusted import normalize_rows
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
        path: the file.
        num_records: number of records whose mean it is.
        reasons: why a record could not be used, for each that could not.
        error: standard error of the mean, relative to its length.
        is_shift: false for a file with a home sample alone.
    """

    path: Path
    num_records: int
    reasons: list[str]
    error: float
    is_shift: bool


def measure_public_mean(
    run: RunConfig,
    records: Path,
    *,
    prefix: str,
    backbone: Name | None,
    shrink: int | None,
    out: Path | None,
    observe: Observe,
) -> PublicMean:
    """Writes the mean of public records' features to the file that a run's backbone names, or a home file.

    Args:
        run: the run; its backbone's projection says `shift: {public: FILE}`.
        records: a folder or zip of pictures or recordings, a folder or file of texts, one a line, or a YAML file with
            the settings of a source.
        prefix: beginning of keys in error messages, where the run stands inside another file.
        backbone: name of the backbone; None where the run has one.
        shrink: pixels of the shorter side that larger pictures are shrunk to first; None leaves them as they are.
        out: file that receives the records as a home sample; the backbone's own file is then left as it is.
        observe: receives the progress in records.

    Raises:
        BadInput: the run's backbone names no file, or cannot be opened; there are no records, or too few that the
            backbone reads; the file cannot be written.
    """
    name = _choose_backbone(run, backbone)
    key = prefix + run.backbone_key(name)
    kind: Kind = resolve("common.backbones", run.backbone_specs[name], key)
    if isinstance(kind, ReadsBags):
        # Public records are items: the mean is that of the backbone of one.
        kind, key = kind.open_encoder(), f"{key}.encoder"
    spec = kind.model_dump(mode="json", by_alias=True)
    path = find_public_mean_file(kind)
    if path is None and out is None:
        raise BadInput(
            f"{key}.projection.shift: expected `{{public: FILE}}`, the file to write the mean to; --out FILE writes a "
            "home sample of any backbone"
        )
    plain = open_pretrained({**spec, "projection": None}, key)
    # Here already: records are encoded for nothing where it cannot be opened.
    whole = None if out is None else open_pretrained(spec, key)
    sources = list(_open_sources(records))
    if shrink is not None:
        sources = [ShrunkPictures(source, shrink) for source in sources]
    with TemporaryDirectory() as folder:
        encoded = _encode(sources, plain, Path(folder), observe)
        if encoded.count < _FEWEST:
            because = f" ({encoded.reasons[0]})" if encoded.reasons else ""
            got = f"{encoded.count}{because}"
            raise BadInput(f"{records}: expected at least {_FEWEST} records that {key} reads, got {got}")
        try:
            if out is not None and whole is not None:
                home = _add_up(_list_unit_features(encoded, whole))
                out.parent.mkdir(parents=True, exist_ok=True)
                write_means(out, [_make_home(home, whole, records)])
                return PublicMean(out, encoded.count, encoded.reasons, home.estimate_error(), is_shift=False)
            assert path is not None  # One of the two is given.
            raw = _add_up(encoded.list_blocks())
            write = partial(write_public_mean, path, raw.mean_D.float(), digest=plain.digest, num_records=raw.count)
            write()  # The whole backbone subtracts it.
            whole = open_pretrained(spec, key)
            home = _add_up(_list_unit_features(encoded, whole))
            tensors, notes = pack_means([_make_home(home, whole, records)])
            write(others={each: torch.from_numpy(values) for each, values in tensors.items()}, notes=notes)
        except OSError as error:
            where = f"{key}.projection.shift.public" if out is None else "--out"
            raise BadInput(f"{where}: expected a file that can be written{instead(error)}") from error
    return PublicMean(path, encoded.count, encoded.reasons, raw.estimate_error(), is_shift=True)


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
class _EncodedSources:
    """All features of some sources: of each record the raw ones."""

    features: list[Features]
    count: int
    reasons: list[str]

    def list_blocks(self) -> Iterator[Tensor]:
        """Yields blocks of features_BD in float64."""
        for features in self.features:
            for positions in torch.split(torch.from_numpy(features.valid_N).nonzero().flatten(), _ROWS_AT_ONCE):
                yield decode_rows(features.rows_N[positions.numpy()]).double()


def _encode(sources: list[Source], backbone: Backbone, folder: Path, observe: Observe) -> _EncodedSources:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before, total = 0, sum(len(source.index()) for source in sources)

    def observe_records(done: int, _: int) -> None:
        observe("encoding", before + done, total)

    store, encoded = FeatureStore(folder), []
    for source in sources:
        encoded.append(store.open_or_encode(source, backbone, device=device, progress=observe_records))
        before += len(encoded[-1].rows_N)
    reasons = [reason for each in encoded for _, reason in sorted(each.unusable.items())]
    return _EncodedSources(encoded, sum(int(each.valid_N.sum()) for each in encoded), reasons)


def _list_unit_features(encoded: _EncodedSources, whole: Backbone) -> Iterator[Tensor]:
    """Yields blocks of a whole backbone's features, each divided by its length, in float64."""
    for raw_BD in encoded.list_blocks():
        with torch.inference_mode():
            yield normalize_rows(whole.module.projection(raw_BD.float())).double()


@dataclass(frozen=True)
class _FeatureSums:
    sum_D: Tensor
    squares: float
    count: int

    @property
    def mean_D(self) -> Tensor:
        return self.sum_D / self.count

    def estimate_error(self) -> float:
        """Returns the standard error of the mean, relative to its length."""
        length = float(self.mean_D.norm())
        variance = max(0.0, self.squares - self.count * length**2) / (self.count - 1)
        return math.sqrt(variance / self.count) / length if length > 0 else math.inf


def _add_up(blocks: Iterable[Tensor]) -> _FeatureSums:
    """Returns the sums over blocks of features in float64, of which there is one at least."""
    sum_D, squares, count = torch.zeros(1, dtype=torch.float64), 0.0, 0
    for features_BD in blocks:
        sum_D = sum_D + features_BD.sum(0)
        squares += float(features_BD.square().sum())
        count += len(features_BD)
    return _FeatureSums(sum_D, squares, count)


def _make_home(sums: _FeatureSums, whole: Backbone, records: Path) -> FeatureMean:
    name = "".join(letter if letter.isprintable() else "?" for letter in records.name[:255])
    values_D = sums.mean_D.numpy().copy()
    return FeatureMean(HOME, whole.digest, values_D, 0.0, sums.count, f"public records of {name}", is_home=True)


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
