"""`log`: lists releases, refusals and changes of the ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.commands.parts.options import Json, Set, SiteFile
from client.config import SiteConfig
from client.ledger import log as statements
from client.ledger.log import Statement, in_words
from common.process.console import print_json, reported_errors
from common.process.lines import describe_pace
from common.yaml import load


def log(site: SiteFile, set_: Set = None, json_: Json = False) -> None:
    """Lists every release, every refusal with its reason, and every change of the ledger.

    Example: headwater site log site.yaml --json > log.json
    """
    with reported_errors():
        page = statements.statement(load(SiteConfig, site, set_ or []))
        if json_:
            print_json(statements.as_json(page))
        else:
            _print_log(page)


def _print_log(page: Statement) -> None:
    console = Console()
    console.print(
        _make_table(
            "releases",
            ("time (UTC)", "run", "round", "for", "mechanism", "bytes", "resent"),
            [
                (
                    _format_time(each.time),
                    each.run,
                    str(each.round),
                    "vote" if each.mechanism and each.mechanism.kind == "exponential" else each.purpose,
                    in_words(each.mechanism),
                    "no stored reply" if each.bytes is None else str(each.bytes),
                    str(each.resent),
                )
                for each in page.releases
            ],
        )
    )
    refusals = [(_format_time(each.time), each.source, each.reason, each.detail) for each in page.refusals]
    console.print(_make_table("refusals", ("time (UTC)", "by", "reason sent", "detail, kept here"), refusals))
    changes = [(_format_time(each.time), each.event, each.detail) for each in page.changes]
    if page.encoding is not None:
        each = page.encoding
        left = describe_pace(1, round(max(0, each.num_records - each.num_done)), 1.0 / each.rate) if each.rate else ""
        console.print(
            f"encoding for run {escape(each.run)}: {each.num_done:,} of {each.num_records:,} records{left} "
            f"({_format_time(each.time)} UTC)"
        )
    console.print(_make_table("changes", ("time (UTC)", "what", "detail"), changes))


def _make_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=f"{title}: {len(rows)}", title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _format_time(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))
