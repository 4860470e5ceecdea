"""Checks of a run before any site is asked: its file, backbones, tasks, and how many sites it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.model.backbones import open_backbones
from common.model.trunks import create_modules
from common.run import RunConfig, resolve_backbone_paths
from common.tasks import open_task
from common.types import BadInput
from common.yaml import load
from server.deployment.admitted_sites import load_admitted_sites
from server.deployment.federation import Federation
from server.rounds.aggregators import count_required_updates


def check_run(federation: Federation, path: Path, overrides: Sequence[str]) -> RunConfig:
    """Returns a run file's run with absolute paths, where this coordinator can carry it out.

    Args:
        federation: the federation whose sites take part.
        path: the run file.
        overrides: `key=value` texts that override keys of the file.

    Raises:
        BadInput: no site is admitted, or a setting is wrong or asks for more sites than are admitted.
    """
    run = load(RunConfig, path, overrides)
    sites = load_admitted_sites(federation)
    if not sites:
        raise BadInput(
            f"{federation.folder}: no site is admitted; `headwater coordinator admit` each with its public key"
        )
    needed = max(run.cohort.min_sites, run.cohort.min_replies_per_task)
    if needed > len(sites):
        raise BadInput(f"cohort: expected at most the {len(sites)} admitted site(s) to be needed, got {needed}")
    backbones = open_backbones(run)
    tasks = {name: open_task(spec, f"tasks.{name}") for name, spec in run.tasks.items()}
    create_modules(run, tasks, backbones)
    required, asked = count_required_updates(run), run.cohort.count_asked(len(sites))
    if required > asked:
        raise BadInput(
            f"aggregation: expected the {asked} site(s) that a round asks to be enough, got {run.aggregation.kind} "
            f"with settings and a cohort that need {required}; admit more sites, or lower these numbers"
        )
    return resolve_backbone_paths(run)
