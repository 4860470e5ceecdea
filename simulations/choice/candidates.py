"""The file of candidates for `choose`, and what is known of each without any private record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from client.data.encoding.batches import draw_inputs
from common.model.backbones import Backbone, open_pretrained
from common.plugins import Frozen, Spec
from common.run import Name
from common.yaml import load

_TIMED = 16
"""Made-up inputs on which a candidate is timed."""

_PASSES = 3
"""Passes of which the fastest counts: others slow down a busy machine."""

MAX_CANDIDATES = 64


class CandidateSpec(Spec):
    """A backbone's settings, and beside them its licence.

    Attributes:
        licence: licence of the weights, as whoever writes the file declares it.
    """

    licence: str | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the kind's own file is given."""
        return self.model_dump(exclude={"licence"})


class CandidateFile(Frozen):
    """Backbones to choose from.

    Attributes:
        candidates: name -> settings of a backbone, in the order that decides ties.
        scorer: what a site's vote minimises.
    """

    model_config = ConfigDict(title="candidate file")

    candidates: Annotated[dict[Name, CandidateSpec], Field(min_length=2, max_length=MAX_CANDIDATES)]
    scorer: Spec = Spec(kind="ridge")


@dataclass(frozen=True)
class Candidate:
    """An opened candidate.

    Attributes:
        name: its name in the file.
        backbone: the backbone with its weights.
        licence: its declared licence; None where none is declared.
        seconds: seconds a record in the network on this machine, on made-up inputs; None where none can be made up.
        megabytes: size of what travels to a site.
    """

    name: Name
    backbone: Backbone
    licence: str | None
    seconds: float | None
    megabytes: float


def open_candidates(path: Path) -> tuple[CandidateFile, dict[Name, Candidate]]:
    """Returns a file of candidates, and each of them opened and timed. Raises BadInput."""
    file = load(CandidateFile, path)
    opened: Mapping[Name, Backbone] = {
        name: open_pretrained(spec, f"candidates.{name}") for name, spec in file.candidates.items()
    }
    return file, {
        name: Candidate(
            name, backbone, file.candidates[name].licence, _time_record(backbone), _measure_megabytes(backbone)
        )
        for name, backbone in opened.items()
    }


def _time_record(backbone: Backbone) -> float | None:
    inputs = draw_inputs(backbone.preprocess, _TIMED)
    if inputs is None:
        return None
    backbone.encode(inputs)  # The first pass prepares the network.
    passes = []
    for _ in range(_PASSES):
        started = time.perf_counter()
        backbone.encode(inputs)
        passes.append(time.perf_counter() - started)
    return min(passes) / _TIMED


def _measure_megabytes(backbone: Backbone) -> float:
    sizes = [tensor.numel() * tensor.element_size() for tensor in backbone.module.state_dict().values()]
    return float(sum(sizes)) / 1e6
