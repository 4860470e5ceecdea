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
def delayed(made: Deployment) -> str:
    """every chunk of bytes arrives 0.3 s later"""
    return _harm(made, Mode.DELAY, 1.0)


@row
def reordered(made: Deployment) -> str:
    """one chunk in 50 has its halves exchanged"""
    return _harm(made, Mode.REORDER, 0.02)


@row
def truncated(made: Deployment) -> str:
    """one chunk in 50 arrives by half, and the connection ends"""
    return _harm(made, Mode.TRUNCATE, 0.02)


@row
def flipped(made: Deployment) -> str:
    """one bit is wrong in one chunk of 50"""
    return _harm(made, Mode.FLIP, 0.02)


@row
def no_server(made: Deployment) -> str:
    """a proxy without a coordinator behind it, in plain text, for 15 s"""
    return _away(made, Mode.PLAIN)


@row
def refused(made: Deployment) -> str:
    """a balancer that closes every connection, for 15 s"""
    return _away(made, Mode.REFUSE)


def _cut(made: Deployment, seconds: float, names: list[str] | None = None) -> str:
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    for name in names or made.sites:
        made.sites[name].proxy.cut_for(seconds)
    time.sleep(seconds)
    said = expect_end_or_resume(made, run)
    expect_all_running(made)
    return said


def _harm(made: Deployment, mode: Mode, rate: float) -> str:
    for site in made.sites.values():
        site.proxy.rate, site.proxy.delay_s, site.proxy.mode = rate, 0.3, mode
    before = sum(site.proxy.num_harmed for site in made.sites.values())
    run = made.start_run(rounds=4)
    said = expect_end_or_resume(made, run)
    harmed = sum(site.proxy.num_harmed for site in made.sites.values()) - before
    assert harmed
    expect_all_running(made)
    return f"{said}; {harmed} chunks harmed"


def _away(made: Deployment, mode: Mode) -> str:
    run = made.start_run(rounds=4)
    made.wait_for_round(2, run=run)
    for site in made.sites.values():
        site.proxy.mode = mode
        site.proxy.drop()
    time.sleep(15)
    for site in made.sites.values():
        site.proxy.mode = Mode.PASS
    said = expect_end_or_resume(made, run)
    expect_all_running(made)
    return said
