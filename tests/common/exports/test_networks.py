"""Exported networks give a model's own numbers: every kind of backbone, task and head, for any number of records."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from client.prediction.predict import LoadedModel
from common.backbones import Example
from common.exports import open_format, write_export
from common.exports.parts.exported import select
from common.exports.parts.program import check, draw_inputs
from common.inputs import Audio, is_boxes, is_mask, read_boxes, read_mask
from common.model.backbones import open_pretrained
from common.plugins import kinds, plugin_class
from common.serving.network import Model, open_model
from common.tasks import TaskExample
from common.types import BadInput
from tests.finished import MASKS, TASKS, write_finished, write_maps

# What writes texts is exported in test_texts.py.
KINDS = [kind for kind in kinds("common.backbones") if kind != "seq2seq"]
SCRIPTS = Path("common/exports/parts/scripts").resolve()
QUICK = ("identity", "small_cnn", "series_cnn", "log_mel")
# Tracing its three recurrent layers over 160 frames takes a minute.
TRACED = [kind for kind in KINDS if kind != "speaker_encoder"]


def stack_inputs(model: Model, items: Any) -> tuple[Tensor, ...]:
    """Returns the raw inputs of records; shorter ones are padded, as a text may be."""
    prepared = [model.open_raw("backbone").prepare(item) for item in items]
    return tuple(nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in zip(*prepared, strict=True))


def open_example(kind: str, folder: Path) -> tuple[Model, Example]:
    """Returns a model on a kind's example. Skips where others cannot prepare its records."""
    example = plugin_class("common.backbones", kind).example(folder)
    backbone = open_pretrained(example.settings, "backbone")
    if backbone.open_raw is None:
        pytest.skip("the kind says of no raw inputs: it is not exported")
    head = {} if backbone.bag is None else {"head": {"pooling": "attention"}}
    tasks = {"finding": {**TASKS["finding"], **head}}
    return open_model(write_finished(folder / "model", example.settings, tasks)), example


def mark_slow(kinds: Sequence[str], quick: Sequence[str]) -> list[Any]:
    return [pytest.param(kind, marks=[] if kind in quick else [pytest.mark.slow]) for kind in kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_one_module_from_raw_inputs_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    model, example = open_example(kind, tmp_path)
    inputs = stack_inputs(model, example.items)
    torch.testing.assert_close(model.torch()(*inputs), model(example.items)["finding"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", mark_slow(TRACED, QUICK))
def test_a_program_of_torch_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    model, example = open_example(kind, tmp_path)
    write_export(model, tmp_path / "out", open_format("torch"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for items in (example.items[:1], list(example.items) * 2):
        inputs = stack_inputs(model, items)
        torch.testing.assert_close(program(*inputs), model(items)["finding"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", mark_slow(TRACED, ["identity"]))
def test_an_onnx_file_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    model, example = open_example(kind, tmp_path)
    write_export(model, tmp_path / "out", open_format("onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for items in (example.items[:1], list(example.items) * 2):
        inputs = {
            own.name: each.numpy() for own, each in zip(session.get_inputs(), stack_inputs(model, items), strict=True)
        }
        (served,) = session.run(["finding"], inputs)
        torch.testing.assert_close(torch.from_numpy(served), model(items)["finding"], rtol=1e-5, atol=1e-5)


EXAMPLES: dict[str, TaskExample] = {
    kind: plugin_class("common.tasks", kind).example() for kind in kinds("common.tasks")
}
SURE = ["none", "glioma", "meningioma"]
HEADS = {
    "centred, with a prior": {"kind": "classification", "labels": SURE, "head": {"centre": True, "prior": True}},
    "hidden": {"kind": "classification", "labels": SURE, "head": {"hidden": 5}},
    # Frames of recordings are tried with their own backbone.
    **{kind: example.settings for kind, example in EXAMPLES.items() if len(example.grid) != 1},
}
# A head that was not trained is not sure.
BOXES = HEADS["detection"] = {**HEADS["detection"], "threshold": 0.0, "most_detections": 6, "overlap": 0.2}
ON_VECTORS = [name for name in HEADS if name not in EXAMPLES or not EXAMPLES[name].grid]


@pytest.mark.parametrize("name", ON_VECTORS)
def test_every_task_and_head_is_exported_as_it_is_served(name: str, tmp_path: Path) -> None:
    tasks = {"first": HEADS[name], "second": HEADS["hidden"]}
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "dim": 6}, tasks, {"first": 2.5}))
    write_export(model, tmp_path / "out", open_format("torch"))
    vectors = torch.randn(7, 6)
    served = torch.export.load(tmp_path / "out" / "model.pt2").module()(vectors)
    for own, expected in zip(served, model(list(vectors.numpy())).values(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    stated = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert [len(each["columns"]) for each in stated["outputs"]] == [part.shape[1] for part in served]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_VECTORS)
def test_every_task_and_head_is_an_output_of_one_onnx_file(name: str, tmp_path: Path) -> None:
    tasks = {"first": HEADS[name], "second": HEADS["hidden"]}
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "dim": 6}, tasks, {"first": 2.5}))
    write_export(model, tmp_path / "out", open_format("onnx"))
    vectors = torch.randn(7, 6).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    served = dict(zip(tasks, session.run(list(tasks), {"vector": vectors}), strict=True))
    for task, expected in model(list(vectors)).items():
        torch.testing.assert_close(torch.from_numpy(served[task]), expected, rtol=1e-5, atol=1e-5)


# --- maps ------------------------------------------------------------------------------------------------------------


def open_maps(folder: Path, name: str, **maps: Any) -> Model:
    """Returns a model on maps: a task, and beside it one of whole pictures, which reads their mean."""
    tasks = {"first": HEADS[name], "second": HEADS["hidden"]}
    return open_model(write_finished(folder / "model", write_maps(folder, **maps), tasks, {"first": 2.5}))


def draw_pictures(count: int = 3) -> list[Image.Image]:
    """Returns pictures of unequal size, whose parts differ."""
    rng = np.random.default_rng(0)
    blocks = [Image.fromarray(rng.integers(0, 256, (4, 3, 3), dtype=np.uint8)) for _ in range(count)]
    return [block.resize((51, 40 + 9 * n), Image.Resampling.NEAREST) for n, block in enumerate(blocks)]


def check_told(model: Model, told: Sequence[Tensor], stated: Any, pictures: Sequence[Image.Image]) -> None:
    """Compares what a network tells with what the model serves and predicts."""
    served = model(pictures)
    for each, own in zip(stated["outputs"], told, strict=True):
        assert each["shape"][1:] == list(own.shape[1:])
        if "maps" in each:
            assert len(each["maps"]) == own.shape[1]
            flat = own.flatten(2)[:, : len(each["columns"])]
            own = flat.mean(dim=2) if each["column_of_map"] == "mean" else flat.amax(dim=2)
        torch.testing.assert_close(own, served[each["task"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", mark_slow(list(HEADS), ["segmentation"]))
def test_every_task_on_maps_is_exported_as_it_is_served(name: str, tmp_path: Path) -> None:
    model = open_maps(tmp_path, name, colours=True, context=3)
    write_export(model, tmp_path / "out", open_format("torch"))
    stated = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    pictures = draw_pictures()
    for items in (pictures[:1], pictures * 2):
        check_told(model, program(*stack_inputs(model, items)), stated, items)


def test_the_likeliest_label_of_each_place_is_the_mask_that_is_predicted(tmp_path: Path) -> None:
    tasks = {"first": MASKS, "second": HEADS["hidden"]}
    model = open_model(write_finished(tmp_path / "model", write_maps(tmp_path, colours=True), tasks))
    pictures = draw_pictures()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    cells = LoadedModel(model).predict([tmp_path / f"{number}.png" for number in range(3)])["first"]
    maps_BKSS = model.torch("first")(*stack_inputs(model, pictures))
    assert isinstance(maps_BKSS, Tensor) and maps_BKSS.shape[1:] == (2, 16, 16)
    for cell, own in zip(cells, maps_BKSS.argmax(dim=1).numpy(), strict=True):
        assert np.array_equal(read_mask(cell), own) and len(np.unique(own)) == 2


@pytest.mark.slow
def test_the_boxes_that_are_found_in_maps_are_those_that_are_predicted(tmp_path: Path) -> None:
    settings = write_maps(tmp_path, grid=12, colours=True, context=3)
    model = open_model(write_finished(tmp_path / "model", settings, {"first": BOXES}))
    write_export(model, tmp_path / "out", open_format("torch"))
    (stated,) = json.loads((tmp_path / "out" / "preprocessing.json").read_text())["outputs"]
    assert stated["boxes"] == {"threshold": 0.0, "overlap": 0.2, "most": 6}
    find_boxes = runpy.run_path(str(tmp_path / "out" / "boxes.py"))["find_boxes"]
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    pictures = draw_pictures(6)
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    expected = [read_boxes(cell) for cell in LoadedModel(model).predict(paths)["first"]]
    for maps, own in zip(program(*stack_inputs(model, pictures)), expected, strict=True):
        found = find_boxes(maps.numpy(), stated)
        assert [label for label, *_ in found] == [box.name for box in own]
        for (_, score, sides), box in zip(found, own, strict=True):
            assert [score, *sides] == pytest.approx([box.score, box.left, box.top, box.right, box.bottom], abs=1e-4)
    assert sum(map(len, expected)) > 12 and max(map(len, expected)) == 6


@pytest.mark.slow
def test_features_of_places_are_the_input_of_a_network_without_its_backbone(tmp_path: Path) -> None:
    model = open_maps(tmp_path, "hidden")
    write_export(model, tmp_path / "out", open_format("torch"), without=["backbone"])
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    pictures = draw_pictures()
    for own, expected in zip(program(model.encode("backbone", pictures)), model(pictures).values(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if len(example.grid) == 2])
def test_the_program_beside_an_onnx_file_gives_the_models_rows_and_masks(name: str, tmp_path: Path) -> None:
    model = open_maps(tmp_path, name, grid=5, colours=True, context=3)
    write_export(model, tmp_path / "out", open_format("onnx"))
    pictures = draw_pictures()
    paths = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    command = [
        sys.executable,
        str(tmp_path / "out" / "predict.py"),
        *("--masks", str(tmp_path / "masks")),
        *(("--boxes", str(tmp_path / "boxes.json")) if is_boxes(model.make_any_cell("first")) else ()),
        *map(str, paths),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [[float(cell) for cell in line.split(",")[1:]] for line in done.stdout.splitlines()[1:]]
    expected = torch.cat(list(model(pictures).values()), dim=1)
    torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-5, atol=1e-5)
    if is_mask(model.make_any_cell("first")):
        LoadedModel(model).predict(paths, tasks=["first"], masks=tmp_path / "own")
        for path in paths:
            mine, theirs = (np.asarray(Image.open(tmp_path / folder / path.name)) for folder in ("own", "masks"))
            assert np.array_equal(mine, theirs)
    if is_boxes(model.make_any_cell("first")):
        LoadedModel(model).predict(paths, tasks=["first"], boxes=tmp_path / "own.json")
        mine, theirs = (json.loads((tmp_path / name).read_text()) for name in ("own.json", "boxes.json"))
        assert mine["categories"] == theirs["categories"] and len(mine["annotations"]) > 3
        assert len(mine["images"]) == len(theirs["images"]) == 3
        for one, other in zip(mine["annotations"], theirs["annotations"], strict=True):
            assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
            assert other["bbox"] == pytest.approx(one["bbox"], abs=0.02)
            assert other["score"] == pytest.approx(one["score"], abs=1e-5)


TRAINED = {
    "small_cnn": ("small_cnn", {"from": "4"}),
    "cifar_resnet": ("cifar_resnet", {"from": "layer3"}),
    "transformers": ("transformers", {"from": "encoder.layer.1"}),
    "transformers, with adapters": (
        "transformers",
        {"from": "encoder.layer.0", "lora": {"rank": 2, "alpha": 4, "targets": ["query", "value"]}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "torch"])
@pytest.mark.parametrize("trained", TRAINED)
def test_a_part_that_was_trained_is_in_the_network(trained: str, name: str, tmp_path: Path) -> None:
    kind, trainable = TRAINED[trained]
    example = plugin_class("common.backbones", kind).example(tmp_path)
    path = write_finished(tmp_path / "model", example.settings, trainable=trainable)
    model = open_model(path)
    frozen = open_model(write_finished(tmp_path / "frozen", example.settings))
    write_export(model, tmp_path / "out", open_format(name))
    inputs = stack_inputs(model, example.items)
    if name == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
        names = [own.name for own in session.get_inputs()]
        given = {key: each.numpy() for key, each in zip(names, inputs, strict=True)}
        served = torch.from_numpy(session.run(None, given)[0])
    else:
        served = torch.export.load(tmp_path / "out" / "model.pt2").module()(*inputs)
    torch.testing.assert_close(served, model(example.items)["finding"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(served, frozen(example.items)["finding"], atol=1e-3)


@pytest.mark.slow
def test_recordings_of_any_length_go_through_one_program(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(**sizes, **layers, **positions, initializer_range=0.5)
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path)
    settings = {"kind": "transformers", "folder": str(tmp_path), "modality": "audio", "seconds": 0.5}
    model = open_model(write_finished(tmp_path / "model", settings))
    write_export(model, tmp_path / "out", open_format("torch"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    rng = np.random.default_rng(0)
    for length, count in ((8000, 2), (3000, 3), (700, 1)):
        items = [Audio(rng.normal(size=length).astype(np.float32) / 10, 16_000) for _ in range(count)]
        served = program(*stack_inputs(model, items))
        torch.testing.assert_close(served, model(items)["finding"], rtol=1e-5, atol=1e-5)


def test_a_trained_backbone_is_neither_left_out_nor_given_to_transformers(tmp_path: Path) -> None:
    settings = plugin_class("common.backbones", "small_cnn").example(tmp_path).settings
    model = open_model(write_finished(tmp_path / "model", settings, trainable=TRAINED["small_cnn"][1]))
    with pytest.raises(BadInput, match="expected a frozen backbone, got backbone, a part of which was trained"):
        write_export(model, tmp_path / "out", open_format("torch"), without=["backbone"])
    with pytest.raises(BadInput, match="holds frozen backbones, got one with a trained part"):
        write_export(model, tmp_path / "out", open_format("huggingface"))


def test_a_program_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "dim": 6}))
    exported = select(model, (), (), one_task=False, name="torch")
    inputs = draw_inputs(exported)
    check(exported, inputs, model.torch()(*inputs))
    with pytest.raises(BadInput, match="the exported program computes something else"):
        check(exported, inputs, model.torch()(*inputs) + 0.01)


def test_an_empty_cell_that_may_not_be_empty_makes_no_number(tmp_path: Path) -> None:
    columns = [
        {"name": "age", "range": [0, 100], "missing": "refuse"},
        {"name": "sex", "levels": ["f", "m"], "missing": "f"},
    ]
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "columns": columns}))
    network, empty = model.torch(), float("nan")
    rows = torch.tensor([[50.0, 1.0], [50.0, empty], [50.0, 0.0], [empty, 0.0]], dtype=torch.float64)
    served = network(rows)
    torch.testing.assert_close(served[1], served[2])
    assert not torch.allclose(served[0], served[1])
    assert served[3].isnan().all() and not served[:3].isnan().any()


def test_a_program_takes_the_tasks_that_are_named(tmp_path: Path) -> None:
    tasks = {name: HEADS["hidden"] for name in ("a", "b", "c")}
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "dim": 6}, tasks))
    write_export(model, tmp_path / "out", open_format("torch"), tasks=["c"])
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    vectors = torch.randn(4, 6)
    torch.testing.assert_close(program(vectors), model(list(vectors.numpy()))["c"])
    with pytest.raises(BadInput, match="task: expected one of a, b, c, got 'd'"):
        write_export(model, tmp_path / "other", open_format("torch"), tasks=["d"])
    assert not (tmp_path / "other").exists()


# --- the programs beside an ONNX file --------------------------------------------------------------------------------


def export_program(folder: Path, settings: Any) -> Path:
    """Returns the program that an export as ONNX writes."""
    model = open_model(write_finished(folder / "model", settings))
    write_export(model, folder / "out", open_format("onnx"))
    return folder / "out" / "predict.py"


def run_program(program: Path, *arguments: object) -> tuple[int, list[str], str]:
    """Returns a program's exit code, the first cells of the rows that it printed, and its errors."""
    command = [sys.executable, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, [line.split(",")[0] for line in done.stdout.splitlines()], done.stderr


def test_a_broken_picture_costs_itself_only(tmp_path: Path) -> None:
    example = plugin_class("common.backbones", "small_cnn").example(tmp_path)
    program = export_program(tmp_path, example.settings)
    stated = json.loads((program.parent / "preprocessing.json").read_text())
    side = stated["inputs"][0]["shape"][-1]
    good, last, broken, large, lost = (tmp_path / f"{name}.png" for name in ("good", "last", "broken", "large", "lost"))
    for path, size in ((good, side), (last, side), (large, side + 1)):
        Image.new("L", (size, size)).save(path)
    broken.write_bytes(good.read_bytes()[:40])
    code, rows, errors = run_program(program, good, broken, large, lost, last)
    assert (code, rows) == (1, ["record", str(good), str(last)])
    named = [line.split(": ")[0] for line in errors.splitlines()]
    assert named == [str(broken), str(large), str(lost)], errors
    assert f"expected {side} x {side} pixels" in errors
    assert run_program(program, good, last) == (0, ["record", str(good), str(last)], "")


def test_a_bad_row_costs_itself_only(tmp_path: Path) -> None:
    columns = [{"name": name, "range": [0, 100], "missing": "refuse"} for name in ("age", "chol")]
    program = export_program(tmp_path, {"kind": "identity", "columns": columns})
    table = tmp_path / "rows.csv"
    table.write_bytes(b"age,chol\n50,20\nold,20\n50\n\xe9,20\n51,21\n")
    code, rows, errors = run_program(program, table)
    assert (code, rows) == (1, ["record", "1", "5"])
    assert [line.split(": ")[0] for line in errors.splitlines()] == ["row 2", "row 3", "row 4"], errors
    for separator in (";", "\t"):
        table.write_text(separator.join(["age", "chol\n50", "20\n"]))
        assert run_program(program, table) == (0, ["record", "1"], "")
    table.write_text("age\n50\n")
    code, _, errors = run_program(program, table)
    assert code == 1 and errors == f"{table}: expected the columns chol, which it lacks\n"
    code, _, errors = run_program(program, tmp_path / "lost.csv")
    assert code == 1 and len(errors.splitlines()) == 1


def test_prepared_arrays_that_are_none_are_refused_in_a_sentence(tmp_path: Path) -> None:
    program = export_program(tmp_path, {"kind": "identity", "dim": 6})
    np.savez(tmp_path / "records.npz", vector=np.zeros((2, 6)))
    assert run_program(program, tmp_path / "records.npz") == (0, ["record", "1", "2"], "")
    code, _, errors = run_program(program, tmp_path / "lost.npz")
    assert code == 1 and len(errors.splitlines()) == 1 and "expected an .npz file with vector" in errors


@pytest.mark.parametrize("script", ["pictures", "texts", "table", "arrays"])
def test_a_program_without_an_argument_says_its_usage(script: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    program = tmp_path / "predict.py"
    program.write_bytes((SCRIPTS / f"{script}.py").read_bytes())
    (tmp_path / "preprocessing.json").write_text("{}")
    code, rows, errors = run_program(program)
    assert (code, rows) == (2, []) and errors.startswith("usage: python predict.py ")
    assert run_program(program, "--help") == (0, [errors.strip()], "")
