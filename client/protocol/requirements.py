"""Memory and time that a run would need, from public numbers alone: no weights are read, no memory is taken for them.

A coordinator names backbones, labels, hidden widths and steps; a site finds out when it is asked to join whether that
fits, before anything is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.plugins import Spec
from common.run import RunConfig, Trainable
from common.tasks import Task, WritesTexts
from common.tasks.parts.calibration import make_released_statistic
from common.types import BadInput, Plan

if TYPE_CHECKING:
    from torch import nn

    from common.backbones import CacheBits, Language

MAX_PARAMETERS = 2**24
"""Most parameters that a run trains: one unit's gradient is then 64 MiB, about what a solver works on at once."""

MAX_PROJECTION = 2**26
"""Values of a backbone's projection, which are made room for before its weights arrive: 256 MiB."""

MAX_STATISTICS = 2**24
"""Most statistics of all tasks together in one evaluation; classes count squared."""

MAX_DRAWS = 2**33
"""Random numbers of one round, noise and coins: minutes."""

MAX_PRODUCTS = 2**44
"""Products of one round, one for each trained parameter and unit of a step: an hour or so on one core."""


def feature_dim(backbone: Spec) -> int:
    """Returns the number of features of a backbone from its settings; no weights are needed.

    Raises:
        BadInput: a wrong setting, or a projection too large for a site.
    """
    return _shape(backbone.model_dump_json(), backbone._base, "").feature_dim


def count_bytes_of_places(backbone: Spec, bits: CacheBits) -> int:
    """Returns the number of bytes that a record's stored features of places take; 0 where a record has one vector.

    Args:
        backbone: its settings.
        bits: bits of a stored feature.

    Raises:
        BadInput: a wrong setting, or a projection too large for a site.
    """
    from client.data.encoding.encode import count_bytes  # Here: it loads torch.

    shape = _shape(backbone.model_dump_json(), backbone._base, "")
    return count_bytes(shape.feature_dim, shape.grid, f"int{bits}") if shape.grid else 0


class _Shape(NamedTuple):
    """Number of features, grid of places, and the backbone's trunk and language where it has one."""

    feature_dim: int
    grid: tuple[int, ...]
    trunk: nn.Module | None
    language: Language | None


@lru_cache(maxsize=64)
def _shape(settings: str, base: Path, trainable: str, name: str = "") -> _Shape:
    """Returns the shape of what the backbone of this name hands on, from its settings."""
    import torch

    from common.backbones.parts.graphs.sizes import bound_network
    from common.backbones.parts.projection import ProjectionLayer
    from common.model.backbones import MAX_WEIGHT_BYTES, open_untrained
    from common.model.trunks import make_empty_trunk

    # Once for equal settings: to build a network takes 0.1 s, and each site of a simulation is asked the same.
    backbone = Spec.model_validate_json(settings, context={"base": base})
    with torch.device("meta"):
        with bound_network(MAX_WEIGHT_BYTES):
            untrained = open_untrained(backbone, "backbone", seed=0)
        projection = ProjectionLayer(untrained.kind.projection, untrained.feature_dim)
        dim, values = projection.out_dim, sum(buffer.numel() for buffer in projection.buffers())
        if values > MAX_PROJECTION:
            raise BadInput(f"a backbone's projection has {values} values, expected at most {MAX_PROJECTION}")
        if not trainable:
            return _Shape(dim, untrained.grid, None, untrained.language)
        asked = Trainable.model_validate_json(trainable)
        kind, module, raw_dim = untrained.kind, untrained.module, untrained.feature_dim
        trunk = make_empty_trunk(kind, module, raw_dim, asked, f"trainable.{name}")
        return _Shape(dim, untrained.grid, trunk, untrained.language)


def untrained_modules(run: RunConfig, tasks: Mapping[str, Task]) -> dict[str, nn.Module]:
    """Returns every parameter group of some of a run's tasks, from settings alone; none takes memory.

    Raises:
        BadInput: a backbone's setting is wrong, or it cannot be divided where something should train.
    """
    import torch

    modules: dict[str, nn.Module] = {}
    for name, task in tasks.items():
        backbone_name = run.backbone_of(name)
        backbone, trainable = run.backbone_specs[backbone_name], run.trainable.get(backbone_name)
        asked = "" if trainable is None else trainable.model_dump_json()
        dim, _, trunk, language = _shape(
            backbone.model_dump_json(), backbone._base, asked, backbone_name if asked else ""
        )
        with torch.device("meta"):
            if isinstance(task, WritesTexts) and language is not None:
                task = task.open_on(language)
            modules[name] = task.head(dim)
        group = run.trunk_of(name)
        if group is not None and trunk is not None:
            modules[group] = trunk
    return modules


def num_parameters(run: RunConfig, tasks: Mapping[str, Task]) -> int:
    """Returns the number of parameters that train for some of a run's tasks; none is allocated.

    Raises:
        BadInput: a backbone's setting is wrong.
    """
    return sum(map(count_trained, untrained_modules(run, tasks).values()))


def count_trained(module: nn.Module) -> int:
    """Returns the number of parameters of a head or a trunk that train."""
    return sum(part.numel() for part in module.parameters() if part.requires_grad)


def refuse_what_does_not_fit(run: RunConfig, tasks: Mapping[str, Task]) -> None:
    """Raise BadInput where a run's heads, or the statistics of its evaluations, are too large for a site."""
    parameters = num_parameters(run, tasks)
    if parameters > MAX_PARAMETERS:
        raise BadInput(f"the run trains {parameters} parameters, expected at most {MAX_PARAMETERS}")
    if run.evaluation is not None:
        released = [make_released_statistic(task, calibrate=run.evaluation.calibrate) for task in tasks.values()]
        statistics = sum(statistic.size for statistic in released)
        if statistics > MAX_STATISTICS:
            raise BadInput(f"an evaluation of the run has {statistics} statistics, expected at most {MAX_STATISTICS}")


def refuse_long_vote(run: RunConfig, units: int) -> None:
    """Raises BadInput where the vote in a choice would hold a site for too long, or a candidate does not fit.

    Args:
        run: the choice.
        units: the declared number of units.
    """
    dims = [feature_dim(spec) for spec in run.backbone_specs.values()]
    products = sum(units * dim * min(units, dim) for dim in dims)
    if products > MAX_PRODUCTS:
        raise BadInput(f"the vote takes {products} products, expected at most {MAX_PRODUCTS}; project the features")


def refuse_what_takes_too_long(plan: Plan, parameters: int, units: int) -> None:
    """Raise BadInput where a round would hold a site for too long; only public numbers decide.

    Args:
        plan: the plan of one round.
        parameters: number of parameters that train.
        units: the largest declared number of units.
    """
    draws = plan.steps * (parameters + (units if plan.sampling_rate < 1.0 else 0))
    if draws > MAX_DRAWS:
        raise BadInput(f"a round draws {draws} random numbers, expected at most {MAX_DRAWS}; take fewer steps")
    products = int(plan.steps * plan.sampling_rate * units * parameters)
    if products > MAX_PRODUCTS:
        raise BadInput(f"a round takes {products} products, expected at most {MAX_PRODUCTS}; take fewer steps")
