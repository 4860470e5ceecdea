"""The edge between Flower and a site: decode, call one function, encode. No exception's text crosses it.

Flower sends an exception's message to the coordinator; so every handler answers with a payload, whatever happens.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.choice.answer import vote
from client.config import SiteConfig
from client.protocol.evaluate import evaluate
from client.protocol.join import join
from client.protocol.prepare import finish, keep_part, prepare_run
from client.protocol.site import Site, SiteDeclined
from client.protocol.train import measure, train
from client.secure_sum.steps import confirm_survivors, make_sum_keys, share_secrets, train_masked, unmask
from common import messages
from common.errors import explain_os_error, plain
from common.events import RequestDeclined
from common.model.backbones import Backbone
from common.privacy.noise import Entropy, os_entropy
from common.process.lines import ProgressLines
from common.types import BadInput, DeclineReason, LedgerDamaged
from common.yaml import load

_log = logging.getLogger(__name__)
SITE_VARIABLE = "HEADWATER_SITE"
COORDINATOR_VARIABLE = "HEADWATER_COORDINATOR"

OpenSite = Callable[[Context], SiteConfig]
_Request = TypeVar("_Request")
Handle = Callable[[Site, _Request], RecordDict | messages.Reply]
"""A function that answers a request: with stored records where a request sent again must get the same bytes."""

_ANSWERS: Mapping[str, tuple[type[messages.Request], Handle[Any]]] = {
    messages.JOIN: (messages.JoinRequest, join),
    messages.PART: (messages.PartRequest, keep_part),
    messages.PREPARE: (messages.PrepareRequest, prepare_run),
    messages.MOMENTS: (messages.MomentsRequest, measure),
    messages.VOTE: (messages.VoteRequest, vote),
    messages.TRAIN: (messages.TrainRequest, train),
    messages.SUM_KEYS: (messages.SumKeysRequest, make_sum_keys),
    messages.SUM_SHARES: (messages.SumSharesRequest, share_secrets),
    messages.MASKED: (messages.MaskedRequest, train_masked),
    messages.SURVIVORS: (messages.SurvivorsRequest, confirm_survivors),
    messages.UNMASK: (messages.UnmaskRequest, unmask),
    messages.EVALUATE: (messages.EvaluateRequest, evaluate),
    messages.FINISH: (messages.FinishRequest, finish),
}
"""Flower message type -> the request that it carries, and the function that answers it."""


def load_site_from_environment(context: Context) -> SiteConfig:
    """Returns the settings of the site that this process serves.

    HEADWATER_SITE names a site file, and HEADWATER_COORDINATOR who asks where the file names several coordinators. Or,
    for Flower's simulation engine, HEADWATER_SITE names a folder of site files of which the node's `partition-id` picks
    one in alphabetical order.
    """
    value = os.environ.get(SITE_VARIABLE)
    if not value:
        raise BadInput(f"expected a site file in the environment variable {SITE_VARIABLE}")
    path = Path(value)
    if path.is_dir():
        files = sorted(path.glob("*/site.yaml"))
        path = files[int(context.node_config["partition-id"])]
    return load(SiteConfig, path).select(os.environ.get(COORDINATOR_VARIABLE) or None)


def make_app(
    open_site: OpenSite = load_site_from_environment,
    entropy: Entropy = os_entropy,
    opened: Mapping[str, Backbone] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ClientApp:
    """Returns a ClientApp for one site.

    Args:
        open_site: A function that returns the settings of the site that a message is for.
        entropy: The source of noise keys; anything but the default is for tests and simulations only.
        opened: The backbones that this process has open, by digest, for simulations.
        progress: Told how many of how many records are encoded; by default the site's log is.
    """
    app, encoding = ClientApp(), progress or ProgressLines("encoding")

    def answer(message: Message, context: Context, *, request: type[Any], handle: Handle[Any]) -> Message:
        name, asked = "", message.metadata.message_type
        try:
            site = Site(open_site(context), entropy, encoding, opened)
            name = site.config.name
            records = _answer(site, asked, lambda: handle(site, messages.decode(message.content, request)))
        except (KeyboardInterrupt, SystemExit):
            raise  # The process ends; Flower answers for it without quoting these.
        except BaseException:  # Also a panic of native code, which is no Exception.
            _log.exception("a request failed at this site")
            records = messages.encode(messages.Declined(DeclineReason.INTERNAL, name))
        return Message(records, reply_to=message)

    for kind, (request, handle) in _ANSWERS.items():
        category, _, action = kind.partition(".")
        register = {"query": app.query, "train": app.train, "evaluate": app.evaluate}[category]
        register(action or "default")(partial(answer, request=request, handle=handle))
    return app


def _answer(site: Site, asked: str, handle: Callable[[], RecordDict | messages.Reply]) -> RecordDict:
    """Returns the reply of a handler as records, or that the site declines, which is journalled."""
    try:
        reply = handle()
        return reply if isinstance(reply, RecordDict) else messages.encode(reply)
    except SiteDeclined as declined:
        if declined.logged:
            return messages.encode(messages.Declined(declined.reason, site.config.name))
        refusal, detail = declined.reason, declined.detail
    except messages.OtherVersion as error:
        refusal, detail = DeclineReason.VERSION, str(error)
    except BadInput as error:
        refusal, detail = DeclineReason.BAD_REQUEST, str(error)
    except OSError as error:
        refusal, detail = DeclineReason.INTERNAL, explain_os_error(error)
    except LedgerDamaged as error:
        # To the coordinator the same word as an exhausted budget: what was seen is the security officer's alone.
        refusal, detail = DeclineReason.BUDGET, str(error)
    # Short: a coordinator must not fill the disk that the ledger needs, whatever its requests make a sentence quote.
    declined_event = RequestDeclined(message_type=asked, reason=refusal.value, detail=plain(detail))
    try:
        site.journal.write(declined_event)
    except OSError as error:
        # The disk that is full may be the journal's: the site's log still says what happened.
        _log.error("declined (%s): %s; not in the journal: %s", refusal.value, plain(detail), explain_os_error(error))
    return messages.encode(messages.Declined(refusal, site.config.name))


app = make_app()
