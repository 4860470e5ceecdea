"""Records that cannot be read, sites that lie, and strangers."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress

import yaml

from benchmarks.faults.parts import (
    expect_end,
    expect_end_or_resume,
    find_sentence,
    row,
)
from common.events import SiteRejected, select_events
from tests.deployment import Deployment, wait_until
from tests.federation import app_of


@row
def bad_records(made: Deployment) -> str:
    """one site has a record that cannot be read, another no label any more for its one task"""
    changes: dict[str, Callable[[str], str]] = {
        "beta": lambda text: text + "abc,9,no,no\n",
        "gamma": lambda text: re.sub(r"(?m)^(\d+,\d),\w+,", r"\1,,", text),
    }
    tables = {name: made.sites[name].folder / "rows.csv" for name in changes}
    whole = {name: table.read_text() for name, table in tables.items()}
    before = {name: len(made.sites[name].read_log()) for name in changes}
    for name, change in changes.items():
        made.stop_site(name)
        tables[name].write_text(change(whole[name]))
    try:
        made.start_site("beta")
        made.wait_for_joined("beta")
        made.start_site("gamma")  # Its records are tried before anybody is contacted.
        gamma = made.sites["gamma"]
        assert wait_until(lambda: not gamma.is_running(), 120), "it joined without a label"
        said = expect_end_or_resume(made, made.start_run(rounds=2))
        assert sorted(made.rounds()[-1].sites) == ["alpha", "beta"]
        for name in changes:
            log = made.sites[name].read_log()[before[name] :]
            said += (
                f"; {name} said {find_sentence(log, 'cannot', 'could not', 'left out', '0 usable', 'not in force')!r}"
            )
    finally:
        for name, table in tables.items():
            made.stop_site(name)
            table.write_text(whole[name])
    return said


@row
def hostile_site(made: Deployment) -> str:
    """a site sends NaN, wrong shapes, huge numbers, garbage, 80 MB and nothing in turn"""
    other = made.folder / "hostile"
    app_of(other, ("client", "common", "server", "headwater", "simulations"))
    with (other / "client" / "app.py").open("a") as file:
        file.write(_HOSTILE)
    node = other / "client" / "connection" / "node.py"
    text = node.read_text()
    assert "difference = self._check_bundle" in text
    node.write_text(text.replace("difference = self._check_bundle", "difference = None and self._check_bundle"))
    made.stop_site("gamma")
    made.root, before = other, made.root
    made.start_site("gamma")
    made.wait_for_joined("gamma")
    made.root = before
    run = made.start_run(rounds=7)
    said = expect_end_or_resume(made, run)
    made.stop_site("gamma")
    shutil.rmtree(other)
    used = [event.round for event in made.rounds() if "gamma" in event.sites]
    assert not used, f"rounds {used} used it"
    reasons = {event.reason for event in select_events(made.events(), SiteRejected) if event.site == "gamma"}
    return f"{said}; rejected: {sorted(reasons)}"


@row
def strangers(made: Deployment) -> str:
    """at each port plain HTTP, garbage bytes, slow connections and a key that is not admitted, during a run"""
    run = made.start_run(rounds=4)
    made.wait_for_round(1, run=run)
    slow = []
    for port in made.ports:
        for content in (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", os.urandom(4096), b"POST /v1/fleet/pull-messages HTTP"):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as each:
                each.sendall(content)
        for _ in range(20):
            with suppress(OSError):
                slow.append(socket.create_connection(("127.0.0.1", port), timeout=5))
                slow[-1].sendall(b"P")
    stranger = made.folder / "stranger"
    made.must("site", "init", stranger, "--name", "alpha")
    values = yaml.safe_load(made.sites["alpha"].file.read_text())
    values |= {"state_dir": str(stranger / "state"), "ledger_dir": str(stranger / "ledgers")}
    values["coordinator"] |= {"key": str(stranger / "keys" / "alpha"), "ca": str(made.fed / "tls" / "ca.crt")}
    values["sources"]["records"]["path"] = str(made.sites["alpha"].folder / "rows.csv")
    (stranger / "site.yaml").write_text(yaml.safe_dump(values))
    done = made.command("site", "start", stranger / "site.yaml")
    assert done.returncode == 1, done.stderr
    said = expect_end(run)
    for each in slow:
        each.close()
    shutil.rmtree(stranger)
    return f"{said}; stranger: {done.stderr.strip().splitlines()[-1]!r}"


_HOSTILE = '''

_honest = app


def app(message, context):
    """Returns the reply that a hostile site sends in place of an honest one."""
    import os
    from dataclasses import fields

    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

    from common import messages

    reply = _honest(message, context)
    if message.metadata.message_type != messages.TRAIN:
        return reply
    number = int(message.metadata.group_id) % 7
    if number == 0:
        os._exit(1)
    records = reply.content
    if number == 1:
        return Message(RecordDict({"x": ConfigRecord({"y": os.urandom(1000)})}), reply_to=message)
    if number == 2:
        return Message(RecordDict({"x": ArrayRecord({"y": Array(np.zeros(20_000_000, np.float32))})}), reply_to=message)
    change = {
        3: lambda value: np.full_like(value, np.nan),
        4: lambda value: np.zeros((1,), np.float32),
        5: lambda value: value * np.float32(1e6) + np.float32(1e6),
        6: lambda value: np.zeros((3, *value.shape), np.float32),
    }[number]
    honest = messages.decode(records, messages.TrainReply)
    heads = {task: {key: change(value) for key, value in head.items()} for task, head in honest.delta.heads.items()}
    delta, forged = object.__new__(type(honest.delta)), object.__new__(type(honest))
    for made, model, values in ((delta, honest.delta, {"heads": heads}), (forged, honest, {"delta": delta})):
        for field in fields(model):
            object.__setattr__(made, field.name, values.get(field.name, getattr(model, field.name)))
    return Message(messages.encode(forged), reply_to=message)
'''
