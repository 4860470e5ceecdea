"""The backbones of one run, opened: by name, and how many features each task gets from its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.backbones import Backbone, open_pretrained
from common.plugins import Spec, resolve
from common.run import Name, RunConfig

Open = Callable[[Spec, str], Backbone]
"""From settings and the key where they stand."""


def open_backbones(run: RunConfig, prefix: str = "", opened_by: Open = open_pretrained) -> dict[Name, Backbone]:
    """Every backbone of a run, with its weights.

    Args:
        run: the run.
        prefix: of keys in error messages, where the run stands inside another file.
        opened_by: what makes a backbone of settings.

    Raises:
        BadInput: one of them cannot be opened.
    """
    return {name: opened_by(spec, prefix + run.backbone_key(name)) for name, spec in run.backbone_specs.items()}


def digests_of(backbones: Mapping[Name, Backbone]) -> dict[Name, str]:
    """Their digests, by name."""
    return {name: backbone.digest for name, backbone in backbones.items()}


def feature_dims(run: RunConfig, backbones: Mapping[Name, Backbone]) -> dict[Name, int]:
    """How many features each task's head stands on."""
    return {task: backbones[run.backbone_of(task)].feature_dim for task in run.tasks}


def absolute(run: RunConfig, prefix: str = "") -> RunConfig:
    """The same run with its backbones' settings written out and their paths absolute: it means the same in any folder.

    Raises:
        BadInput: a backbone's setting is wrong.
    """
    specs = {}
    for name, spec in run.backbone_specs.items():
        kind = resolve("common.backbones", spec, prefix + run.backbone_key(name))
        specs[name] = Spec(**kind.model_dump(mode="json", by_alias=True))
    return run.with_backbone_specs(specs)
