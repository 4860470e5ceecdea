"""After joining and at the end: receive backbones, encode records, keep the final heads. Nothing is spent here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import final

from client.data.prepare import Encoding, prepare, prepare_candidates
from client.protocol.site import (
    CHOSEN,
    FINAL_HEADS,
    SECURE_SUM,
    Joined,
    Site,
    SiteDeclined,
    check_prepared,
    digest_of_offer,
    joined_run,
    load_modules,
    open_on_stored,
)
from common import messages
from common.events import ChoiceEnded, EncodingContinues, HeadsReceived, RunPrepared
from common.files import write_atomic
from common.model.backbones import Backbone
from common.model.class_moments import check_class_moments, split_class_moments
from common.model.trunks import freeze_parts
from common.serving.folder import MAX_TEMPERATURE, MIN_TEMPERATURE, MODEL, describe_model, write_model
from common.types import (
    BadInput,
    DeclineReason,
    DigestMismatch,
    heads_digest,
)

FIRST_S, EVERY_S = 10.0, 60.0
"""Seconds of encoding after which the journal has its first line about it, and between two lines."""


@final
class JournalledEncoding:
    """Tells how far the encoding of a run's sources is: the site's own observer, and now and then its journal."""

    def __init__(self, site: Site, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._site, self._run_id, self._clock = site, run_id, clock
        self._began, self._begun_at, self._done, self._due = 0.0, 0, -1, 0.0

    def __call__(self, done: int, total: int) -> None:
        """Notes that so many of a source's records are done."""
        if self._site.progress is not None:
            self._site.progress(done, total)
        now = self._clock()
        if self._done < 0 or done <= self._done:  # Another source begins.
            self._began, self._begun_at, self._due = now, done, now + FIRST_S
        self._done = -1 if done >= total else done
        if now < self._due or done >= total:
            return
        self._due = now + EVERY_S
        rate = (done - self._begun_at) / max(now - self._began, 1e-9)
        event = EncodingContinues(run_id=self._run_id, num_done=done, num_records=total, rate=round(rate, 3))
        with suppress(OSError):  # It is news only: a full disk is said where it matters.
            self._site.journal.write(event)


def keep_part(site: Site, request: messages.PartRequest) -> messages.Ready:
    """Keep one part of a backbone that was agreed on, unless the whole is here already.

    Raises:
        SiteDeclined: not joined, or no task here stands on the backbone.
    """
    joined = joined_run(site, request.run_id)
    _refuse_others(site, joined, [request.digest])
    if not site.backbones().has(request.digest):
        site.backbones().put_part(request.digest, request.index, request.total, request.data)
    return messages.Ready()


def prepare_run(site: Site, request: messages.PrepareRequest) -> messages.Ready:
    """Put the backbones together whose parts were sent, encode records, write the run's label arrays.

    Raises:
        SiteDeclined: not joined, or a backbone is not one that was agreed on.
    """
    joined = joined_run(site, request.run_id)
    _refuse_others(site, joined, request.specs)
    tasks = joined.tasks(site.config)
    try:
        opened = _open_backbones(site, joined, joined.digests(tasks), request.specs)
    except DigestMismatch as error:
        raise SiteDeclined(DeclineReason.BACKBONE_NOT_ALLOWED, str(error)) from error
    try:
        frozen = freeze_parts(joined.run, opened)
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    encoding = Encoding(site.features(), site.device(), JournalledEncoding(site, joined.run_id))
    if joined.run.choice is not None:
        ((name, task),) = tasks.items()
        preparation = prepare_candidates(site.config, name, task, opened, encoding, joined.folder / "data")
        feature_dims = {name: backbone.feature_dim for name, backbone in opened.items()}
    else:
        own = {name: frozen[joined.run.backbone_of(name)] for name in tasks}
        preparation = prepare(site.config, tasks, own, encoding, joined.folder / "data")
        feature_dims = {name: opened[joined.run.backbone_of(name)].feature_dim for name in tasks}
    prepared = {"feature_dims": feature_dims, "offer": digest_of_offer(joined.folder)}
    # Last: its presence marks complete preparation.
    write_atomic(joined.folder / "prepared.json", json.dumps(prepared).encode())
    left_out = [(problem.file, problem.row) for problem in preparation.problems if problem.row and not problem.is_used]
    site.journal.write(
        RunPrepared(
            run_id=joined.run_id,
            num_left_out=len(left_out),
            num_records=preparation.num_records,
            num_usable=max(0, preparation.num_records - len(set(left_out))),
            precision_error=preparation.precision_error,
        )
    )
    return messages.Ready()


def finish(site: Site, request: messages.FinishRequest) -> messages.Ready:
    """Keep the run's final heads, verified by digest; of a choice the name of what was chosen."""
    joined = joined_run(site, request.run_id)
    if joined.run.choice is not None:
        return _end_choice(site, joined, request)
    tasks = open_on_stored(site, joined)
    heads, moments = split_class_moments(request.heads)
    if set(heads) != set(joined.sizes(site.config)):
        raise SiteDeclined(DeclineReason.TASK_NOT_ALLOWED, "the final heads are not those of this site's tasks")
    if not set(request.temperatures) <= set(tasks):
        raise SiteDeclined(DeclineReason.TASK_NOT_ALLOWED, "the temperatures are not those of this site's tasks")
    if not all(MIN_TEMPERATURE <= value <= MAX_TEMPERATURE for value in request.temperatures.values()):
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "a temperature divides outputs so that they are no numbers")
    load_modules(site, joined, tasks, heads)
    if heads_digest(heads) != request.digest:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the final heads differ from their digest")
    if moments and (joined.run.moments is None or not joined.run.moments.classes):
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "the run measures no moments of classes, and some came")
    try:
        backbones = {name: joined.run.backbone_of(name) for name in tasks}
        check_class_moments(moments, tasks, backbones, check_prepared(joined))
    except BadInput as error:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, str(error)) from error
    keep_model(site, joined, request)
    records = messages.encode(request)
    write_atomic(joined.folder / FINAL_HEADS, messages.to_bytes(records))
    (joined.folder / SECURE_SUM).unlink(missing_ok=True)
    site.journal.write(HeadsReceived(run_id=joined.run_id, heads=request.digest))
    site.ledger().release(site.config.name_charge(joined.run_id))
    return messages.Ready()


def _end_choice(site: Site, joined: Joined, request: messages.FinishRequest) -> messages.Ready:
    if request.heads or request.chosen not in joined.run.backbone_specs:
        raise SiteDeclined(DeclineReason.BAD_REQUEST, "a choice ends with the name of a candidate, and with no heads")
    write_atomic(joined.folder / CHOSEN, request.chosen.encode())
    site.journal.write(ChoiceEnded(run_id=joined.run_id, chosen=request.chosen))
    site.ledger().release(site.config.name_charge(joined.run_id))
    return messages.Ready()


def keep_model(site: Site, joined: Joined, request: messages.FinishRequest) -> Path:
    """Writes a run's final heads as a model that can be used without a run, and returns its folder.

    Args:
        site: the site.
        joined: the run.
        request: the final heads, verified.
    """
    tasks = joined.tasks(site.config)
    digests = joined.digests(tasks)
    heads, moments = split_class_moments(request.heads)
    private = joined.run.requested_privacy is not None
    config = describe_model(
        joined.run,
        joined.run_id,
        heads,
        {name: (digest, joined.run.backbone_specs[name].settings()) for name, digest in digests.items()},
        digest=request.digest,
        epsilon={site.config.name: site.ledger().compute_run_epsilon(site.config.name_charge(joined.run_id))}
        if private
        else {},
        temperatures=request.temperatures,
    )
    weights = {name: site.backbones().locate_weights(digest) for name, digest in digests.items()}
    write_model(joined.folder / MODEL, config, heads, weights, moments)
    return joined.folder / MODEL


def _refuse_others(site: Site, joined: Joined, digests: Iterable[str]) -> None:
    """Raise SiteDeclined where a digest is of no backbone that the run's tasks here stand on."""
    if not set(digests) <= set(joined.digests(joined.tasks(site.config)).values()):
        raise SiteDeclined(DeclineReason.BACKBONE_NOT_ALLOWED, "no task of the run stands on that backbone here")


def _open_backbones(
    site: Site, joined: Joined, digests: Mapping[str, str], sent: Mapping[str, str]
) -> dict[str, Backbone]:
    """Some of the run's backbones by name, put together from their parts where they were sent.

    Raises:
        DigestMismatch: one is not what the digest names, or not what the run says of it, which the staff approved.
    """
    store, opened = site.backbones(), {}
    for name, digest in digests.items():
        arrived = digest in sent and not store.has(digest)
        opened[name] = store.assemble(digest, sent[digest]) if arrived else store.open(digest)
        if opened[name].public_spec() != joined.run.backbone_specs[name].settings():
            raise DigestMismatch(f"{joined.run.backbone_key(name)}: its settings are not those of the run")
    return opened
