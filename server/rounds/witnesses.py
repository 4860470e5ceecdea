"""The newest witness of each site's ledger, kept over runs and shown to the site again.

A ledger that was set back to an older copy of itself is told by its site from the witness that the coordinator shows
(`client/ledger/older_copy.py`). Of one chain the longest is kept; another chain follows a recovery, and replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar, final

from common import messages
from common.files import lock_file, write_atomic
from common.types import BadInput, LedgerWitness

_Shown = TypeVar(
    "_Shown", messages.MomentsRequest, messages.VoteRequest, messages.TrainRequest, messages.EvaluateRequest
)


@final
class Witnesses:
    """Witnesses by site name, in a file."""

    def __init__(self, path: Path | None) -> None:
        """Args: path: file of the witnesses, which need not exist; None keeps and shows nothing, for simulations."""
        self._path = path
        self._newest = {} if path is None else _read(path)

    def find(self, site: str) -> LedgerWitness | None:
        """Returns the newest witness of a site's ledger; None where there is none."""
        return self._newest.get(site)

    def show(self, requests: Mapping[int, _Shown], names: Mapping[int, str]) -> dict[int, messages.Request]:
        """Returns the requests, each with the witness that is kept of its site's ledger.

        Args:
            requests: node id -> its request.
            names: node id -> name of its site.
        """
        kept = {node: self.find(names[node]) for node in requests}
        return {
            node: replace(request, witness=kept[node]) if kept[node] else request for node, request in requests.items()
        }

    def keep(self, received: Mapping[str, LedgerWitness | None]) -> None:
        """Keeps what sites sent; durable when this returns.

        Args:
            received: site name -> the witness in its reply, None where it sent none.

        Raises:
            BadInput: the file is damaged.
        """
        if self._path is None or not any(received.values()):
            return
        with lock_file(self._path.with_name(f".{self._path.name}.lock")):
            newest = _read(self._path)  # Another run may have written.
            for site, witness in received.items():
                known = newest.get(site)
                if witness is not None and (known is None or _is_newer(witness, known)):
                    newest[site] = witness
            write_atomic(self._path, json.dumps({site: asdict(each) for site, each in newest.items()}).encode())
        self._newest = newest


def _is_newer(witness: LedgerWitness, known: LedgerWitness) -> bool:
    return witness.chain != known.chain or witness.length > known.length


def _is_whole(witness: LedgerWitness) -> bool:
    texts = (witness.chain, witness.mac, witness.tag)
    return type(witness.length) is int and all(isinstance(text, str) for text in texts)


def _read(path: Path) -> dict[str, LedgerWitness]:
    try:
        kept = {site: LedgerWitness(**values) for site, values in json.loads(path.read_text(encoding="utf-8")).items()}
        if not all(_is_whole(witness) for witness in kept.values()):
            raise ValueError("expected texts and a number of lines")
        return kept
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{path}: expected the witnesses of sites' ledgers, got a damaged file; restore it, or remove it: sites "
            "then cannot tell by it that their ledger was set back"
        ) from error
