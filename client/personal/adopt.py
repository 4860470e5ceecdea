"""A finished model at a site that took part in no run: its heads are adapted to the site's own records.

The site holds the model's folder, with what the run released of its classes, and nothing else. Nothing leaves the site
and nothing is spent: no ledger is opened.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from client.aligners.parts.head import list_alignments, serve_equal_classes
from client.config import SiteConfig
from client.data.prepare import Encoding, open_units, prepare
from client.data.records import Side
from client.data.units import Units
from client.personal.adapt import adapt_heads
from client.personal.align import ReleasedTask, adapt_tasks, select_adaptable
from client.personal.evaluate import Comparison, HomePredictions, estimate_all, predict_held_out
from client.personal.personal_heads import PersonalHeads, list_head_parameters, save_personal_heads
from client.protocol.site import MODELS, Site
from common.events import FEDERATED, PERSONAL, PERSONAL_UNIFORM
from common.files import private_folder
from common.serving.folder import read_moments
from common.serving.network import Model, open_model
from common.tasks import Task
from common.types import BadInput

_KEPT = 16
"""Hex digits of a model's digest that name its folder at a site."""


@dataclass(frozen=True)
class AdoptedModel:
    """A model at a site, with the site's records prepared for it.

    Attributes:
        model: the model.
        path: its folder.
        folder: the site's own folder for it.
        tasks: the model's tasks that the site file has.
    """

    model: Model = field(repr=False)
    path: Path
    folder: Path
    tasks: Mapping[str, Task]

    def open_side(self, side: Side) -> Units:
        """Returns the site's units of a side of the split."""
        return open_units(self.folder / "data", side, list(self.tasks), torch.device("cpu"))

    def list_heads(self) -> dict[str, nn.Module]:
        """Returns copies of the model's heads of these tasks, whose weights may train."""
        return {name: copy.deepcopy(self.model.heads[name].head).requires_grad_(True) for name in self.tasks}


def locate_adopted(config: SiteConfig, model: Model) -> Path:
    """Returns the folder of a model at a site."""
    return config.state_dir / MODELS / model.config.heads[:_KEPT]


def adopt_model(site: Site, path: Path) -> AdoptedModel:
    """Opens a model and prepares the site's records for it.

    Args:
        site: the site.
        path: folder of the model, or of the run that it is the result of.

    Raises:
        BadInput: there is no model, none of its tasks is in the site file, a backbone of it was trained, or a source
            cannot be opened.
        DigestMismatch: a part of the model was changed.
    """
    model = open_model(path, site.device())
    tasks = {name: task for name, task in model.tasks.items() if name in site.config.tasks}
    if not tasks:
        raise BadInput(f"{path}: expected a model of a task of the site file, got one of {', '.join(model.tasks)}")
    backbones = {name: model.backbones[model.config.tasks[name].backbone] for name in tasks}
    for name in tasks:
        if model.config.tasks[name].trunk is not None:
            raise BadInput(f"{path}: expected frozen backbones, got one for {name} that was trained")
    folder = private_folder(locate_adopted(site.config, model))
    encoding = Encoding(site.features(), site.device(), site.progress)
    prepare(site.config, tasks, backbones, encoding, folder / "data")
    return AdoptedModel(model, path, folder, tasks)


def adapt_model(site: Site, adopted: AdoptedModel) -> dict[str, nn.Module]:
    """Adapts a model's heads to the site as its file says, saves and returns them.

    Args:
        site: the site.
        adopted: the model at the site.

    Raises:
        BadInput: the site file's `personal` needs a run that the site took part in, or does not suit the model.
        DigestMismatch: a part of the model was changed.
    """
    mode, config = site.config.personal, adopted.model.config
    modules, released = adopted.list_heads(), {}
    if mode == "adapt":
        for name, task in select_adaptable(adopted.tasks).items():
            moments = read_moments(adopted.path, config, name)
            released[name] = ReleasedTask(task, modules[name], moments, config.tasks[name].temperature)
    heads = adapt_without_run(site.config, modules, adopted.tasks, adopted.open_side("train"), released)
    kept = {name: list_head_parameters(head) for name, head in heads.items()}
    save_personal_heads(adopted.folder, PersonalHeads(mode, config.heads, False, kept))
    return heads


def adapt_without_run(
    config: SiteConfig,
    modules: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    units: Units,
    released: Mapping[str, ReleasedTask],
    *,
    lenient: bool = False,
) -> dict[str, nn.Module]:
    """Returns heads as a site that took part in no run adapts them.

    Args:
        config: the site's settings.
        modules: task -> head, and trunks by name; not modified.
        tasks: task -> its definition, for the tasks of the site.
        units: the site's training units, with the features that the heads read.
        released: task -> what the run released of it; with `personal: adapt`.
        lenient: as in `adapt_tasks`.

    Raises:
        BadInput: the site file's `personal` needs a run that the site took part in, or does not suit the heads.
    """
    mode = config.personal
    if mode == "none" or mode == "tied":
        raise BadInput(f"personal: expected adapt, prior or fit in the site file for a model without a run, got {mode}")
    if mode != "adapt":
        return {**modules, **adapt_heads(mode, modules, tasks, units)}
    return {**modules, **adapt_tasks(config, released, units, lenient=lenient)}


def compare_model(site: Site, path: Path) -> Comparison:
    """Evaluates a model's heads and those that the site adapts, on held-out units of the site.

    Args:
        site: the site.
        path: folder of the model, or of the run that it is the result of.

    Raises:
        BadInput: as in `adopt_model` and `adapt_model`, or no unit is held out.
        DigestMismatch: a part of the model was changed.
    """
    adopted = adopt_model(site, path)
    test = adopted.open_side("test")
    if test.num_units == 0:
        raise BadInput("split: expected held-out units to evaluate on, got none; set split.test_fraction")
    kinds: dict[str, Mapping[str, nn.Module]] = {FEDERATED: adopted.list_heads()}
    if site.config.personal != "none":
        kinds[PERSONAL] = adapt_model(site, adopted)
        if site.config.personal == "adapt":
            kinds[PERSONAL_UNIFORM] = serve_equal_classes(kinds[PERSONAL])
    outputs = predict_held_out(kinds, adopted.tasks, test)
    run_id, alignments = adopted.model.config.run, list_alignments(kinds.get(PERSONAL, {}))
    return estimate_all(
        HomePredictions(run_id, site.config.personal, test.num_units, adopted.tasks, outputs, alignments)
    )
