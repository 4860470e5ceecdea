"""Previews for the staff before joining: pictures as a backbone would see them, written for the owner only."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.config import SiteConfig
from client.data.exclusions import Exclusions
from client.data.sources import open_source
from client.data.sources.parts.boundary import try_record
from common.backbones import Kind
from common.files import private_folder, write_atomic
from common.inputs import Several
from common.plugins import resolve
from common.run import RunConfig
from common.types import BadInput

FOLDER = "preview"
_COLUMNS, _ROWS, _SIDE = 6, 4, 128


@dataclass(frozen=True)
class Preview:
    """The outcome of previewing one source.

    Attributes:
        source: its name in the site's file.
        sheet: the contact sheet; None where it holds no pictures.
    """

    source: str
    sheet: Path | None


def write_previews(config: SiteConfig, offers: Mapping[str, RunConfig]) -> list[Preview]:
    """A contact sheet of each source that holds pictures, preprocessed as the first offered run's backbone for it does.

    Without an offer they are shown as they are. Raises BadInput where a source does not open.
    """
    return [_preview(config, name, _backbone_kind(config, name, offers)) for name in config.sources]


def _preview(config: SiteConfig, name: str, kind: Kind | None) -> Preview:
    exclusions = Exclusions.read(config.state_dir)
    source = exclusions.applied(open_source(config.sources[name], f"sources.{name}", config.plugins).open())
    usable = sorted(set(range(len(source.index()))) - exclusions.positions(source.index()))
    chosen = sorted({round(at) for at in np.linspace(0, max(0, len(usable) - 1), _COLUMNS * _ROWS)})
    tiles: list[Image.Image] = []
    for position in (usable[at] for at in chosen if at < len(usable)):
        # What fails is named by the checks of the records.
        tile, _ = try_record(lambda position=position: _tile(source.load(position), kind))  # type: ignore[misc]
        if tile is not None:
            tiles.append(tile)
    if not tiles:
        return Preview(name, None)
    path = private_folder(private_folder(config.state_dir) / FOLDER) / f"{name}.png"
    write_atomic(path, _sheet(tiles))
    return Preview(name, path)


def _backbone_kind(config: SiteConfig, source: str, offers: Mapping[str, RunConfig]) -> Kind | None:
    """The first offered backbone that a task on this source stands on."""
    for run in offers.values():
        for task in run.tasks:
            if task not in config.tasks or config.tasks[task].source != source:
                continue
            name = run.backbone_of(task)
            try:
                kind: Kind = resolve("common.backbones", run.backbone_specs[name], run.backbone_key(name))
            except BadInput:
                continue  # A kind that is not installed here; `check` is not the place where that fails.
            return kind
    return None


def _tile(item: Any, kind: Kind | None) -> Image.Image | None:
    if isinstance(item, Several) and item.items:
        item = item.items[len(item.items) // 2]
    if not _is_picture(item):
        return None
    values = item if kind is None else kind.preprocess(item).numpy()
    grid = np.asarray(values, dtype=np.float32)
    if grid.ndim == 3 and grid.shape[0] in (1, 3):
        grid = grid.transpose(1, 2, 0)
    if grid.ndim == 3 and grid.shape[2] != 3:
        grid = grid[:, :, 0]
    return None if grid.ndim not in (2, 3) else Image.fromarray(_stretched(grid)).convert("RGB")


def _is_picture(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray) and item.ndim in (2, 3))


def _stretched(grid: NDArray[np.float32]) -> NDArray[np.uint8]:
    # Preprocessing standardises: the original brightness is gone, so each tile uses its own range.
    low, high = float(grid.min()), float(grid.max())
    scaled = (grid - low) / (high - low) if high > low and math.isfinite(high - low) else np.zeros_like(grid)
    return np.asarray(255.0 * scaled, dtype=np.uint8)


def _sheet(tiles: list[Image.Image]) -> bytes:
    rows = math.ceil(len(tiles) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _SIDE, rows * _SIDE))
    for at, tile in enumerate(tiles):
        sheet.paste(tile.resize((_SIDE, _SIDE)), (at % _COLUMNS * _SIDE, at // _COLUMNS * _SIDE))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
