"""What a security officer reads of a choice, and what the site's own pages say after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from client.__main__ import app
from client.protocol.approvals import Approvals
from common.model.backbones import open_backbones
from common.offers import Offer, list_digests, make_offer
from common.yaml import write_yaml
from tests.server.choice.test_votes import choice_config, choose, declare
from tests.tiny import site_config


@pytest.fixture(scope="module")
def offer() -> Offer:
    run = choice_config()
    opened = open_backbones(run)
    return Offer(make_offer(run, opened), list_digests(opened))


def approve(folder: Path, offer: Offer, size: int = 40, **changes: Any) -> Result:
    """`site approve` at a site with a waiting choice."""
    site = declare(site_config(folder, "north", **changes), size)
    write_yaml(folder / "site.yaml", site)
    Approvals(site.coordinator_dir).wait(offer)
    return CliRunner().invoke(app, ["approve", str(folder / "site.yaml"), "tiny"])


def test_the_officer_sees_candidates_digests_and_the_price(tmp_path: Path, offer: Offer) -> None:
    result = approve(tmp_path, offer)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for name, digest in offer.backbones.items():
        assert f"{name} (identity) {digest}" in text
    for said in ("colour (classification)", "on 2 backbones, by scorer ridge: only the number of one of them leaves"):
        assert said in text
    assert "pure epsilon 8 per example (add_remove), whatever the number of candidates; 8 of 100 then spent" in text
    assert "solver" not in text and "approved by" in text


def test_what_would_be_declined_is_not_approved(tmp_path: Path, offer: Offer) -> None:
    for place, (changes, said) in enumerate(
        [
            ({"budget": {"epsilon": 2.0, "delta": 1e-5}}, "the largest epsilon that fits is 0."),
            ({"allow": {"tasks": ["size"], "backbones": "any", "solvers": "any"}}, "no task colour"),
            ({"allow": {"tasks": "any", "backbones": ["d" * 64], "solvers": "any"}}, "is not allowed here"),
        ]
    ):
        (folder := tmp_path / str(place)).mkdir()
        result = approve(folder, offer, **changes)
        assert result.exit_code != 0 and said in result.output, result.output
        assert "Traceback" not in result.output


def test_a_site_that_will_not_be_asked_reads_so(tmp_path: Path, offer: Offer) -> None:
    result = approve(tmp_path, offer, size=28)
    assert "none: this site will not be asked; 29 declared units are needed, this site declares 28" in result.stdout


def test_the_log_and_the_budget_show_the_vote(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north")
    write_yaml(tmp_path / "site.yaml", site)
    choose(tmp_path / "run", [site])

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, [words[0], str(tmp_path / "site.yaml"), *words[1:]])
        assert result.exit_code == 0, result.output
        return result.stdout

    (release,) = json.loads(run("log", "--json"))["releases"]
    assert (release["run"], release["round"], release["mechanism"]["kind"]) == ("choice-1", 1, "exponential")
    shown = "".join(run("log").split()).replace("│", "")
    assert "│vote│" in "".join(run("log").split()) and "exponential" in shown and "epsilon8" in shown
    account = json.loads(run("budget", "--json"))
    assert (account["spent_epsilon"], account["earmarks"], account["affordable"]) == (8.0, [], None)
    assert "8" in run("budget")
