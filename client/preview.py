"""What the staff can look at before joining: pictures as a backbone would see them, written for the owner only."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.exclusions import Exclusions
from client.sources import open_source
from common.backbones import Kind
from common.config import RunConfig, SiteConfig
from common.files import private_folder, write_atomic
from common.plugins import resolve
from common.types import BadInput, BadRecord

FOLDER = "preview"
_COLUMNS, _ROWS, _SIDE = 6, 4, 128


def write_previews(config: SiteConfig, offers: Mapping[str, RunConfig]) -> list[Path]:
    """A contact sheet of each source that holds pictures, preprocessed as the first offered run's backbone does.

    Without an offer they are shown as they are. Sources of tables and vectors have no sheet.
    """
    kind = _backbone_kind(offers)
    exclusions = Exclusions.read(config.state_dir)
    written = []
    for name, spec in config.sources.items():
        source = exclusions.applied(open_source(spec, f"sources.{name}").open())
        count = len(source.index())
        tiles = []
        for position in sorted({round(at) for at in np.linspace(0, max(0, count - 1), _COLUMNS * _ROWS)}):
            try:
                tiles.append(_tile(source.load(position) if position < count else None, kind))
            except BadRecord:
                continue
        pictures = [tile for tile in tiles if tile is not None]
        if pictures:
            path = private_folder(private_folder(config.state_dir) / FOLDER) / f"{name}.png"
            write_atomic(path, _sheet(pictures))
            written.append(path)
    return written


def _backbone_kind(offers: Mapping[str, RunConfig]) -> Kind | None:
    for run in offers.values():
        try:
            kind: Kind = resolve("common.backbones", run.backbone, "backbone")
        except BadInput:
            continue  # A kind that is not installed here; `check` is not the place where that fails.
        return kind
    return None


def _tile(item: Any, kind: Kind | None) -> Image.Image | None:
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
