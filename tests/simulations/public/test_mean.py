"""`simulate public-mean`: the mean it writes, of which records, and what it refuses in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from common.inputs import Text
from common.model.backbones import Backbone, load_blob, open_pretrained
from common.plugins import Spec, plugin_class
from common.run import RunConfig
from common.serving.means import read_means
from common.types import BadInput
from common.yaml import load
from simulations.__main__ import app

SIDE = 12
"""Pixels that the small net's example takes, and no others."""


def make_run_file(folder: Path, kind: str = "small_cnn", **projection: Any) -> Path:
    """Writes a run file whose backbone is a kind's example; its projection names mean.safetensors."""
    settings = dict(plugin_class("common.backbones", kind).example(folder).settings)
    settings["projection"] = projection or {"shift": {"public": "mean.safetensors"}, "normalize": False}
    run = {
        "name": "small",
        "seed": 1,
        "rounds": 3,
        "backbone": settings,
        "tasks": {"colour": {"kind": "classification", "labels": ["red", "blue"]}},
        "solver": {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0},
        "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0},
        "aggregation": {"kind": "mean"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def read_backbone(file: Path) -> Spec:
    return load(RunConfig, file).backbone_specs["backbone"]


def open_plain(file: Path) -> Backbone:
    return open_pretrained({**read_backbone(file).settings(), "projection": None}, "backbone")


def call(file: Path, records: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["public-mean", str(file), str(records), *options])


def refused(result: Result, *said: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2 and len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in said), lines[0]


def write_pictures(folder: Path, side: int, count: int = 12) -> list[Image.Image]:
    """Writes grey pictures in folders of two depths and returns them."""
    rng = np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)) for _ in range(count)]
    for number, picture in enumerate(pictures):
        path = folder / ("deep/er" if number % 2 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return pictures


def average(backbone: Backbone, items: Sequence[Any]) -> torch.Tensor:
    return backbone.encode([backbone.preprocess(item) for item in items]).double().mean(0).float()


def read_mean(folder: Path) -> torch.Tensor:
    with safe_open(folder / "mean.safetensors", framework="pt") as file:
        mean_D: torch.Tensor = file.get_tensor("mean")
    return mean_D


def test_the_mean_of_all_pictures_below_a_folder_is_written_where_the_backbone_says(tmp_path: Path) -> None:
    file = make_run_file(tmp_path)
    pictures = write_pictures(tmp_path / "pictures", SIDE)
    result = call(file, tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    assert "12 records; " in result.stdout
    # The feature store keeps 16 bits of each feature.
    torch.testing.assert_close(read_mean(tmp_path), average(open_plain(file), pictures), rtol=1e-3, atol=1e-4)
    centred = open_pretrained(read_backbone(file), "backbone")
    features = centred.encode([centred.preprocess(picture) for picture in pictures])
    torch.testing.assert_close(features.mean(0), torch.zeros(centred.feature_dim), rtol=0, atol=1e-3)


def test_a_sampling_error_is_the_standard_error_relative_to_the_mean(tmp_path: Path) -> None:
    file = make_run_file(tmp_path)
    backbone = open_plain(file)
    pictures = write_pictures(tmp_path / "pictures", SIDE)
    stdout = call(file, tmp_path / "pictures").stdout
    features = backbone.encode([backbone.preprocess(item) for item in pictures]).double().numpy()
    error = np.sqrt((features.var(0, ddof=1) / len(features)).sum()) / np.linalg.norm(features.mean(0))
    assert float(stdout.rpartition("sampling error is ")[2].partition("%")[0]) == pytest.approx(100 * error, abs=0.06)


def test_larger_pictures_are_shrunk_first_where_that_is_asked(tmp_path: Path) -> None:
    file = make_run_file(tmp_path)
    pictures = write_pictures(tmp_path / "pictures", 2 * SIDE)
    refused(call(file, tmp_path / "pictures"), "expected at least 2 records", "backbone reads, got 0", "12 x 12")
    assert call(file, tmp_path / "pictures", "--shrink", str(SIDE)).exit_code == 0
    shrunk = [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]
    torch.testing.assert_close(read_mean(tmp_path), average(open_plain(file), shrunk), rtol=1e-3, atol=1e-4)


def test_a_picture_that_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    file = make_run_file(tmp_path)
    pictures = write_pictures(tmp_path / "pictures", SIDE)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    result = call(file, tmp_path / "pictures")
    assert "12 records, 1 left out (first: unreadable image); " in result.stdout
    torch.testing.assert_close(read_mean(tmp_path), average(open_plain(file), pictures), rtol=1e-3, atol=1e-4)


def test_each_line_of_a_folders_text_files_is_a_text(tmp_path: Path) -> None:
    file = make_run_file(tmp_path, "transformers")
    (tmp_path / "texts").mkdir()
    lines = ["the scan shows no tumour", 'an "edema\t.', "the scan", "an edema ."]
    (tmp_path / "texts" / "a.txt").write_text("\n".join(lines[:3]) + "\n")
    (tmp_path / "texts" / "b.txt").write_text(lines[3])
    result = call(file, tmp_path / "texts")
    assert "4 records; " in result.stdout, result.output
    texts = [Text(line) for line in lines]
    torch.testing.assert_close(read_mean(tmp_path), average(open_plain(file), texts), rtol=1e-3, atol=1e-4)
    (tmp_path / "source.yaml").write_text("{kind: text, path: texts/a.txt, header: [note], text: note, separator: '|'}")
    assert "3 records; " in call(file, tmp_path / "source.yaml").stdout


def test_what_cannot_be_measured_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = make_run_file(tmp_path)
    refused(call(file, tmp_path / "absent"), "absent: expected a folder or file of public pictures", "found none")
    (tmp_path / "empty").mkdir()
    refused(call(file, tmp_path / "empty"), "empty: expected pictures, recordings, or texts")
    write_pictures(tmp_path / "one", SIDE, count=1)
    refused(call(file, tmp_path / "one"), "expected at least 2 records that backbone reads, got 1")
    refused(call(file, tmp_path / "one", "--backbone", "other"), "--backbone: expected one of backbone, got other")
    refused(
        call(make_run_file(tmp_path, normalize=True), tmp_path / "one"), "backbone.projection.shift: expected", "--out"
    )
    write_pictures(tmp_path / "two", SIDE, count=2)
    (tmp_path / "file").write_text("")
    file = make_run_file(tmp_path, normalize=True, shift={"public": str(tmp_path / "file" / "mean.safetensors")})
    refused(call(file, tmp_path / "two"), "shift.public: expected a file that can be written")


def test_the_file_is_also_the_home_file_of_its_records(tmp_path: Path) -> None:
    file = make_run_file(tmp_path, shift={"public": "mean.safetensors"}, normalize=True)
    pictures = write_pictures(tmp_path / "pictures", SIDE)
    assert call(file, tmp_path / "pictures").exit_code == 0
    centred = open_pretrained(read_backbone(file), "backbone")
    (home,) = read_means(tmp_path / "mean.safetensors")
    assert home.is_home and home.units == 12 and home.digest == centred.digest and "pictures" in home.source
    np.testing.assert_allclose(home.mean_D, average(centred, pictures), rtol=0, atol=2e-3)


def test_a_home_file_of_other_records_holds_the_mean_of_the_whole_backbones_features_of_length_1(
    tmp_path: Path,
) -> None:
    file = make_run_file(tmp_path)
    write_pictures(tmp_path / "pictures", SIDE)
    home = tmp_path / "homes" / "home.safetensors"
    refused(call(file, tmp_path / "pictures", "--out", str(home)), "found no file", "mean.safetensors")
    assert call(file, tmp_path / "pictures").exit_code == 0
    others = write_pictures(tmp_path / "others", SIDE, count=20)
    kept = (tmp_path / "mean.safetensors").read_bytes()
    result = call(file, tmp_path / "others", "--out", str(home))
    assert result.stdout.startswith("home sample: ") and "20 records; " in result.stdout, result.output
    assert (tmp_path / "mean.safetensors").read_bytes() == kept
    whole = open_pretrained(read_backbone(file), "backbone")
    features = whole.encode([whole.preprocess(picture) for picture in others]).double()
    (found,) = read_means(home)
    assert found.digest == whole.digest and found.units == 20 and found.deviation == 0.0
    unit = torch.nn.functional.normalize(features, dim=1)
    np.testing.assert_allclose(found.mean_D, unit.mean(0), rtol=0, atol=2e-3)
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "home")
    refused(call(file, tmp_path / "others", "--out", out), "--out: expected a file that can be written")


def test_help_says_that_every_site_receives_the_mean() -> None:
    assert "never make it of private records" in CliRunner().invoke(app, ["public-mean", "--help"]).stdout


def test_a_bags_items_are_centred_by_the_public_mean_of_items(tmp_path: Path) -> None:
    file = make_run_file(tmp_path, normalize=True, shift={"public": "mean.safetensors"})
    run = yaml.safe_load(file.read_text())
    encoder = run["backbone"]
    run["backbone"] = {"kind": "bag", "max_items": 3, "encoder": encoder}
    run["tasks"]["colour"]["head"] = {"pooling": "mean"}
    file.write_text(yaml.safe_dump(run))
    pictures = write_pictures(tmp_path / "public", SIDE)
    result = call(file, tmp_path / "public")
    assert result.exit_code == 0 and "public mean: " in result.output, result.output
    bag = open_pretrained(read_backbone(file), "backbone")
    plain = open_pretrained({**encoder, "projection": None}, "backbone")
    raw_BD = plain.encode(torch.stack([plain.preprocess(picture) for picture in pictures]))
    mean_D = load_file(tmp_path / "mean.safetensors")["mean"]
    torch.testing.assert_close(mean_D, raw_BD.mean(dim=0), rtol=1e-3, atol=1e-3)
    expected_BD = torch.nn.functional.normalize(raw_BD - mean_D, dim=1)
    features_BD = bag.encode_items([bag.preprocess(picture) for picture in pictures])
    torch.testing.assert_close(features_BD[:, :-1], expected_BD, rtol=1e-4, atol=1e-5)
    assert (features_BD[:, -1] == 1.0).all()
    # The mean travels within the backbone, and its file's place does not.
    assert load_blob(bag.blob()).digest == bag.digest and "mean.safetensors" not in bag.spec
    other = {
        name: tensor + 1 if tensor.is_floating_point() else tensor
        for name, tensor in load_file(encoder["weights"]).items()
    }
    save_file(other, tmp_path / "other.safetensors")
    run["backbone"]["encoder"] = {**encoder, "weights": str(tmp_path / "other.safetensors")}
    file.write_text(yaml.safe_dump(run))
    with pytest.raises(
        BadInput, match=r"backbone\.encoder\.projection\.shift\.public: .* got that of another backbone"
    ):
        open_pretrained(read_backbone(file), "backbone")
