"""While a site encodes, its journal, its log and its page say how far it is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from client.__main__ import app
from client.ledger.log import statement
from client.monitoring.state import SiteCounts
from client.protocol.join import join
from client.protocol.prepare import EVERY_S, FIRST_S, JournalledEncoding
from client.protocol.site import Site
from common.events import EncodingContinues, RunPrepared, read_site_journal, select_events
from common.privacy.noise import os_entropy
from tests.tiny import backbone, give_backbone, offered, run_config, site_config, write_records


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def encode_for(site: Site, seconds: int) -> list[EncodingContinues]:
    """Encodes ten records a second for so long, after 500 that were encoded before an interruption."""
    clock = Clock()
    progress = JournalledEncoding(site, "run-1", clock)
    for second in range(seconds + 1):
        clock.now = float(second)
        progress(500 + 10 * second, 7000)
    return select_events(read_site_journal(site.config.state_dir / "site.jsonl"), EncodingContinues)


def test_a_long_encoding_is_journalled_once_a_minute_and_a_short_one_never(tmp_path: Path) -> None:
    site = Site(site_config(tmp_path, "north"), os_entropy)
    assert encode_for(site, int(FIRST_S) - 1) == []
    events = encode_for(site, 200)
    assert [event.num_done for event in events] == [
        500 + 10 * second for second in range(int(FIRST_S), 201, int(EVERY_S))
    ]
    assert {event.rate for event in events} == {10.0}, "the rate of this process, not of what was kept"


def test_the_log_and_the_page_say_how_far_it_is_until_the_run_is_prepared(tmp_path: Path) -> None:
    config = site_config(tmp_path, "north")
    site = Site(config, os_entropy)
    encode_for(site, 80)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    shown = CliRunner().invoke(app, ["log", str(tmp_path / "site.yaml")])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "encoding for run run-1: 1,200 of 7,000 records, 10 a second, about 10 min left" in text
    counts = SiteCounts()
    for event in read_site_journal(config.state_dir / "site.jsonl"):
        counts.add(event)
    (line,) = [line for _, line in counts.recent]
    assert line == "run run-1: encoding, 17 % of a source, about 10 min left", "a page has no number of records"
    site.journal.write(RunPrepared(run_id="run-1", num_left_out=0))
    assert statement(config).encoding is None


def test_a_full_disk_stops_no_encoding(tmp_path: Path) -> None:
    site = Site(site_config(tmp_path, "north"), os_entropy)
    site.config.state_dir.mkdir(parents=True, exist_ok=True)
    (site.config.state_dir / "site.jsonl").mkdir()  # Nothing can be appended to it.
    told: list[tuple[int, int]] = []
    watched = Site(site.config, os_entropy, lambda done, total: told.append((done, total)))
    clock = Clock()
    progress = JournalledEncoding(watched, "run-1", clock)
    for clock.now in (0.0, 100.0):
        progress(int(clock.now), 200)
    assert told == [(0, 200), (100, 200)]


@pytest.mark.slow
def test_a_preparation_writes_its_progress(tmp_path: Path) -> None:
    told: list[int] = []

    def wait(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:  # The first begins the encoding's clock.
            time.sleep(FIRST_S + 0.5)

    write_records(tmp_path / "north.npz", seed=1, count=300)  # More records than are encoded at once.
    site = Site(site_config(tmp_path, "north"), os_entropy, wait)
    join(site, offered("run-1", run_config(), backbone()))
    give_backbone(site, "run-1", backbone())
    events = read_site_journal(site.config.state_dir / "site.jsonl")
    encoding = select_events(events, EncodingContinues)[0]
    assert encoding.run_id == "run-1" and 0 < encoding.num_done < encoding.num_records
