"""Whether the files that a simulation names are there: before a run finds out one by one. None is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from client.data.sources import open_source
from common.plugins import resolve
from simulations.config import SimulationConfig
from simulations.partition import source_settings


def missing_files(config: SimulationConfig) -> list[str]:
    """One sentence for each file or folder that a simulation's settings name and that is not there.

    What `simulations pretrain` is to write is not asked for; files that a table lists are looked for in a run.
    """
    run = config.run
    named: list[tuple[str, Path]] = []
    for key, spec in source_settings(config).items():
        named += _paths(open_source(spec, key), key)
    for position, spec in enumerate([] if config.pretrain is None else config.pretrain.sources):
        key = f"pretrain.sources.{position}"
        named += _paths(open_source(spec, key), key)
    for name, spec in run.backbone_specs.items():
        if name != config.pretrained_backbone():
            key = f"run.{run.backbone_key(name)}"
            named += _paths(resolve("common.backbones", spec, key), key)
    # Once where several sites or sides name it.
    absent = {path: key for key, path in reversed(named) if not path.exists()}
    return [f"{key}: {path} is missing" for path, key in reversed(absent.items())]


def _paths(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    """Every path in some settings, with its key."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name), f"{key}.{name}")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _paths(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from _paths(inner, f"{key}.{position}")
