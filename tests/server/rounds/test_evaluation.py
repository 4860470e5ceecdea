"""Noised evaluations at the coordinator: checked, added up over sites, journalled, and told apart in every report."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from rich.console import Console

from client.protocol.site import FINAL_HEADS
from common import messages
from common.events import HeadsEvaluated, RunEvent, Summary, select_events
from common.privacy.accounting import Mechanism, compute_epsilon
from common.run import ONLY_BACKBONE
from common.serving.folder import read_config
from common.tasks import NOISED_BUCKETS, open_task
from common.tasks.parts.calibration import make_released_statistic
from common.types import BadInput
from server.reports.results import write_results
from server.reports.summary import summarize
from server.reports.tables import render_summary
from server.rounds.checkpoint import load_checkpoint
from server.rounds.evaluation import SiteRelease, check_evaluation, compute_metrics, count_outcomes, is_readable
from tests.server.rounds.test_loop import federate
from tests.tiny import TASKS, backbone, forged, run_config, site_config

SHARE = {"share": 0.5, "evaluations": 2}
RICH = {"epsilon": 200.0, "delta": 1e-5}
COLOUR = {"colour": open_task(TASKS["colour"], "colour")}
STATISTIC = COLOUR["colour"].statistic(NOISED_BUCKETS)


def evaluations(events: list[RunEvent]) -> list[RunEvent]:
    return select_events(events, HeadsEvaluated)


def test_evaluations_come_after_the_rounds_that_the_run_names_and_the_last(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation={"share": 0.5, "evaluations": 5}, budget=RICH)
    _, events = federate(tmp_path / "run", [site], rounds=5, evaluation={"every": 2})
    assert [event.round for event in evaluations(events)] == [2, 4, 5]
    assert all(set(event.tasks) == {"colour", "size"} for event in evaluations(events))


def test_without_the_setting_nobody_is_asked(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE)
    _, events = federate(tmp_path / "run", [site])
    assert evaluations(events) == []
    assert summarize(events).tasks["colour"].evaluation is None


def test_sites_that_do_not_evaluate_are_named_and_stay_whole_members(tmp_path: Path) -> None:
    once = {"share": 0.1, "evaluations": 1}
    sites = [
        site_config(tmp_path, "east", evaluation=SHARE, budget=RICH),
        site_config(tmp_path, "north"),
        site_config(tmp_path, "west", evaluation=once, budget=RICH),
    ]
    _, events = federate(tmp_path / "run", sites, evaluation={"every": 1})
    first, last = evaluations(events)
    assert first.rejected == {"north": "declined: evaluation_local"}
    assert last.rejected == {"north": "declined: evaluation_local", "west": "declined: budget"}
    assert last.tasks["size"].sites == ("east",)
    summary = summarize(events)
    assert {name: (site.status, site.evaluations) for name, site in summary.sites.items()} == {
        "east": ("completed", 2),
        "north": ("completed", 0),
        "west": ("completed", 1),
    }


def test_epsilon_of_a_site_holds_its_evaluations_too(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE)
    _, events = federate(tmp_path / "run", [site], evaluation={"every": 1})
    noise = evaluations(events)[0].noise_multipliers["north"]
    together = [Mechanism("gaussian", 2.0, 1.0, 4, 1.0), Mechanism("gaussian", noise, 1.0, 2, 1.0)]
    assert summarize(events).sites["north"].epsilon == pytest.approx(compute_epsilon(together, 1e-5))


Distort = Callable[[messages.EvaluateReply], messages.EvaluateReply]


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Distort:
    return lambda reply: messages.EvaluateReply(
        {task: {name: change(array) for name, array in sums.items()} for task, sums in reply.sums.items()},
        reply.noise_multiplier,
    )


@pytest.mark.parametrize(
    ("distort", "said"),
    [
        (changed(lambda array: array * np.float32("nan")), "finite"),
        (changed(lambda array: array[:-1]), "statistics"),
        (changed(lambda array: array[None]), "statistics"),
        (lambda reply: messages.EvaluateReply({"colour": reply.sums["colour"]}, reply.noise_multiplier), "tasks"),
        (lambda reply: forged(messages.EvaluateReply, reply.sums, float("inf"), reply.witness), "noise_multiplier"),
        (lambda reply: forged(messages.EvaluateReply, reply.sums, 0.0, reply.witness), "noise_multiplier"),
        (lambda reply: messages.Ready(), "another kind"),
    ],
)
def test_a_bad_evaluation_is_left_out_and_the_others_count(tmp_path: Path, distort: Any, said: str) -> None:
    def bad(records: RecordDict) -> RecordDict:
        return messages.encode(distort(messages.decode(records, messages.EvaluateReply)))

    sites = [site_config(tmp_path, name, evaluation=SHARE) for name in ("east", "north")]
    _, events = federate(
        tmp_path / "run", sites, faulty_site="north", distort=bad, kind=messages.EVALUATE, evaluation={"every": 2}
    )
    (found,) = evaluations(events)
    assert found.tasks["colour"].sites == ("east",)
    assert said in found.rejected["north"]
    assert events[-1].updates == {"colour": 2, "size": 2}


def reply_of(sums: torch.Tensor, noise: float) -> messages.EvaluateReply:
    scaled = (sums / STATISTIC.bound).numpy().astype(np.float32)
    return messages.EvaluateReply({"colour": {"sums": scaled}}, noise)


def some_counts(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    outputs = torch.randn(count, 3, generator=generator) + torch.nn.functional.one_hot(labels, 3)
    return STATISTIC.rows(outputs, labels).sum(dim=0)


def test_sums_of_several_sites_are_those_of_all_their_units() -> None:
    parts = [some_counts(60, 1), some_counts(500, 2)]
    releases = [SiteRelease(name, reply_of(part, 1e-9)) for name, part in zip(("a", "b"), parts, strict=True)]
    result = compute_metrics(COLOUR, releases, seed=0)["colour"]
    assert result.metrics == pytest.approx(STATISTIC.values(parts[0] + parts[1]), rel=1e-5)
    assert result.sites == ("a", "b")
    assert all(error is not None and error < 1e-6 for error in result.standard_errors.values())


def test_the_standard_error_is_that_of_repeated_releases() -> None:
    """What a site's noise would do to accuracy, by drawing it again and again; two sites' noises add in variance."""
    sums, noises = some_counts(400, 3), (4.0, 3.0)
    rng = np.random.default_rng(0)
    seen: list[dict[str, float]] = []
    for _ in range(400):
        noise = sum(rng.normal(size=len(sums)) * each for each in noises) * STATISTIC.bound
        seen.append(STATISTIC.values(sums + torch.from_numpy(np.asarray(noise))))
    releases = [SiteRelease("a", reply_of(sums, noises[0])), SiteRelease("b", reply_of(0 * sums, noises[1]))]
    stated = compute_metrics(COLOUR, releases, seed=1)["colour"].standard_errors
    for name in ("accuracy", "balanced_accuracy", "auroc"):
        assert stated[name] == pytest.approx(float(np.std([each[name] for each in seen])), rel=0.25)


def test_two_tasks_in_one_release_have_the_noise_of_both() -> None:
    own = messages.EvaluateReply({"a": {"sums": np.zeros(1)}, "b": {"sums": np.zeros(1)}}, 3.0)
    assert SiteRelease("north", own).noise_std == pytest.approx(3.0 * math.sqrt(2))


def test_a_reply_is_checked_against_the_sites_own_tasks() -> None:
    check_evaluation(reply_of(some_counts(5, 0), 1.0), COLOUR)
    with pytest.raises(BadInput, match="another set"):
        check_evaluation(reply_of(some_counts(5, 0), 1.0), {"size": COLOUR["colour"]})
    # Its square is no number: the run of all others would end.
    with pytest.raises(BadInput, match="expected noise of at most"):
        check_evaluation(reply_of(some_counts(5, 0), 1e200), COLOUR)
    compute_metrics(COLOUR, [SiteRelease("north", reply_of(some_counts(5, 0), 1e9))], seed=1)


def test_the_report_tells_noised_results_from_everything_else(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE)
    _, events = federate(tmp_path / "run", [site], evaluation={"every": 1})
    summary = summarize(events)
    found = summary.tasks["colour"].evaluation
    assert [each.round for each in found.rounds] == [1, 2] and found.round == 2
    assert set(found.metrics) == set(found.standard_errors) == set(STATISTIC.values(torch.zeros(STATISTIC.size)))
    assert summary.tasks["colour"].metrics == {}  # The coordinator sees nothing but what was released.
    assert Summary.model_validate_json(summary.to_json()) == summary
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render_summary(summary))
    assert "noised, charged" in shown.get()
    assert "simulator's own view" not in shown.get()


def test_a_calibrated_run_hands_out_a_temperature_with_the_heads(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE, budget={"epsilon": 1e4, "delta": 1e-5})
    changes: dict[str, Any] = {"evaluation": {"every": 1, "calibrate": True}}
    outcome, events = federate(tmp_path / "run", [site], **changes)
    found = evaluations(events)[-1].tasks
    temperature = found["colour"].calibration.temperature
    assert temperature > 0.0
    (path,) = tmp_path.glob(f"**/runs/run-1/{FINAL_HEADS}")
    sent = messages.decode(messages.from_bytes(path.read_bytes()), messages.FinishRequest)
    assert sent.temperatures == {"colour": temperature, "size": found["size"].calibration.temperature}
    summary = write_results(tmp_path / "run", run_config(**changes), {ONLY_BACKBONE: backbone()}, outcome.heads)
    assert summary.tasks["colour"].evaluation.calibration.temperature == temperature
    about = read_config(tmp_path / "run").tasks["colour"]
    assert about.temperature == temperature
    released = summary.tasks["colour"].evaluation
    assert about.metrics["accuracy"].value == released.metrics["accuracy"]
    assert about.metrics["accuracy"].standard_error == released.standard_errors["accuracy"]
    at_home = read_config(path.parent)
    assert at_home.tasks["colour"].temperature == temperature and set(at_home.privacy.epsilon) == {"north"}
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render_summary(summary))
    assert "confidence - accuracy" in shown.get() and f"{temperature:.2f}" in shown.get()


def test_a_temperature_that_the_noise_hides_is_not_handed_out(tmp_path: Path) -> None:
    little = {"share": 0.01, "evaluations": 20}
    site = site_config(tmp_path, "north", evaluation=little)
    _, events = federate(tmp_path / "run", [site], evaluation={"every": 2, "calibrate": True})
    found = evaluations(events)[-1].tasks["colour"].calibration
    assert found.temperature is None and found.gap_left is None
    (path,) = tmp_path.glob(f"**/runs/run-1/{FINAL_HEADS}")
    assert messages.decode(messages.from_bytes(path.read_bytes()), messages.FinishRequest).temperatures == {}


def test_a_run_resumed_with_nothing_left_to_train_hands_out_its_temperature_all_the_same(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE, budget={"epsilon": 1e4, "delta": 1e-5})
    changes: dict[str, Any] = {"evaluation": {"every": 2, "calibrate": True}}
    _, events = federate(tmp_path / "run", [site], **changes)
    spent = summarize(events).sites["north"].epsilon
    (path,) = tmp_path.glob(f"**/runs/run-1/{FINAL_HEADS}")
    before = path.read_bytes()
    path.unlink()
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    _, events = federate(tmp_path / "run", [site], resume=checkpoint, **changes)
    assert path.read_bytes() == before
    assert summarize(events).sites["north"].epsilon == spent


def test_a_resumed_round_counts_once(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE)
    _, events = federate(tmp_path / "run", [site], evaluation={"every": 1})
    repeated = [*events, evaluations(events)[-1]]
    assert summarize(repeated).tasks == summarize(events).tasks
    assert summarize(repeated).sites == summarize(events).sites


def test_noise_that_hides_a_metrics_range_leaves_it_without_a_value() -> None:
    """400 units under more and more noise: first all metrics have values, at last none, and none is ever clipped."""
    sums, readable = some_counts(400, 3), []
    for noise in (1.0, 1e3):
        result = compute_metrics(COLOUR, [SiteRelease("a", reply_of(sums, noise))], seed=1)["colour"]
        readable.append({name for name, value in result.metrics.items() if value is not None})
    assert readable == [set(STATISTIC.ranges), set()]


def test_a_metric_far_outside_its_range_has_no_value_however_small_its_error() -> None:
    """More hits than units cannot be: clipped draws would all be 1, and their error zero."""
    sums = some_counts(400, 3)
    sums[0] += 1000.0
    sums[1] -= 1000.0
    release = SiteRelease("a", reply_of(sums, 1.0))
    result = compute_metrics(COLOUR, [release], seed=1)["colour"]
    assert result.metrics["accuracy"] is None and result.standard_errors["accuracy"] > 0.0


@pytest.mark.parametrize(
    ("value", "error", "readable"),
    [
        (0.8, 0.49, True),
        (0.8, 0.51, False),  # From 0.29 to 1.31: all of the range and more.
        (-0.02, 0.05, True),  # Clipped to 0.000 with its error: next to nothing is right.
        (-0.2, 0.05, False),
        (1.2, 0.05, False),
        (math.nan, 0.1, False),
        (0.8, None, False),
    ],
)
def test_a_metric_is_readable_within_an_error_of_half_its_range(value: float, error: float, readable: bool) -> None:
    assert is_readable(value, error, (0.0, 1.0)) == readable
    assert is_readable(40 * value, None if error is None else 40 * error, (0.0, 40.0)) == readable


def test_a_metric_without_a_value_is_not_readable_in_the_table(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE)
    _, events = federate(tmp_path / "run", [site], evaluation={"every": 2})
    hidden = compute_metrics(COLOUR, [SiteRelease("north", reply_of(some_counts(400, 3), 1e3))], seed=1)
    summary = summarize([*events, evaluations(events)[-1].model_copy(update={"tasks": hidden})])
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render_summary(summary))
    assert shown.get().count("not readable") == len(STATISTIC.ranges) and "0.000" not in shown.get()


@pytest.mark.parametrize("calibrate", [False, True])
def test_counts_of_outcomes_are_the_sums_of_sites_with_their_noise(calibrate: bool) -> None:
    statistic = make_released_statistic(COLOUR["colour"], calibrate=calibrate)
    outputs, labels = torch.eye(3)[[0, 1, 1, 2]] * 5, torch.tensor([0, 1, 2, 2])
    exact = statistic.sums(outputs, labels).numpy() / statistic.bound
    releases = [
        SiteRelease(site, messages.EvaluateReply({"colour": {"sums": exact.astype(np.float32)}}, noise))
        for site, noise in (("east", 3.0), ("north", 4.0))
    ]
    (table,) = count_outcomes(COLOUR, releases, calibrate=calibrate)["colour"].confusions
    np.testing.assert_allclose(table.counts, [[2, 0, 0], [0, 2, 0], [0, 2, 2]], atol=1e-5)
    assert table.deviation == pytest.approx(5.0 * statistic.bound)


def test_an_evaluation_s_counts_stand_in_the_journal(tmp_path: Path) -> None:
    site = site_config(tmp_path, "north", evaluation=SHARE, budget=RICH)
    _, events = federate(tmp_path / "run", [site], evaluation={"every": 1, "calibrate": True})
    for event in evaluations(events):
        assert set(event.outcomes) == {"colour", "size"}
        assert all(table.deviation > 0.0 for each in event.outcomes.values() for table in each.confusions)
