"""Checks of a site before it joins, as a list of passes and failures, each failure with its remedy.

Nothing is sent except a TLS handshake and one question about admission. Nothing is spent. Counts of records are for the
local screen only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from client.config import Coordinator, SecureSum, SiteConfig
from client.connection import diagnose
from client.connection.diagnose import (
    AUTHORITY_WARN_DAYS,
    WARN_DAYS,
    create_trusting_context,
    open_tls,
    read_presented_certificate,
)
from client.connection.keys import read_key
from client.data.checks import data_checks, find_overlaps
from client.data.records import SIDES
from client.data.snapshot import Survey, freeze_snapshot, survey_sources
from client.data.sources import SourceRecord
from client.data.sources.parts.boundary import try_record
from client.ledger.place import find_default_ledger_dir, has_ledger, locate_ledgers
from client.protocol import balance as budgets
from client.protocol.approvals import Approvals, check_offer
from client.protocol.site import Joined, Site, SiteDeclined, open_member
from common.bundle import compute_code_digest
from common.offers import Offer
from common.privacy.noise import os_entropy
from common.run import RunConfig
from common.types import BadInput, HeadwaterError, RecordsUnusable, Unit

if TYPE_CHECKING:
    from client.data.trial import TaskTrial

LOW_DISK_BYTES = 2 << 30
_OTHERS = 0o077


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: name of the check.
        outcome: `fail` keeps a site from joining, `warn` does not.
        detail: finding of the check.
        remedy: advice to the site's staff; "" where there is nothing to do.
    """

    name: str
    outcome: Literal["pass", "warn", "fail"]
    detail: str
    remedy: str = ""


def check_site(config: SiteConfig, offers: Mapping[str, RunConfig], *, offline: bool) -> Iterator[Check]:
    """Yields the results of all checks, in the order in which a site needs them.

    Args:
        config: settings of the site file.
        offers: offered runs by name; the site's labels are compared with theirs.
        offline: true leaves out the checks that need the network.
    """
    yield Check("code", "pass", f"code digest {compute_code_digest()}")
    yield from _check_state(config)
    yield _check_device(config)
    yield from _check_ledger(config)
    if config.secure_sum is not None:
        yield _check_secure_sum(config, config.secure_sum)
    for found in data_checks(config, offers):
        yield Check(*found)
    coordinators = config.list_coordinators()
    if not coordinators:
        yield Check("coordinator", "fail", "none is named", "write the section `coordinator` (see a new site's file)")
    for name, coordinator in coordinators.items():
        own = list(_check_credentials(coordinator))
        if not offline:
            own += _check_network(config.select(name), coordinator)
        yield from (own if len(coordinators) == 1 else [replace(each, name=f"{name} {each.name}") for each in own])


def check_approvals(
    site: Path, config: SiteConfig, offers: Mapping[Path, Offer], coordinator: str | None = None
) -> Iterator[Check]:
    """Yields, for each offer that came with a coordinator's kit, whether the site may join the run.

    Args:
        site: path of the site file, as the user names it.
        config: settings of the site file.
        offers: path of the offer's file, as the user can open it -> the offer.
        coordinator: name of the coordinator, where the site file has several.
    """
    approvals = Approvals(config.select(coordinator).coordinator_dir)
    option = "" if coordinator is None else f" --coordinator {coordinator}"
    for path, offer in offers.items():
        name = path.stem if coordinator is None else f"{coordinator} {path.stem}"
        if config.approval == "automatic":
            yield Check(f"run {name}", "pass", "joined without an approval, as the site file says")
            continue
        given = [approval for approval in approvals.all() if approval.digest == offer.digest]
        unused = any(approval.used_by is None for approval in given)
        if given:
            used = "" if unused else f"; used by {given[-1].used_by}: a further run needs another approval"
            yield Check(f"run {name}", "pass", f"approved, digest {offer.digest}{used}")
        else:
            yield Check(f"run {name}", "warn", "not approved yet", f"headwater site approve {site} {path}{option}")


def check_records(config: SiteConfig, offer: Offer, survey: Survey) -> Iterator[Check]:
    """Yields, for each task of an offered run at this site, whether enough records can be used, tried with a sample.

    Args:
        config: settings of the site file.
        offer: the offered run.
        survey: the site's records.

    Raises:
        BadInput: a setting of the run, or a column that the site file names, is wrong.
    """
    from client.data.trial import open_at_hand, try_tasks  # Here: it needs torch.

    run = check_offer(offer)
    joined = Joined("", run, offer.backbones, config.state_dir)
    tasks = joined.tasks(config)
    backbones = open_at_hand(config, run, joined.digests(tasks))
    trials = try_tasks(config, run, tasks, backbones, survey)
    # One candidate that reads nothing is no reason to take no part in a choice: it will not be chosen.
    is_choice = run.choice is not None and any(trial.has_enough for trial in trials)
    for trial in trials:
        found = _judge_trial(config, run, trial)
        yield replace(found, outcome="warn") if is_choice and not trial.has_enough else found


def freeze_records(config: SiteConfig, offers: Iterable[Offer]) -> list[Check]:
    """Returns what `check_records` finds for some offers, and overlapping registries; freezes the site's units.

    Nothing is frozen where something fails.

    Raises:
        BadInput: a source cannot be opened, or a setting is wrong.
        RecordsUnusable: too few records can be used, or one that may not be left out cannot.
    """
    survey = survey_sources(config)
    if config.on_bad_record == "stop" and survey.rejected:
        first = survey.rejected[0]
        raise RecordsUnusable(
            f"{first.file} row {first.row}: {first.reason}; {len(survey.rejected)} such record(s); mend them or write "
            "`on_bad_record: skip`"
        )
    if config.approval == "automatic":
        _require_labelled_units(config, survey)
    found = [item for offer in offers for item in check_records(config, offer, survey)]
    for item in found:
        if item.outcome == "fail":
            raise RecordsUnusable(f"{item.name}: {item.detail}; {item.remedy}")
    freeze_snapshot(config, survey)
    overlaps = [Check(*each) for each in find_overlaps(config, (placed.record for placed in survey.placed))]
    return found + [item for item in overlaps if item.outcome != "pass"]


def _require_labelled_units(config: SiteConfig, survey: Survey) -> None:
    """Checks each task's minimum before any run is known, so that no run's settings decide whether the site joins."""
    for name, task in config.tasks.items():
        units = {
            each.unit_key
            for each in survey.placed
            if each.source == task.source and SIDES[each.side] == "train"
            if any(_has_cell(each.record, column) for column in task.columns)
        }
        if len(units) < task.min_units:
            raise RecordsUnusable(
                f"tasks.{name}.min_units: expected at least {task.min_units} units with a label to train on, got "
                f"{len(units)}; correct the source or the column"
            )


def _has_cell(record: SourceRecord, column: str) -> bool:
    # A mask is read now, and may be a bad one.
    cell, _ = try_record(lambda: record.cells.get(column, "").strip())
    return bool(cell)


def _judge_trial(config: SiteConfig, run: RunConfig, trial: TaskTrial) -> Check:
    name = f"task {trial.task} in {run.name}" + (f" on {trial.backbone}" if run.choice is not None else "")
    detail = "; ".join(
        f"{what}: {side.num_records} records, {side.num_labelled} with a label, "
        f"{'' if side.num_tried == side.num_labelled else 'about '}{side.num_usable} usable"
        + (f" of {side.num_units} patients" if config.unit is Unit.PATIENT else "")
        + f" ({side.num_tried} tried)"
        for what, side in (("to train on", trial.sides["train"]), ("held out", trial.sides["test"]))
    )
    if not trial.has_weights:
        detail += "; tried without the backbone's weights, which are not here yet"
    if trial.refused:
        first = trial.refused[0]
        detail += f"; {len(trial.refused)} unusable, the first: {first.file} row {first.row}: {first.reason}"
    if trial.is_swapped:
        detail += "; the sources are of the language that is to be written, and the texts beside them are not"
    if not trial.has_enough:
        units = "unit" if trial.min_units == 1 else "units"
        needed = f"tasks.{trial.task}.min_units: expected at least {trial.min_units} usable {units} to train on"
        return Check(name, "fail", f"{needed}; {detail}", "correct the source's settings, or take no part in the run")
    if trial.refused:
        stops = config.on_bad_record == "stop"
        remedy = "mend them, or write `on_bad_record: skip`" if stops else "mend them, or let them be left out"
        return Check(name, "fail" if stops else "warn", detail, remedy)
    num_usable = sum(side.num_tried for side in trial.sides.values())
    clipped = {column: count for column, count in trial.clipped.items() if 2 * count > num_usable}
    if clipped:
        counts = ", ".join(f"{column} {count}" for column, count in clipped.items())
        detail += f"; numbers beyond the run's ranges, which are clipped, of {num_usable} tried: {counts}"
        return Check(name, "warn", detail, "compare these columns' units with the run's `range`")
    if trial.is_swapped:
        return Check(name, "warn", detail, "exchange the columns or files of sources and texts")
    return Check(name, "pass", detail)


# --- this machine ----------------------------------------------------------------------------------------------------


def _check_state(config: SiteConfig) -> Iterator[Check]:
    folder = config.state_dir
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    low = free < LOW_DISK_BYTES
    yield Check(
        "disk",
        "warn" if low else "pass",
        f"{free / (1 << 30):.1f} GiB free under {existing}",
        "features and backbones need room: free some, or name a larger disk in cache_dir" if low else "",
    )
    if not folder.exists():
        yield Check("state", "pass", f"{folder} will be made, readable by its owner only")
    elif folder.stat().st_mode & _OTHERS:
        yield Check("state", "fail", f"{folder} is open to others than its owner", f"chmod 700 {folder}")
    else:
        yield Check("state", "pass", f"{folder}, readable by its owner only")


def _check_device(config: SiteConfig) -> Check:
    if config.device == "cpu" or (config.device == "auto" and not _has_gpu_driver()):
        return Check("device", "pass", f"{config.device}: cpu")  # Without torch, which takes a second to import.
    try:
        return Check("device", "pass", f"{config.device}: {Site(config, os_entropy).device().type}")
    except BadInput as error:
        return Check("device", "fail", str(error), "write `device: auto` or `cpu`")


def _has_gpu_driver() -> bool:
    """Returns whether a driver of GPUs that torch can use shows on this machine (NVIDIA, also under WSL, or AMD)."""
    signs = ("/proc/driver/nvidia", "/dev/nvhost-ctrl", "/dev/dxg", "/dev/kfd")
    return any(Path(sign).exists() for sign in signs) or shutil.which("nvidia-smi") is not None


def _check_ledger(config: SiteConfig) -> Iterator[Check]:
    try:
        place = locate_ledgers(config)
        account = budgets.balance(config)
    except HeadwaterError as error:
        yield Check("ledger", "fail", str(error), "headwater site recover, or amend; see docs/deploy-site.md")
        return
    left = f"epsilon {budgets.round_down(account.left_epsilon, 2):g} of {account.terms.epsilon_cap:g} left"
    if account.left_epsilon <= 0:
        yield Check("ledger", "fail", left, "every private run will be declined; the budget is never reset")
    elif account.amendment_due:
        yield Check("ledger", "fail", f"{left}, but the site file says other terms", "headwater site amend")
    else:
        yield Check("ledger", "pass", left)
    yield _check_place(config, place)


def _check_secure_sum(config: SiteConfig, section: SecureSum) -> Check:
    try:
        open_member(config)
    except SiteDeclined as declined:
        remedy = f"headwater site identity {section.identity}, and its public key into all rosters"
        return Check("secure sum", "fail", declined.detail, remedy)
    # By this digest staffs compare their files by telephone.
    return Check(
        "secure sum",
        "pass",
        f"at least {section.min_sites} of {len(section.roster)} sites, {section.colluding} may collude; digest "
        f"{section.digest[:16]}, the same at every site",
    )


def _check_place(config: SiteConfig, place: Path) -> Check:
    """Returns whether another site file of this machine's user would find the same ledger."""
    usual, registry = find_default_ledger_dir(), config.registry
    if config.ledger_dir is None and place != usual:
        return Check(
            "ledger_dir",
            "warn",
            f"the ledger lies in {place}, as in earlier versions; other site files look in {usual}",
            f"write this line into every site file of registry {registry}: `ledger_dir: {place}`",
        )
    if place != usual and has_ledger(usual, registry):
        return Check(
            "ledger_dir",
            "warn",
            f"a second ledger of registry {registry} lies in {usual}; what is spent in both adds up",
            f"write `ledger_dir: {place}` into every site file of this registry, and lower budget.epsilon by what the "
            "other ledger holds",
        )
    if place.exists() and place.stat().st_mode & _OTHERS:
        return Check("ledger_dir", "fail", f"{place} is open to others than its owner", f"chmod 700 {place}")
    return Check("ledger_dir", "pass", str(place))


def _check_credentials(coordinator: Coordinator) -> Iterator[Check]:
    try:
        read_key(coordinator.key)
        yield Check("key", "pass", f"{coordinator.key}, readable by its owner only")
    except BadInput as error:
        yield Check("key", "fail", str(error), "chmod 600 it, or make a new one with `headwater site init`")
    try:
        create_trusting_context(coordinator.ca)
    except BadInput as error:
        yield Check("authority", "fail", str(error), "take ca.crt from the coordinator's kit")
        return
    yield from _check_authorities(coordinator.ca)


def _check_authorities(ca: Path) -> Iterator[Check]:
    try:
        authorities = diagnose.read_authorities(ca)
    except (OSError, ValueError) as error:
        yield Check("authority", "warn", f"{ca} cannot be read ({type(error).__name__})", "take the coordinator's kit")
        return
    for each in authorities:
        days = (each.not_valid_after_utc - diagnose.utc_now()).days
        detail = f"{ca}, valid until {each.not_valid_after_utc:%Y-%m-%d}"
        if days < AUTHORITY_WARN_DAYS:
            remedy = "ask the coordinator's staff for a new kit, then `headwater site init DIR --kit KIT.zip`"
            yield Check("authority", "warn", detail, remedy)
        else:
            yield Check("authority", "pass", detail)


# --- the network -----------------------------------------------------------------------------------------------------


def _check_network(config: SiteConfig, coordinator: Coordinator) -> Iterator[Check]:
    proxy = diagnose.find_proxy(coordinator)
    yield Check("way out", "pass", "through the proxy of HTTPS_PROXY" if proxy else "direct, no proxy")
    try:
        connection = open_tls(coordinator, create_trusting_context(coordinator.ca))
    except BadInput:
        return  # Said above.
    except OSError as error:
        found = diagnose.diagnose_connection(coordinator) or diagnose.Diagnosis(
            f"{coordinator.address} failed once ({type(error).__name__}) and now answers: run this check again"
        )
        what, _, remedy = found.sentence.rpartition(": ")
        name = "certificate" if found.is_tls else "reachable"
        yield Check(name, "fail", what or found.sentence, remedy if what else "")
        return
    try:
        connection.request("GET", "/health")
        date = connection.getresponse().getheader("date")
    except OSError:
        date = None
    finally:
        connection.close()
    yield Check("reachable", "pass", f"{coordinator.address} answers over TLS")
    yield _check_expiry(coordinator)
    yield _check_clock(date)
    yield _check_admission(config, coordinator)


def _check_expiry(coordinator: Coordinator) -> Check:
    try:
        shown = read_presented_certificate(coordinator)
    except (OSError, ValueError) as error:
        return Check("certificate", "warn", f"it cannot be read again ({type(error).__name__})", "try again")
    days = (shown.not_after - diagnose.utc_now()).days
    detail = f"for {coordinator.address.host}, issued by {shown.issuer}, valid for {days} more days"
    if days < WARN_DAYS:
        return Check("certificate", "warn", detail, "remind the coordinator's staff: `headwater coordinator renew`")
    return Check("certificate", "pass", detail)


def _check_clock(date: str | None) -> Check:
    from client.connection.fleet import measure_clock_skew  # Here, as below: a check offline does without Flower.

    skew = measure_clock_skew(date)
    if skew is None:
        return Check("clock", "warn", "the coordinator does not say what time it is", "")
    wrong = diagnose.explain_clock_skew(skew)
    if wrong:
        what, _, remedy = wrong.rpartition(": ")
        return Check("clock", "fail", what, remedy)
    return Check("clock", "pass", f"within {max(1, round(abs(skew)))} s of the coordinator's")


def _check_admission(config: SiteConfig, coordinator: Coordinator) -> Check:
    from client.connection.fleet import ConnectionLost, ConnectionRefused, Fleet, RunInactive
    from client.connection.node import NODE_ID, StopRequest

    path: Path = config.coordinator_dir / NODE_ID
    try:
        fleet = Fleet(coordinator, read_key(coordinator.key), stopping=StopRequest().event)
    except BadInput:
        return Check("admitted", "warn", "not tried: there is no usable key", "")
    try:
        # A damaged number is as good as none.
        if path.is_file() and (text := path.read_bytes().strip()).isdigit():
            fleet.check_admission(int(text[:20]))
        else:
            # The first time: joins as `start` does, and leaves at once.
            fleet.deactivate(fleet.activate())
    except ConnectionRefused as refused:
        what, _, remedy = str(refused).partition(": ")
        return Check("admitted", "fail", what, remedy)
    except (ConnectionLost, RunInactive) as error:
        return Check("admitted", "warn", f"it cannot be told ({error})", "try again")
    finally:
        fleet.close()
    return Check("admitted", "pass", "the coordinator knows this site's key")
