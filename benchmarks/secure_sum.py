"""Bytes and seconds of a round with and without a secure sum, from 3 to 50 sites.

    python -m benchmarks.secure_sum [SITES ...]

All sites run in this process, one after the other: the seconds are processor time of the whole federation's work,
without network, polling and intervals of `reply_every_s`. Bytes are those of Flower's own encoding for one site, as the
run's journal has them. The last lines are the arithmetic alone: what one site and what the coordinator compute.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.sites import simulation
from common.events import RoundEnded, read_run_journal, select_events
from common.secure_sum.attempt import (
    Member,
    SiteAttempt,
    accept_keys,
    accept_shares,
    accept_survivors,
    make_keys,
    make_shares,
    mask_vector,
    reveal_shares,
    sign_survivors,
)
from common.secure_sum.identity import format_public_key
from common.secure_sum.terms import SumRules, SumTerms
from common.secure_sum.unmasking import Collected, select_shares, unmask_sum
from simulations.config import SimulationConfig
from simulations.experiment import run

SITES = (3, 5, 10, 20, 50)
DIM, CLASSES = 256, 10
SHORT, LONG = 2, 8
"""Rounds of two runs: their difference is that of rounds alone."""
HEADS = "0" * 64


def make_config(folder: Path, sites: int, rounds: int, *, is_secure: bool) -> SimulationConfig:
    """Returns a federation of one linear head of 2,570 values."""
    folder.mkdir(parents=True)
    config = simulation(folder, sites, rounds=rounds, dim=DIM, classes=CLASSES)
    values = config.run.model_dump() | {
        "solver": {"kind": "head_sum", "clip_norm": 1.0},
        "aggregation": {"kind": "mean"},
        "cohort": {"min_sites": sites},
    }
    values |= {"trust": "secure_sum", "colluding": 1} if is_secure else {}
    return config.model_copy(update={"run": type(config.run).model_validate(values)})


def measure_rounds(folder: Path, sites: int, *, is_secure: bool) -> tuple[float, float, float]:
    """Returns the processor seconds of a round, and the bytes to and from one site."""
    seconds = {}
    for rounds in (SHORT, LONG):
        config = make_config(folder / f"in-{rounds}", sites, rounds, is_secure=is_secure)
        started = time.process_time()
        run(config, out=folder / f"out-{rounds}")
        seconds[rounds] = time.process_time() - started
    ended = select_events(read_run_journal(folder / f"out-{LONG}" / "journal.jsonl"), RoundEnded)
    updates = [update for each in ended for update in each.sites.values()]
    a_round = (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT)
    return a_round, median(each.bytes_down for each in updates), median(each.bytes_up for each in updates)


def measure_arithmetic(sites: int, num_values: int) -> tuple[float, float]:
    """Returns the seconds of one site's five steps, and of the coordinator's sum with a tenth of the sites lost."""
    keys = {f"site-{i:03d}": Ed25519PrivateKey.generate() for i in range(sites)}
    roster = {name: format_public_key(key) for name, key in keys.items()}
    terms = SumTerms("run", 1, 1, SumRules(max(2, sites // 2), 0), 30)
    members = {name: Member(name, key, roster) for name, key in keys.items()}
    states = {name: SiteAttempt(terms, name, os.urandom(32)) for name in keys}
    values = np.zeros(num_values, np.int64)
    started = time.process_time()
    listed = {name: make_keys(members[name], state) for name, state in states.items()}
    states = {name: accept_keys(members[name], state, listed) for name, state in states.items()}
    encrypted = {name: make_shares(state) for name, state in states.items()}
    states = {name: accept_shares(state, select_shares(encrypted, name), HEADS) for name, state in states.items()}
    masked = {name: mask_vector(state, values) for name, state in states.items()}
    for lost in list(masked)[: sites // 10]:
        del masked[lost]
    states = {name: accept_survivors(states[name], list(masked)) for name in masked}
    signed = {name: sign_survivors(members[name], state) for name, state in states.items()}
    revealed = {name: reveal_shares(members[name], state, signed) for name, state in states.items()}
    site_s = (time.process_time() - started) / sites
    started = time.process_time()
    total = unmask_sum(Collected(terms, listed, list(encrypted), HEADS, masked), revealed)
    assert not total.any()
    return site_s, time.process_time() - started


def main() -> None:
    """Prints one row of a table for each number of sites."""
    head = "| sites | CPU s a round, plain | secure | KB to a site, plain | secure | KB from a site, plain | secure |"
    print(head, "|---|---|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as place:
        run(make_config(Path(place) / "in", 3, SHORT, is_secure=True), out=Path(place) / "out")  # Imports.
    for sites in [int(each) for each in sys.argv[1:]] or SITES:
        with tempfile.TemporaryDirectory() as place:
            rows = []
            for is_secure in (False, True):
                folder = Path(place) / str(is_secure)
                folder.mkdir()
                rows.append(measure_rounds(folder, sites, is_secure=is_secure))
        (plain_s, plain_down, plain_up), (secure_s, secure_down, secure_up) = rows
        sizes = [f"{each / 1e3:.1f}" for each in (plain_down, secure_down, plain_up, secure_up)]
        print(f"| {sites} | {plain_s:.3f} | {secure_s:.3f} | {' | '.join(sizes)} |", flush=True)
    for sites in (5, 50):
        site_s, coordinator_s = measure_arithmetic(sites, CLASSES * (DIM + 1))
        ms = (1e3 * site_s, 1e3 * coordinator_s)
        print(f"{sites} sites: arithmetic of {ms[0]:.0f} ms at a site, {ms[1]:.0f} ms at the coordinator")


if __name__ == "__main__":
    main()
