"""The simulator's command line: what it answers to good and to bad input, and what it leaves behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from common.process.console import reported_errors
from common.serving.folder import read_config
from common.yaml import load
from simulations.__main__ import app
from simulations.baselines import make_non_private_run
from simulations.config import SimulationConfig
from simulations.experiment import run

Command = Callable[..., Result]


@pytest.fixture
def command(simulation_file: Path) -> Command:
    """Run a verb on the small simulation; keyword-like strings become `--set`."""

    def run(verb: str, *overrides: str, options: tuple[str, ...] = ()) -> Result:
        sets = [word for override in overrides for word in ("--set", override)]
        return CliRunner().invoke(app, [verb, str(simulation_file), *sets, *options])

    return run


def refused(result: Result, exit_code: int, *said: str) -> None:
    """One sentence on stderr, no traceback, nothing else."""
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]
    assert isinstance(result.exception, SystemExit)


def test_a_run_leaves_all_it_promises(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    result = command("run", options=("--out", str(tmp_path / "out")))
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    for name in ("journal.jsonl", "summary.json", "config.yaml", "environment.json", "checkpoint.safetensors"):
        assert (out / name).exists(), name
    environment = json.loads((out / "environment.json").read_text())
    assert set(environment) == {"python", "packages", "code_digest", "seeds"} and "torch" in environment["packages"]
    about = read_config(out)
    assert about.tasks["colour"].settings["labels"] == ["red", "blue"]
    assert set(about.privacy.epsilon) == {"site-1", "site-2", "site-3"}
    summary = json.loads((out / "summary.json").read_text())
    assert about.tasks["colour"].metrics["accuracy"].value == summary["tasks"]["colour"]["metrics"]["accuracy"]
    assert (out / "sites" / "site-1" / "state" / "ledgers").is_dir()
    assert not (tmp_path / "home").exists(), "a simulation's ledgers are its own, not its user's"


def test_json_is_the_summary_and_nothing_else(command: Command) -> None:
    result = command("run", options=("--json",))
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["status"] == "completed"
    assert 7.9 < summary["sites"]["site-2"]["epsilon"] <= 8.0
    assert summary["tasks"]["colour"]["metrics"]["accuracy"] > 0.8
    assert json.loads(Path(summary["path"], "summary.json").read_text()) == summary


def test_repeating_a_run_never_exhausts_a_budget(command: Command) -> None:
    for _ in range(3):
        assert command("run").exit_code == 0


def test_a_non_private_run_shows_null_epsilon(command: Command) -> None:
    sgd = "run.solver={kind: sgd, sampling_rate: 1.0, steps: 2, learning_rate: 1.0}"
    result = command("run", "run.privacy=non_private", sgd, options=("--json",))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"]["site-1"]["epsilon"] is None


def test_all_baselines_are_beside_the_result(command: Command) -> None:
    sgd = "non_private_solver={kind: sgd, sampling_rate: 1.0, steps: 20, learning_rate: 1.0}"
    result = command("run", sgd, "baselines=[local, non_private, central]", options=("--json",))
    baselines = json.loads(result.stdout)["tasks"]["colour"]["baselines"]
    assert set(baselines) == {"local", "non_private", "central"}
    assert all(values["accuracy"] > 0.7 for values in baselines.values())


def test_baselines_without_privacy_need_no_solver_of_their_own(command: Command) -> None:
    result = command("run", "baselines=[non_private, central]", options=("--json",))
    baselines = json.loads(result.stdout)["tasks"]["colour"]["baselines"]
    assert all(baselines[name]["accuracy"] > 0.7 for name in ("non_private", "central"))


def test_a_baseline_without_privacy_is_the_run_that_asks_for_none(simulation_file: Path) -> None:
    auto = ["run.solver={kind: auto}", "run.aggregation=null"]
    private = load(SimulationConfig, simulation_file, auto)
    asked = load(SimulationConfig, simulation_file, [*auto, "run.privacy=non_private"]).run
    assert private.run.solver != asked.solver and private.run.aggregation != asked.aggregation
    assert make_non_private_run(private).model_dump() == asked.model_dump()


def test_a_regression_by_auto_reaches_least_squares(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 2)) + 0.5
    direction = points / np.linalg.norm(points, axis=1, keepdims=True)
    targets = direction @ [0.5, -0.3] + 0.2 + 0.1 * rng.normal(size=300)
    with (tmp_path / "numbers.csv").open("w", newline="") as file:
        rows = [["x", "y", "dose"], *np.column_stack([points, targets]).tolist()]
        csv.writer(file).writerows(rows)
    ways = ["baselines=[non_private, central]", "run.privacy.target_epsilon=50", "budget.epsilon=60"]
    result = command(
        "run",
        "run.solver={kind: auto}",
        "run.aggregation=null",
        "run.rounds=48",
        "run.backbone.projection={normalize: true}",
        "run.tasks={dose: {kind: regression, range: [-2, 2], outside: clip}}",
        "sources={rows: {kind: table, path: numbers.csv, columns: [x, y]}}",
        # Below the true number, as it should be.
        "tasks={dose: {source: rows, label: dose, missing: skip, public_size: 50}}",
        *ways,
        options=("--json",),
    )
    assert result.exit_code == 0, result.output
    task = json.loads(result.stdout)["tasks"]["dose"]
    inputs = np.column_stack([direction, np.ones(300)])
    residuals = targets - inputs @ np.linalg.lstsq(inputs, targets, rcond=None)[0]
    best = 1 - residuals.var() / targets.var()
    reached = {name: values["r2"] for name, values in task["baselines"].items()}
    assert set(reached) == {"non_private", "central"}
    assert min(*reached.values(), task["metrics"]["r2"]) > best - 0.1


def test_a_plan_says_what_was_chosen(command: Command) -> None:
    assert "chosen: " not in command("plan").stdout
    result = command("plan", "run.solver={kind: auto}", "run.aggregation=null")
    assert result.exit_code == 0, result.output
    assert "chosen: solver head_sum: all heads are linear" in result.stdout


def test_an_expectation_without_its_baseline_is_refused(command: Command) -> None:
    result = command("check", "expect={colour: beats_random_backbone}")
    refused(result, 2, "baselines: expected random_backbone", "--set expect={}")


def test_a_value_that_is_mapped_to_no_label_is_refused_instead_of_leaving_its_records_out(command: Command) -> None:
    refused(command("check", "tasks.colour.values={r: red, b: blu}"), 2, "tasks.colour.values.b", "'blu'")
    assert command("check", "tasks.colour.values={r: red, b: blue}").exit_code == 0


def test_check_validates_and_runs_nothing(command: Command, tmp_path: Path) -> None:
    result = command("check")
    assert result.exit_code == 0 and "valid" in result.stdout
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_check_names_every_file_that_is_missing_once(command: Command, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").unlink()
    weights = tmp_path / "net.safetensors"
    backbone = f"run.backbone={{kind: small_cnn, input_size: 12, channels: [4, 8], weights: {weights}}}"
    result = command("check", backbone, "sources.rows.rows=./no/such.csv")
    refused(result, 2, f"sources.rows.path: {tmp_path / 'rows.csv'} is missing", "sources.rows.rows: ")
    refused(result, 2, f"run.backbone.weights: {weights} is missing")


def test_check_asks_for_no_weights_that_pretraining_is_to_write(command: Command, tmp_path: Path) -> None:
    backbone = f"run.backbone={{kind: small_cnn, input_size: 12, channels: [4, 8], weights: {tmp_path / 'net'}}}"
    source = f"{{kind: table, path: {tmp_path / 'rows.csv'}, columns: [x, y]}}"
    numbers = "label: colour, labels: [red, blue], epochs: 1, batch_size: 8, learning_rate: 0.1, seed: 0"
    pretrain = f"pretrain={{sources: [{source}], {numbers}}}"
    assert command("check", backbone, pretrain).exit_code == 0
    absent = pretrain.replace("rows.csv", "others.csv")
    refused(command("check", backbone, absent), 2, f"pretrain.sources.0.path: {tmp_path / 'others.csv'} is missing")


def test_check_opens_every_source_and_looks_for_its_columns(command: Command, tmp_path: Path) -> None:
    refused(
        command("check", "tasks.colour.label=color"), 2, "sources.rows: tasks.colour.label", "got 'color', which it"
    )
    refused(command("check", "sources.rows.patient=who"), 2, "sources.rows: ", "'who'")
    units = ("unit=patient", "run.privacy.unit=patient")
    refused(command("check", *units), 2, "sources.rows: expected patients, because `unit` is patient")
    (tmp_path / "list.csv").write_text("file,slide,colour\na.png,s1,red\nb.png,s1,red\nc.png,s2,blue\n")
    listed = f"of: {{kind: manifest, path: {tmp_path / 'list.csv'}, image: file}}"
    bags = f"sources.rows={{kind: bags, column: slide, {listed}}}"
    assert command("check", bags).exit_code == 0
    refused(command("check", bags.replace("slide", "slides")), 2, "sources.rows: column: expected", "got 'slides'")
    refused(command("check", bags.replace("image: file", "image: path")), 2, "sources.rows: ", "'path'")
    refused(command("check", bags, "tasks.colour.label=grade"), 2, "sources.rows: tasks.colour.label", "'grade'")
    weights = tmp_path / "net.safetensors"
    encoder = f"{{kind: small_cnn, input_size: 12, channels: [4, 8], weights: {weights}}}"
    missing = f"run.backbone={{kind: bag, max_items: 3, encoder: {encoder}}}"
    head = "run.tasks.colour.head={pooling: mean}"
    refused(command("check", bags, missing, head), 2, f"run.backbone.encoder.weights: {weights} is missing")


def test_a_file_that_is_missing_is_called_missing(command: Command, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").unlink()
    refused(command("run"), 2, str(tmp_path / "rows.csv"), "but there is no such file")


def test_a_plan_says_what_its_rows_mean(command: Command) -> None:
    result = command("plan")
    assert result.exit_code == 0, result.output
    legend = [line.strip() for line in result.stdout.splitlines()]
    for row in ("epsilon at end", "affords rounds", "count noise", "noise/signal", "over the run"):
        assert any(line.startswith(row) for line in legend), row
    assert "Where this row is above 1 the result may be poor" in result.stdout
    assert "legend" not in json.loads(command("plan", options=("--json",)).stdout)


def test_a_plan_of_many_sites_has_one_column_for_those_with_equal_numbers(command: Command) -> None:
    result = command("plan", "partition.num_sites=40", "tasks.colour.public_size=2")
    assert "┃ site-01 and 39 more ┃" in result.stdout and "site-02 " not in result.stdout
    (warning, *_) = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: site-01, site-02, ") and " and 32 more: " in warning
    sizes = ", ".join(f"site-{number}: {10 + number}" for number in range(1, 10))
    unlike = command("plan", "partition.num_sites=9", f"tasks.colour.public_size={{{sizes}}}").stdout
    assert "left out: 1 column(s) of sites with other numbers; `--json` has all" in " ".join(unlike.split())


def test_a_run_that_cannot_be_better_than_guessing_is_refused_unless_told_otherwise(
    command: Command, tmp_path: Path
) -> None:
    hopeless, out = "run.privacy.target_epsilon=0.001", tmp_path / "out"
    shown = command("plan", hopeless)
    assert shown.exit_code == 1 and "no better than guessing (colour)" in shown.stdout
    assert command("plan", hopeless, options=("--anyway",)).exit_code == 0
    refused(command("run", hopeless, options=("--out", str(out))), 2, "no better than guessing", "--anyway")
    assert not out.exists()
    assert command("run", hopeless, options=("--out", str(out), "--anyway")).exit_code == 0
    expected = [line for line in command("plan").stdout.splitlines() if line.startswith("expected: colour: ")]
    assert expected == []  # Settings by hand are not rehearsed.


def test_a_plan_that_every_site_would_decline_ends_with_1(command: Command) -> None:
    result = command("plan", "budget.epsilon=0.01")
    assert result.exit_code == 1 and "would decline" in result.stdout
    warnings = [line.split(": ", 2)[1:] for line in result.stdout.splitlines() if line.startswith("warning: ")]
    sentences = [sentence for _, sentence in warnings]
    assert len(sentences) == len(set(sentences))
    assert any(names.count("site-") > 1 for names, _ in warnings)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.ronds=3", ("run.ronds: unknown key", "nearest: 'rounds'")),
        ("executor.shards=2", ("executor: shards: expected none beside `kind: in_process`",)),
        ("run.rounds=many", ("run.rounds", "a whole number", "'many'")),
        ("run.privacy.unit=pateint", ("run.privacy.unit", "'patient'", "'pateint'")),
        ("run.privacy.unit=patient", ("run.privacy.unit", "sites' unit 'example'")),
        ("run.solver.clip_nrom=1", ("run.solver.clip_nrom: unknown key", "nearest: 'clip_norm'")),
        ("run.solver.kind=dp_sdg", ("run.solver.kind", "nearest: 'dp_sgd'")),
        ("run.backbone.kind=identty", ("run.backbone.kind", "nearest: 'identity'")),
        ("run.tasks.colour.kind=classify", ("run.tasks.colour.kind", "nearest: 'classification'")),
        ("run.tasks.colour.labels=[red]", ("run.tasks.colour.labels", "at least 2")),
        ("run.aggregation.kind=fedadm", ("run.aggregation.kind", "nearest: 'fedadam'")),
        ("sources.rows.kind=tabel", ("sources.rows.kind", "nearest: 'table'")),
        ("partition.kind=natural", ("partition.sites: expected a value",)),
        ("baselines=[centrl]", ("baselines", "nearest: 'central'")),
        ("run.solver.sampling_rate=1.5", ("run.solver.sampling_rate", "got 1.5")),
        ("run.privacy.target_epsilon=-1", ("run.privacy.target_epsilon", "at least 0.0001", "got -1")),
    ],
)
def test_a_wrong_setting_is_one_sentence(command: Command, override: str, said: tuple[str, ...]) -> None:
    refused(command("check", override), 2, *said)


def test_a_sentence_about_several_keys_begins_with_one_of_them(command: Command) -> None:
    overrides = ("baselines=[]", "expect={colour: beats_random_backbone}")
    refused(command("check", *overrides), 2, "error: baselines: expected random_backbone")


def test_a_trainable_backbone_with_dp_gd_is_told_which_solver_trains_it(command: Command) -> None:
    overrides = ("run.solver.kind=dp_gd", "run.trainable={backbone: {from: input}}")
    refused(
        command("check", *overrides), 2, "solver: expected a kind that trains a part of a backbone", "got dp_gd without"
    )


def test_an_interrupted_run_names_the_command_that_resumes_it(simulation_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def press_ctrl_c(_phase: str, _done: int, _total: int) -> None:
        if (out / "checkpoint.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended, reported_errors():
        run(simulation_file, out=out, overrides=["run.rounds=3"], observe=press_ctrl_c)
    assert ended.value.exit_code == 130
    assert f"`headwater simulate resume {out}`" in str(ended.value.__cause__)
    resumed = CliRunner().invoke(app, ["resume", str(out), "--json"])
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["rounds"] == 3


def test_resuming_where_nothing_is_says_that_there_is_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["resume", str(tmp_path / "none")])
    refused(result, 2, f"{tmp_path / 'none'}: there is no run at this path")


def test_a_head_the_solver_is_not_exact_for_is_refused_before_anything_runs(command: Command) -> None:
    closed = "run.solver={kind: dp_gd, steps: 1, clip_norm: 1.0, learning_rate: 1.0}"
    assert command("check", closed).exit_code == 0
    refused(command("check", closed, "run.tasks.colour.head={hidden: 4}"), 2, "tasks.colour.head", "kind dp_sgd")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sources.rows.path=./nowhere.csv", ("nowhere.csv",)),
        ("tasks.colour.label=color", ("tasks.colour.label", "'color'")),
        ("tasks.colour.sites=[site-9]", ("tasks.colour.sites", "'site-9'")),
        ("partition.kind=column", ("partition.by",)),
    ],
)
def test_data_that_are_not_there_are_one_sentence(command: Command, override: str, said: tuple[str, ...]) -> None:
    refused(command("run", override), 2, *said)


def test_a_file_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    refused(CliRunner().invoke(app, ["run", str(tmp_path / "none.yaml")]), 2, "expected a readable YAML file")


def test_a_folder_that_holds_something_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    refused(command("run", options=("--out", str(tmp_path))), 2, "expected a new or empty folder")


def test_a_budget_that_covers_no_request_ends_the_run_with_the_reason(command: Command) -> None:
    refused(command("run", "budget.epsilon=1"), 1, "declined: budget")


def add_row(simulation_file: Path, *cells: str) -> None:
    with (simulation_file.parent / "rows.csv").open("a", newline="") as file:
        csv.writer(file).writerow(cells)


@pytest.mark.parametrize(
    "cells", [("0.1", "0.2", "CANARY"), ("CANARY", "0.2", "red"), ("0.1", "", "red"), ("1", "1", "")]
)
def test_a_bad_record_stops_or_is_skipped_as_the_file_says(
    command: Command, simulation_file: Path, cells: tuple[str, ...]
) -> None:
    add_row(simulation_file, *cells)
    stopped = command("run", "on_bad_record=stop")
    refused(stopped, 2, "rows.csv row 181")
    assert "CANARY" not in stopped.output
    skipped = command("run", "on_bad_record=skip", options=("--json",))
    assert skipped.exit_code == 0, skipped.output
    left_out = [site["left_out"] for site in json.loads(skipped.stdout)["sites"].values() if site["left_out"]]
    assert [item["num_records"] for item in left_out] == [1]
    listed = Path(left_out[0]["path"]).read_text()
    assert "rows.csv,181" in listed and "CANARY" not in listed
    # A path is for copying: it is whole, however long.
    (line,) = [line for line in command("run", "on_bad_record=skip").stdout.splitlines() if "listed in" in line]
    assert Path(line.rpartition("listed in ")[2]).is_file()


def test_a_simulation_of_which_a_site_can_use_too_few_records_stops_before_it_trains(
    command: Command, simulation_file: Path, tmp_path: Path
) -> None:
    """Of 180 records and 60 bad ones, three quarters can be used."""
    for _ in range(60):
        add_row(simulation_file, "0.1", "0.2", "CANARY")
    stopped = command("run", "min_usable_share=0.9", options=("--out", str(tmp_path / "out")))
    refused(
        stopped, 2, "error: site ", " records can be used; the first of the others: rows.csv row ", "min_usable_share"
    )
    assert "CANARY" not in stopped.output
    journal = (tmp_path / "out" / "journal.jsonl").read_text()
    assert "features_ready" in journal and "round" not in {json.loads(line)["event"] for line in journal.splitlines()}
    assert command("run", "min_usable_share=0.5").exit_code == 0


def test_missing_and_unreadable_images_are_named_by_row_and_the_run_goes_on(
    command: Command, simulation_file: Path
) -> None:
    folder = simulation_file.parent
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "colour"])
        for number in range(30):
            colour = ["red", "blue"][number % 2]
            Image.new("L", (12, 12), 40 + 150 * (number % 2) + number).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", colour])
        (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:40])
        writer.writerows([["broken.png", "red"], ["gone.png", "red"]])
    weights = folder / "cnn.safetensors"
    from safetensors.torch import save_file

    from common.backbones.small_cnn import SmallCnn, collect_tensors

    settings = {"kind": "small_cnn", "input_size": 12, "channels": [4, 8]}
    save_file(collect_tensors(SmallCnn.model_validate(settings).architecture().module, None), weights)
    overrides = [
        f"run.backbone={{kind: small_cnn, input_size: 12, channels: [4, 8], weights: {weights}}}",
        f"sources.rows={{kind: manifest, path: {folder / 'images.csv'}, image: image}}",
    ]
    refused(command("run", *overrides, "on_bad_record=stop"), 2, "images.csv row 3")
    result = command("run", *overrides, options=("--json",))
    assert result.exit_code == 0, result.output
    assert (
        sum((s["left_out"] or {"num_records": 0})["num_records"] for s in json.loads(result.stdout)["sites"].values())
        == 2
    )


def test_a_run_that_cannot_be_evaluated_is_no_success(command: Command) -> None:
    refused(command("run", "partition.test_fraction=0"), 1, "task colour could not be evaluated")


def test_a_stratified_split_does_not_part_a_patients_records(command: Command, simulation_file: Path) -> None:
    source = "sources.rows={kind: table, path: rows.csv, columns: [x, y], patient: colour}"
    refused(command("run", source, "partition.split=stratified"), 2, "partition.split", "write hash")


def test_a_site_without_records_is_left_standing(command: Command, simulation_file: Path) -> None:
    """Forty sites share few records: some train on nothing and still answer."""
    lines = (simulation_file.parent / "rows.csv").read_text().splitlines()
    (simulation_file.parent / "rows.csv").write_text("\n".join(lines[:8]) + "\n")
    result = command("run", "partition.num_sites=9", "run.rounds=1", options=("--json",))
    assert result.exit_code == 0, result.output
    assert {site["status"] for site in json.loads(result.stdout)["sites"].values()} == {"completed"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: torch.save({"weight": object()}, path), "pickle"),
        (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "does not fit"),
        (lambda path: path.write_bytes(b"nothing of the sort"), "weights"),
    ],
    ids=["pickle", "misfit", "garbage"],
)
def test_weights_that_cannot_be_used_are_refused(
    command: Command, tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "weights.pth"
    make(path)
    backbone = (
        "run.backbone={kind: torchvision, model: mobilenet_v3_small, weights: " + str(path) + ", preprocess: "
        "{resize: 32, crop: null, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}"
    )
    refused(command("run", backbone), 2, "run.backbone.weights", said)


def test_a_sweep_writes_a_row_for_each_run_and_metric_and_encodes_once(command: Command, tmp_path: Path) -> None:
    sweep = "sweep={seeds: [1, 2], values: {run.privacy.target_epsilon: [1.0, 8.0]}}"
    result = command("sweep", sweep, options=("--out", str(tmp_path / "sweep"), "--json"))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["values"], row["runs"]) for row in rows] == [
        ({"run.privacy.target_epsilon": 1.0}, 2),
        ({"run.privacy.target_epsilon": 8.0}, 2),
    ]
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    accuracy = [float(line["value"]) for line in lines if line["metric"] == "accuracy"]
    assert len(accuracy) == 4
    assert rows[1]["mean"] == pytest.approx(sum(accuracy[2:]) / 2)
    entries = [path for path in (tmp_path / "cache" / "features").iterdir() if not path.name.startswith(".")]
    assert len(entries) == 1


def test_a_sweep_with_a_bad_combination_runs_nothing(command: Command, tmp_path: Path) -> None:
    result = command("sweep", "sweep={seeds: [1], values: {run.rounds: [1, 0]}}")
    refused(result, 2, "run.rounds", "got 0")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["run", "check", "resume", "sweep", "pretrain", "sites"])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and "Example:" in result.output


def test_trackers_have_the_curves_of_each_run_and_an_unknown_one_starts_nothing(
    command: Command, tmp_path: Path
) -> None:
    refused(command("run", options=("--out", str(tmp_path / "x"), "--tracker", "tensorbord")), 2, "tensorboard")
    assert not (tmp_path / "x").exists()
    options = ("--out", str(tmp_path / "run"), "--tracker", "tensorboard", "--tracker-dir", str(tmp_path / "curves"))
    assert command("run", options=options).exit_code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(tmp_path / "curves" / "tensorboard" / "run"))
    curves.Reload()
    assert [event.step for event in curves.Tensors("colour/accuracy")] == [1, 2, 3]
    assert not (tmp_path / "run" / "trackers").exists()
