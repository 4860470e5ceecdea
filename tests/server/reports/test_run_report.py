"""A run's report: each number is of its journal, each section says what it shows or why it shows nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from common.events import (
    AcceptedUpdate,
    BackboneFacts,
    BackboneSent,
    BaselineEvaluated,
    ConfusionCounts,
    EpsilonSpent,
    Event,
    FileJournal,
    HeadsEvaluated,
    MetricsEvaluated,
    NoisedMetrics,
    Outcomes,
    RoundEnded,
    RoundEvaluated,
    RunEnded,
    RunFailure,
    RunInterruption,
    RunStarted,
    ScoreCounts,
    SiteJoined,
    SiteRejected,
)
from common.privacy.accounting import Mechanism, compute_epsilon
from common.report.judgement import judge_difference
from common.report.page import Section, write_report
from common.types import BadInput, Plan, Unit
from server.reports.answers import list_answers
from server.reports.comparison import make_comparison_page, name_runs
from server.reports.conduct_sections import show_left_out, show_participation, show_privacy, trace_participation
from server.reports.reported_run import ReportedRun, read_run, read_runs, trace_epsilons
from server.reports.run_report import list_notices, make_run_page

PLAN = Plan(1.0, 3, 1.0, 20.0, Unit.PATIENT)
SITES = ("north", "east", "late", "away")


def make_events(*, executor: str = "in_process", difference: tuple[float, float] = (0.02, 0.1)) -> list[Event]:
    """Two rounds: east declines the second, late answers the first too late, away never joins."""

    def update(round_: int | None = None) -> AcceptedUpdate:
        return AcceptedUpdate(bytes_down=1000, bytes_up=2000, plan=PLAN, round=round_)

    table = ConfusionCounts(names=("no", "yes"), counts=((8.0, 2.0), (3.0, 7.0)))
    scores = ScoreCounts(label="yes", edges=(0.3, 0.6), positives=(1.0, 2.0, 7.0), negatives=(6.0, 3.0, 1.0))
    noised = NoisedMetrics(metrics={"accuracy": 0.7}, standard_errors={"accuracy": 0.05}, sites=("north",))
    facts = BackboneFacts(kind="identity", digest="ab" * 32, tasks=("finding",))
    return [
        RunStarted(
            run_id="run-1",
            name="story",
            executor=executor,
            rounds=2,
            tasks={"finding": "classification"},
            backbones={"backbone": facts},
        ),
        *(
            SiteJoined(site=site, tasks={"finding": 100}, unit=Unit.PATIENT, delta=1e-5, budget_epsilon=10.0)
            for site in SITES[:3]
        ),
        SiteRejected(site="away", reason="declined: not_approved", stage="join"),
        BackboneSent(site="north", backbone="backbone", size_bytes=5 << 20),
        RoundEnded(
            round=1,
            sites={"north": update(), "east": update()},
            num_updates={"finding": 2},
            updated=("finding",),
            seconds=1.5,
        ),
        SiteRejected(site="late", reason="no reply before the time-out", stage="train", round=1),
        RoundEnded(
            round=2,
            sites={"north": update(), "late": update(1)},
            num_updates={"finding": 2},
            updated=("finding",),
            seconds=2.5,
        ),
        SiteRejected(site="east", reason="declined: budget", stage="train", round=2),
        HeadsEvaluated(
            round=2,
            tasks={"finding": noised},
            noise_multipliers={"north": 4.0},
            rejected={"late": "declined: evaluation_local"},
        ),
        RunEnded(updates={"finding": 2}, heads="cd" * 32, num_received=3, num_sites=3),
        *(
            []
            if executor == "deployment"
            else [
                RoundEvaluated(round=1, task="finding", pooled={"accuracy": 0.6}),
                RoundEvaluated(round=2, task="finding", pooled={"accuracy": 0.75}),
                MetricsEvaluated(
                    task="finding",
                    pooled={"accuracy": 0.75},
                    per_site={"north": {"accuracy": 0.75}},
                    pooled_intervals={"accuracy": (0.7, 0.8)},
                    per_site_intervals={"north": {"accuracy": (0.6, 0.9)}},
                    outcomes=Outcomes(confusions=(table,), scores=(scores,), probabilities=True),
                ),
                BaselineEvaluated(
                    name="local",
                    metrics={"finding": {"accuracy": 0.69}},
                    seconds=3.0,
                    intervals={"finding": {"accuracy": (0.65, 0.73)}},
                    differences={"finding": {"accuracy": difference}},
                ),
            ]
        ),
    ]


def write_run(folder: Path, events: Sequence[Event]) -> Path:
    """A folder with a journal of these events."""
    journal = FileJournal(folder / "journal.jsonl")
    for event in events:
        journal.write(event)
    return folder


@pytest.fixture
def story(tmp_path: Path) -> ReportedRun:
    return read_run(write_run(tmp_path / "run-1", make_events()))


def find(sections: Sequence[Section], heading: str) -> Section:
    return next(section for section in sections if section.heading == heading)


@pytest.mark.parametrize(
    ("interval", "is_error", "expected"),
    [
        ((0.01, 0.2), False, "better"),
        ((-0.2, -0.01), False, "worse"),
        ((-0.01, 0.2), False, "not distinguishable"),
        ((0.01, 0.2), True, "worse"),
        ((-0.2, -0.01), True, "better"),
        ((0.0, 0.2), False, "not distinguishable"),
        (None, False, "unknown"),
    ],
)
def test_nothing_is_called_better_whose_interval_holds_zero(
    interval: tuple[float, float] | None, is_error: bool, expected: str
) -> None:
    assert judge_difference(interval, is_error=is_error) == expected


@pytest.mark.parametrize(
    ("difference", "word"), [((0.02, 0.1), "Yes"), ((-0.02, 0.1), "Cannot be told"), ((-0.1, -0.02), "No")]
)
def test_the_box_says_what_the_interval_says(tmp_path: Path, difference: tuple[float, float], word: str) -> None:
    run = read_run(write_run(tmp_path / "r", make_events(difference=difference)))
    first = list_answers(run)[0]
    assert first.word == word and "0.750 (0.700 to 0.800)" in first.sentence and "0.690" in first.sentence


def test_an_older_journal_without_intervals_concludes_nothing(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", make_events()))
    for line in (run.folder / "journal.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name in ("differences", "intervals", "pooled_intervals", "per_site_intervals", "outcomes", "errors"):
            if values["event"] != "evaluation" or name == "outcomes":
                values.pop(name, None)
        with (tmp_path / "old.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
    (run.folder / "journal.jsonl").write_bytes((tmp_path / "old.jsonl").read_bytes())
    page = make_run_page(read_run(run.folder))
    assert page.answers[0].word == "Not known"
    assert find(page.sections, "Mistakes, ranking and probabilities").lead.startswith("There are no counts")
    write_report(page)


def test_the_grid_says_who_took_part_when(story: ReportedRun) -> None:
    assert trace_participation(story) == {
        "north": ["took part", "took part"],
        "east": ["took part", "declined"],
        "late": ["not used", "late"],
        "away": ["no part", "no part"],
    }
    table = show_participation(story).tables[0]
    assert ["late", "1", "0", "1", "1", "0", "0"] in [list(row) for row in table.rows]


def test_epsilon_over_the_rounds_is_that_of_all_releases_so_far(story: ReportedRun) -> None:
    training, evaluation = Mechanism.of(PLAN), Mechanism("gaussian", 4.0, 1.0, 1, 1.0)
    expected = [(1, compute_epsilon([training], 1e-5)), (2, compute_epsilon([training, training, evaluation], 1e-5))]
    assert trace_epsilons(story)["north"] == [(at, pytest.approx(value)) for at, value in expected]
    assert trace_epsilons(story)["north"][-1][1] == pytest.approx(story.summary.sites["north"].epsilon)
    assert [at for at, _ in trace_epsilons(story)["late"]] == [2]


def test_every_section_begins_with_a_sentence_and_every_figure_has_a_table(story: ReportedRun) -> None:
    page = make_run_page(story)
    assert [section.heading for section in page.sections if not section.lead.endswith(".")] == []
    assert [section.heading for section in page.sections if len(section.figures) > 0 and not section.tables] == []
    shown = {section.heading for section in page.sections if section.figures}
    assert shown == {
        "Results on held-out records",
        "Site by site",
        "Learning over the rounds",
        "Which mistakes were made",
        "How well records are ranked",
        "Can the probabilities be believed?",
        "Privacy spent",
        "Who took part when",
        "Time and traffic",
    }
    rejected = find(page.sections, "Replies that were not used").tables[0].rows
    assert ("east", "train", "declined: budget (its budget does not cover what was asked)", "2") in rejected
    assert ("late", "evaluation", "declined: evaluation_local (it evaluates for itself only)", "2") in rejected


def test_a_deployed_run_says_what_a_coordinator_cannot_know(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", make_events(executor="deployment")))
    page = make_run_page(run)
    assert page.answers[0].word == "Not known here" and "0.700" in page.answers[0].sentence
    assert "stays at the site" in show_left_out(run).lead
    text = write_report(page)
    assert "headwater report --site SITE.yaml" in text and "all in one place" not in text


def test_a_run_that_failed_or_has_not_ended_says_so_first(tmp_path: Path) -> None:
    begun = make_events()[:7]
    ends: dict[str, list[Event]] = {
        "has not ended": [],
        "failed: the disk is full": [RunFailure(reason="the disk is full")],
        "interrupted: east is away": [RunInterruption(reason="east is away.")],
    }
    for number, (said, events) in enumerate(ends.items()):
        run = read_run(write_run(tmp_path / str(number), [*begun, *events]))
        assert said in list_notices(run)[0]
        text = write_report(make_run_page(run))
        assert text.index(said) < text.index("<h1>")


def test_a_run_without_a_round_has_a_page_too(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", [*make_events()[:1], RunFailure(reason="no site joined")]))
    page = make_run_page(run)
    assert all(not section.figures for section in page.sections)
    assert "no site joined" in write_report(page)


def test_a_run_without_privacy_promises_none(tmp_path: Path) -> None:
    plan = Plan(1.0, 3, None, 0.0, Unit.PATIENT)
    events = [
        each.model_copy(
            update={"sites": {name: own.model_copy(update={"plan": plan}) for name, own in each.sites.items()}}
        )
        if isinstance(each, RoundEnded)
        else each
        for each in make_events()
        if not isinstance(each, HeadsEvaluated)
    ]
    section = show_privacy(read_run(write_run(tmp_path / "r", events)))
    assert "not private" in section.lead and section.figures == []
    assert section.tables[0].rows[2][1] == "not private"


def test_names_of_tasks_sites_and_reasons_are_no_markup(tmp_path: Path) -> None:
    text = "\n".join(event.model_dump_json() for event in make_events())
    hostile = "<script>x</script>"
    events = [
        type(event).model_validate_json(
            event.model_dump_json().replace('"north"', f'"{hostile}"').replace('"finding"', f'"{hostile}"')
        )
        for event in make_events()
    ]
    assert hostile not in text
    page = write_report(make_run_page(read_run(write_run(tmp_path / "r", events))))
    assert "<script" not in page and page.count("&lt;script&gt;") > 20


def test_several_runs_are_compared_by_their_intervals_and_named_by_what_differs(tmp_path: Path) -> None:
    runs = []
    for number, epsilon in enumerate(("1.0", "3.0")):
        folder = write_run(tmp_path / f"run-{number}", make_events())
        (folder / "config.yaml").write_text(
            f"run: {{seed: 1, privacy: {{target_epsilon: {epsilon}}}}}\nruns_dir: x{number}\n"
        )
        runs.append(read_run(folder))
    page = make_comparison_page(runs)
    assert page.answers[0].word == "Cannot be told"
    text = write_report(page)
    assert "target_epsilon 1.0" in text and "target_epsilon 3.0" in text and "runs_dir" not in text
    learning = find(page.sections, "Learning over the rounds")
    assert learning.figures[0].svg.count("target_epsilon") == 2, "both curves lie in one figure"


def test_runs_of_the_same_settings_show_how_far_noise_moves_them(tmp_path: Path) -> None:
    runs = []
    for seed, value in ((1, 0.7), (2, 0.8), (3, 0.9)):
        folder = write_run(tmp_path / str(seed), make_events())
        (folder / "config.yaml").write_text(f"run: {{seed: {seed}}}\npartition: {{seed: {seed}}}\n")
        run = read_run(folder)
        events = [
            each.model_copy(update={"pooled": {"accuracy": value}}) if isinstance(each, MetricsEvaluated) else each
            for each in run.events
        ]
        runs.append(replace(run, events=events))
    section = find(make_comparison_page(runs).sections, "How far noise moves the result")
    assert list(section.tables[0].rows[0])[-3:] == ["0.800", "0.100", "3"]


def test_a_run_without_its_settings_is_compared_too(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / str(number), make_events())) for number in range(2)]
    (tmp_path / "0" / "config.yaml").write_text("run: {seed: 1}\npartition: {seed: 1}\n")
    names = name_runs([read_run(runs[0].folder), runs[1]])
    assert len(set(names)) == 2


def test_a_journal_whose_line_of_a_joined_site_is_damaged_has_a_page(tmp_path: Path) -> None:
    events = [*make_events(), EpsilonSpent(site="gone", epsilon=1.0)]
    make_run_page(read_run(write_run(tmp_path, events)))


def test_a_sweep_s_folder_stands_for_its_runs(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path / f"00{number}", make_events())
    (tmp_path / "sweep.csv").write_text("seed\n")
    assert [run.folder.name for run in read_runs([tmp_path])] == ["000", "001", "002"]


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(BadInput, match=r"found no journal\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "journal.jsonl").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(BadInput, match="no event in it that can be read"):
        read_run(tmp_path)
    (tmp_path / "journal.jsonl").unlink()
    write_run(tmp_path, make_events()[1:3])
    with pytest.raises(BadInput, match="not the beginning of a run"):
        read_run(tmp_path)


def test_a_journal_torn_in_its_last_line_is_read_until_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", make_events())
    path = folder / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-200])
    assert len(read_run(folder).events) == len(make_events()) - 1


def test_the_coordinator_s_report_loads_no_torch(tmp_path: Path) -> None:
    folder, out = write_run(tmp_path / "r", make_events()), tmp_path / "report.html"
    code = (
        "import sys; from headwater.__main__ import make_app\n"
        f"make_app()(['report', {str(folder)!r}, '--out', {str(out)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'flwr', 'pandas', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "Report of run story" in text
    assert re.search(r"<svg", text) and len(text) < 1_000_000


def test_what_a_resumed_run_made_again_stands_there_once(tmp_path: Path) -> None:
    events = make_events()
    baseline = next(each for each in events if isinstance(each, BaselineEvaluated))
    again = baseline.model_copy(update={"metrics": {"finding": {"accuracy": 0.5}}})
    page = make_run_page(read_run(write_run(tmp_path / "r", [*events, again])))
    rows = find(page.sections, "Results on held-out records").tables[0].rows
    assert [row[0] for row in rows] == ["federated, private", "a site alone, private"] and "0.500" in rows[1][1]
