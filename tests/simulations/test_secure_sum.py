"""Simulations of secure sums: keys and rosters are made by themselves, and each site adds a share of the noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from common.run import RunConfig
from common.serving.means import read_means
from common.types import BadInput
from common.yaml import load
from simulations.config import SimulationConfig
from simulations.experiment import run, write_files

SECURE = ["run.trust=secure_sum", "run.colluding=1", "run.cohort.min_sites=3"]
SUM = ['run.solver={"kind": "head_sum", "clip_norm": 1.0}']


def read_charges(folder: Path, site: str) -> list[tuple[float, int | None, int | None]]:
    config = load(SiteConfig, folder / "sites" / site / "site.yaml")
    ledger = Ledger.find(locate_ledgers(config), config.registry)
    assert ledger is not None
    mechanisms = [charge.mechanism for charge in ledger.charges()]
    return [(each.noise_share, each.min_sites, each.colluding) for each in mechanisms]


def test_a_simulation_sums_securely(simulation_file: Path, tmp_path: Path) -> None:
    summary = run(simulation_file, out=tmp_path / "out", overrides=[*SECURE, *SUM])
    assert summary.status == "completed"
    assert read_charges(tmp_path / "out", "site-1") == [(pytest.approx(2**-0.5), 3, 1)] * 3
    plain = run(simulation_file, out=tmp_path / "plain", overrides=SUM)
    # The price is that of the sum's whole noise, at each site.
    assert {name: site.epsilon for name, site in summary.sites.items()} == {
        name: site.epsilon for name, site in plain.sites.items()
    }


def test_auto_goes_with_secure_sums(simulation_file: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(simulation_file.read_text())
    del values["run"]["aggregation"]
    values["run"] |= {"solver": {"kind": "auto"}, "rounds": 2}
    simulation_file.write_text(yaml.safe_dump(values))
    assert run(simulation_file, out=tmp_path / "out", overrides=SECURE).status == "completed"
    assert len(read_means(tmp_path / "out")) == 3
    # The sums before the first round are each site's own, with its whole noise.
    share = pytest.approx(2**-0.5)
    assert read_charges(tmp_path / "out", "site-1") == [(1.0, None, None), (share, 3, 1), (share, 3, 1)]


def test_what_cannot_be_summed_securely_is_refused_before_anything_runs(simulation_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run\.solver\.kind: expected head_sum"):
        run(simulation_file, out=tmp_path / "a", overrides=SECURE)
    with pytest.raises(BadInput, match=r"run\.aggregation\.kind: .*needs only the sum"):
        run(simulation_file, out=tmp_path / "b", overrides=[*SECURE, *SUM, "run.aggregation.kind=median"])
    with pytest.raises(BadInput, match=r"run\.cohort\.min_sites: expected at most the 3 sites"):
        run(simulation_file, out=tmp_path / "c", overrides=[*SECURE, *SUM, "run.cohort.min_sites=4"])


def test_files_of_a_simulation_have_the_roster(simulation_file: Path, tmp_path: Path) -> None:
    sites = write_files(load(SimulationConfig, simulation_file, [*SECURE, *SUM]), tmp_path / "out")
    written = [load(SiteConfig, tmp_path / "out" / "sites" / site.name / "site.yaml").secure_sum for site in sites]
    assert len({section.digest for section in written if section is not None}) == 1
    assert load(RunConfig, tmp_path / "out" / "run.yaml").trust == "secure_sum"
