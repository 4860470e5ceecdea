"""A site's own report: of its own records, from its own journals, and never to leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.log import statement
from client.ledger.place import locate_ledgers
from client.personal.evaluate import compare
from client.personal.report import evaluate_run, list_site_answers, make_site_page, show_budget, show_sent
from client.protocol.purge import purge
from client.protocol.site import Site
from common.events import FEDERATED, read_site_journal
from common.privacy.accounting import compute_epsilon
from common.privacy.noise import os_entropy
from common.report.page import ReportPage, Section, write_report
from common.types import BadInput
from common.yaml import write_yaml
from headwater.__main__ import make_app
from tests.client.personal.test_evaluate import federated
from tests.tiny import site_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteConfig]:
    yield federated(tmp_path_factory.mktemp("federation"))


def make_page(config: SiteConfig, run_id: str | None = None) -> ReportPage:
    return make_site_page(Site(config, os_entropy), run_id, lambda *_: None)


def find(page: ReportPage, heading: str) -> Section:
    return next(section for section in page.sections if section.heading == heading)


def test_the_first_line_says_that_it_must_not_leave(config: SiteConfig) -> None:
    text = write_report(make_page(config))
    body = text[text.index("<body>") + len("<body>") :].lstrip()
    assert body.startswith('<p class="notice">This page must not leave the site')
    assert "<script" not in text


def test_its_results_are_those_of_the_site_s_own_command(config: SiteConfig) -> None:
    site = Site(config, os_entropy)
    before, sent = site.ledger().spent(), read_site_journal(config.state_dir / "site.jsonl")
    run, compared = evaluate_run(site, None), compare(site)
    assert site.ledger().spent() == before and read_site_journal(config.state_dir / "site.jsonl") == sent
    assert run.run_id == "run-1" and run.num_held_out == compared.num_held_out
    assert {name: own[FEDERATED] for name, own in run.estimates.items()} == {
        name: own[FEDERATED] for name, own in compared.tasks.items()
    }
    for name, outcomes in run.outcomes.items():
        (table,) = outcomes.confusions
        right, everything = sum(row[at] for at, row in enumerate(table.counts)), sum(map(sum, table.counts))
        assert right / everything == pytest.approx(run.estimates[name][FEDERATED]["accuracy"].value)
    words = {answer.word for answer in list_site_answers(run)}
    assert len(list_site_answers(run)) == 4 and words <= {"Yes", "No", "Cannot be told"}


def test_the_budget_s_line_ends_at_what_the_ledger_says(config: SiteConfig) -> None:
    ledger = Ledger.find(locate_ledgers(config), config.registry)
    assert ledger is not None
    section = show_budget(config, ledger.lines())
    expected = compute_epsilon([each.mechanism for each in statement(config).releases if each.mechanism], 1e-5)
    assert f"epsilon {expected:.2f}"[:10] in section.remarks[0]
    assert section.tables[0].rows[0][:3] == ("run-1", "4", "0") and section.figures


def test_all_releases_of_the_run_are_listed(config: SiteConfig) -> None:
    section = show_sent(statement(config), config, "run-1")
    assert [row[1] for row in section.tables[0].rows] == ["1", "2", "3", "4"]
    assert "0.5 times the bound" in section.tables[0].rows[0][3]
    assert not show_sent(statement(config), config, None).tables


def test_a_run_that_the_site_did_not_join_is_refused(config: SiteConfig) -> None:
    with pytest.raises(BadInput, match="--run other: this site did not join the run"):
        make_page(config, "other")


def test_what_cannot_be_evaluated_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    config = federated(tmp_path)
    purge(Site(config, os_entropy), ["row-0"])
    page = make_page(config)
    assert page.answers[0].word == "Not known" and "There are no results to show" in page.answers[0].sentence
    assert find(page, "Budget over time").figures
    write_report(page)


def test_a_site_that_joined_nothing_has_a_page_that_says_so(tmp_path: Path) -> None:
    page = make_page(site_config(tmp_path, "new"))
    assert page.answers[0].sentence == "This site has joined no run yet."
    assert "Nothing was charged" in find(page, "Budget over time").lead
    write_report(page)


def test_the_command_writes_the_page_and_refuses_what_does_not_go_together(config: SiteConfig, tmp_path: Path) -> None:
    file, out = tmp_path / "site.yaml", tmp_path / "report.html"
    write_yaml(file, config)
    runner, app = CliRunner(), make_app()
    done = runner.invoke(app, ["report", "--site", str(file), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "must not leave the site" in out.read_text(encoding="utf-8")
    assert out.stat().st_mode & 0o077 == 0, "for its owner's eyes"
    for arguments, said in (
        (["report"], "expected folders of runs"),
        (["report", str(tmp_path), "--site", str(file)], "expected folders of runs"),
        (["report", str(tmp_path), "--run", "a"], "expected --site"),
        (["report", "--site", str(file), "--run", "a"], "did not join"),
        (["report", "--site", str(tmp_path / "no.yaml")], "no such file"),
        (["report", str(tmp_path)], "no journal.jsonl"),
        (["report", "--site", str(file), "--out", str(tmp_path / "no" / "r.html")], "can be written"),
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.stderr, (arguments, done.stderr)
