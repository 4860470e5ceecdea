"""Clocks that are wrong."""

from __future__ import annotations

import subprocess
import time

from benchmarks.faults.parts import (
    expect_end,
    expect_end_or_resume,
    row,
)
from tests.deployment import Deployment, wait_until


@row
def clock_ahead_at_start(made: Deployment) -> str:
    """a site's clock is 60 s ahead when it starts"""
    return _shift_clock(made, "beta", 60)


@row
def clock_jumps(made: Deployment) -> str:
    """the clock of a running site jumps 600 s back"""
    return _shift_clock(made, "beta", -600, later=True)


@row
def clock_slow(made: Deployment) -> str:
    """a site's clock is 100 s behind: within what signatures allow"""
    made.stop_site("beta")
    made.start_site("beta", more=_clock(made, -100))
    made.wait_for_joined("beta")
    said = expect_end(made.start_run(rounds=3))
    assert "beta" in made.rounds()[-1].sites
    made.stop_site("beta")
    return said


@row
def clock_of_coordinator_jumps(made: Deployment) -> str:
    """the coordinator's clock jumps 60 s back and is set right after 20 s"""
    made.stop()
    more = _clock(made, 0)
    made.start_coordinator(more=more)
    run = made.start_run(rounds=5)
    made.wait_for_round(2, run=run)
    _set_clock(made, -60)
    time.sleep(20)
    _set_clock(made, 0)
    ended = [f"{name}: {site.last_line[10:]}" for name, site in made.sites.items() if not site.is_running()]
    made.start_sites()
    said = expect_end_or_resume(made, run)
    made.stop()
    made.start_coordinator()
    return f"{said}; {len(ended)} site(s) ended{f' ({ended[0]})' if ended else ''}"


_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long shift(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("DRILL_CLOCK"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(which, now);
    if (!code && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
"""


def _set_clock(made: Deployment, seconds: int) -> None:
    (made.folder / "clock").write_text(str(seconds))


def _clock(made: Deployment, seconds: int) -> dict[str, str]:
    """Variables of a process whose clock is so many seconds ahead, also when that is changed later."""
    library = made.folder / "clock.so"
    if not library.exists():
        (made.folder / "clock.c").write_text(_SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, made.folder / "clock.c", "-ldl"], check=True)
    _set_clock(made, seconds)
    return {"LD_PRELOAD": str(library), "DRILL_CLOCK": str(made.folder / "clock")}


def _shift_clock(made: Deployment, name: str, seconds: int, *, later: bool = False) -> str:
    site = made.sites[name]
    made.stop_site(name)
    more = _clock(made, 0 if later else seconds)
    made.start_site(name, more=more)
    if later:
        made.wait_for_joined(name)
    run = made.start_run(rounds=5, cohort__join_timeout_s=20)
    made.wait_for_round(2, run=run)
    _set_clock(made, seconds)
    assert wait_until(lambda: "this machine's clock is" in site.last_line, 90), site.last_line
    said = site.last_line
    _set_clock(made, 0)
    assert site.is_running(), site.last_line
    return f"{said!r}; set right: {expect_end_or_resume(made, run)}"
