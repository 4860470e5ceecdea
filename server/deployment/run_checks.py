"""Checks of a run before any site is asked: its file, backbones, tasks, and how many sites it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import messages
from common.model.moments import list_parts
from common.run import RunConfig, resolve_backbone_paths
from common.tasks import open_tasks
from common.types import BadInput, Heads
from common.yaml import load
from server.deployment.admitted_sites import load_admitted_sites
from server.deployment.federation import Federation
from server.deployment.preparation import Prepared, prepare_run
from server.rounds.aggregators import check_trust, count_required_updates

_AROUND_UPDATE = 64 << 10
"""Bytes of an update beside its values, generously."""


def check_run(federation: Federation, path: Path, overrides: Sequence[str]) -> tuple[RunConfig, Prepared]:
    """Returns a run file's run with absolute paths, and what was prepared for it, where it can be carried out here.

    Args:
        federation: the federation whose sites take part.
        path: the run file.
        overrides: `key=value` texts that override keys of the file.

    Raises:
        BadInput: no site is admitted, or a setting is wrong or asks for more sites than are admitted.
    """
    return check_loaded(federation, load(RunConfig, path, overrides))


def check_loaded(federation: Federation, run: RunConfig) -> tuple[RunConfig, Prepared]:
    """Returns a run with absolute paths, and what was prepared for it, where it can be carried out here.

    Raises:
        BadInput: no site is admitted, or a setting is wrong or asks for more sites than are admitted.
    """
    sites = load_admitted_sites(federation)
    if not sites:
        raise BadInput(
            f"{federation.folder}: no site is admitted; `headwater coordinator admit` each with its public key"
        )
    check_trust(run, "aggregation")
    needed = max(run.cohort.min_sites, run.cohort.min_replies_per_task)
    if needed > len(sites):
        raise BadInput(f"cohort: expected at most the {len(sites)} admitted site(s) to be needed, got {needed}")
    required, asked = count_required_updates(run), run.cohort.count_asked(len(sites))
    if required > asked:
        raise BadInput(
            f"aggregation: expected the {asked} site(s) that a round asks to be enough, got {run.aggregation.kind} "
            f"with settings and a cohort that need {required}; admit more sites, or lower these numbers"
        )
    list_parts(run, open_tasks(run))
    run = resolve_backbone_paths(run)
    prepared = prepare_run(federation, run)
    _check_sizes(run, prepared.start.heads, federation.config.max_upload_mib)
    return run, prepared


def _check_sizes(run: RunConfig, heads: Heads, max_upload_mib: int) -> None:
    """Checks that a site with all tasks can be sent its heads and trunks, and can send their update back.

    Raises:
        BadInput: they are larger than a message or an upload may be.
    """
    num_values = sum(array.size for params in heads.values() for array in params.values())
    # A secure sum's words have 64 bits.
    each = 8 if run.trust is not None else 2 if run.delta_precision == "float16" else 4
    sent, received = 4 * num_values, each * num_values
    if sent > messages.MAX_HEAD_BYTES:
        raise BadInput(
            f"tasks: expected heads and trunks of at most {messages.MAX_HEAD_BYTES >> 20} MiB, got {sent / 2**20:.1f} "
            "MiB; train less of the backbones"
        )
    if received + _AROUND_UPDATE > max_upload_mib << 20:
        raise BadInput(
            f"tasks: expected an update of at most max_upload_mib of federation.yaml, {max_upload_mib} MiB, got "
            f"{received / 2**20:.1f} MiB of a site with all tasks; raise it and restart the coordinator, train less, "
            "or set `delta_precision: float16`"
        )
