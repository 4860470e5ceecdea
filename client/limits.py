"""What a run's heads would need here, from its settings alone: no weights are read and no memory is taken for them.

A coordinator names backbones, labels and hidden widths; a site finds out when it is asked to join whether that fits,
before anything is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from common.backbones import open_untrained
from common.config import RunConfig
from common.plugins import Spec
from common.tasks import Task, num_counts
from common.types import BadInput

MAX_PARAMETERS = 2**24
"""Of all heads of a run together: one unit's gradient is then 64 MiB, about what a solver works on at once."""

MAX_STATISTICS = 2**24
"""Of all tasks together in one evaluation; classes count squared."""


def feature_dim(backbone: Spec) -> int:
    """How many features a backbone's settings lead to; no weights are needed.

    Raises:
        BadInput: a wrong setting.
    """
    return _feature_dim(backbone.model_dump_json(), backbone._base)


@lru_cache(maxsize=64)
def _feature_dim(settings: str, base: Path) -> int:
    # Once for equal settings: to build a network takes 0.1 s, and each site of a simulation is asked the same.
    backbone = Spec.model_validate_json(settings, context={"base": base})
    with torch.device("meta"):
        untrained = open_untrained(backbone, "backbone", seed=0)
    projection = untrained.kind.projection
    return (projection.dim if projection else None) or untrained.feature_dim


def num_parameters(run: RunConfig, tasks: Mapping[str, Task]) -> int:
    """Of new heads of some of a run's tasks; none is allocated.

    Raises:
        BadInput: a backbone's setting is wrong.
    """
    dims = {name: feature_dim(run.encoders[run.backbone_of(name)]) for name in tasks}
    with torch.device("meta"):
        heads = [task.head(dims[name]) for name, task in tasks.items()]
        return sum(parameter.numel() for head in heads for parameter in head.parameters())


def refuse_what_does_not_fit(run: RunConfig, tasks: Mapping[str, Task]) -> None:
    """Raise BadInput where a run's heads, or the statistics of its evaluations, are too large for a site."""
    parameters = num_parameters(run, tasks)
    if parameters > MAX_PARAMETERS:
        raise BadInput(f"the run's heads have {parameters} parameters, expected at most {MAX_PARAMETERS}")
    if run.evaluation is not None:
        statistics = sum(num_counts(task) for task in tasks.values())
        if statistics > MAX_STATISTICS:
            raise BadInput(f"an evaluation of the run has {statistics} statistics, expected at most {MAX_STATISTICS}")
