"""A network that is slow, cut, or changes what it carries."""

from __future__ import annotations

import time

from benchmarks.faults.parts import (
    expect_all_running,
    expect_end_or_resume,
    row,
)
from tests.bad_proxy import Mode
from tests.deployment import Deployment


@row
def cut_30(made: Deployment) -> str:
    """the network of all sites is cut for 30 s"""
    return _cut(made, 30)


@row
def cut_110(made: Deployment) -> str:
    """the network of all sites is cut for 110 s"""
    return _cut(made, 110)


@row
def cut_one_110(made: Deployment) -> str:
    """the network of one site is cut for 110 s"""
    return _cut(made, 110, ["beta"])


@row
def bad_bytes(made: Deployment) -> str:
    """for two rounds each: all chunks 0.3 s late, then one in 50 reordered, truncated, with one wrong bit"""
    run = made.start_run(rounds=9, cohort__timeout_s=60)
    before = sum(site.proxy.num_harmed for site in made.sites.values())
    for number, (mode, rate) in enumerate(
        ((Mode.DELAY, 1.0), (Mode.REORDER, 0.02), (Mode.TRUNCATE, 0.02), (Mode.FLIP, 0.02))
    ):
        made.wait_for_round(1 + 2 * number, run=run)
        for site in made.sites.values():
            site.proxy.rate, site.proxy.delay_s, site.proxy.mode = rate, 0.3, mode
    said = expect_end_or_resume(made, run)
    harmed = sum(site.proxy.num_harmed for site in made.sites.values()) - before
    assert harmed
    expect_all_running(made)
    return f"{said}; {harmed} chunks harmed"


@row
def no_server(made: Deployment) -> str:
    """a proxy without a coordinator behind it: 10 s an answer in plain text, 10 s every connection closed"""
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    for mode in (Mode.PLAIN, Mode.REFUSE):
        for site in made.sites.values():
            site.proxy.mode = mode
            site.proxy.drop()
        time.sleep(10)
    for site in made.sites.values():
        site.proxy.mode = Mode.PASS
    said = expect_end_or_resume(made, run)
    expect_all_running(made)
    return said


def _cut(made: Deployment, seconds: float, names: list[str] | None = None) -> str:
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    for name in names or made.sites:
        made.sites[name].proxy.cut_for(seconds)
    time.sleep(seconds)
    said = expect_end_or_resume(made, run)
    expect_all_running(made)
    return said
