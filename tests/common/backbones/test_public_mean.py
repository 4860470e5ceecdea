"""A declared public mean: what is subtracted, whose it must be, what travels, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from client.data.backbone_store import BackboneStore
from common.backbones import declares_public_mean, list_weights_paths, resolve_settings
from common.backbones.parts.public_mean import write_public_mean
from common.backbones.parts.weights import read_state
from common.model.backbones import load_blob, open_pretrained, open_random
from common.plugins import Spec, plugin_class, resolve
from common.types import BadInput


def settings(folder: Path, **projection: Any) -> dict[str, Any]:
    example = plugin_class("common.backbones", "small_cnn").example(folder)
    return {**example.settings, "projection": projection or None}


def make_inputs(folder: Path) -> torch.Tensor:
    backbone = open_pretrained(settings(folder), "backbone")
    return torch.stack(
        [backbone.preprocess(item) for item in plugin_class("common.backbones", "small_cnn").example(folder).items]
    )


def write_mean(folder: Path, **changes: Any) -> tuple[Path, torch.Tensor]:
    """Writes a mean of the example's backbone; the mean is returned too."""
    plain = open_pretrained({**settings(folder), **changes}, "backbone")
    mean_D = torch.linspace(-1.0, 1.0, plain.feature_dim)
    write_public_mean(folder / "mean.safetensors", mean_D, digest=plain.digest, num_records=100)
    return folder / "mean.safetensors", mean_D


def test_the_declared_mean_is_subtracted_before_projecting_and_normalising(tmp_path: Path) -> None:
    path, mean_D = write_mean(tmp_path)
    plain = open_pretrained(settings(tmp_path), "backbone")
    backbone = open_pretrained(settings(tmp_path, dim=4, shift={"public": str(path)}, normalize=True), "backbone")
    inputs = make_inputs(tmp_path)
    matrix_DP = dict(backbone.module.named_buffers())["projection.matrix"]
    projected_BP = (plain.encode(inputs) - mean_D) @ matrix_DP
    expected_BP = projected_BP / projected_BP.norm(dim=1, keepdim=True)
    torch.testing.assert_close(backbone.encode(inputs), expected_BP)


def test_the_mean_travels_within_the_digest_and_its_path_does_not(tmp_path: Path) -> None:
    path, mean_D = write_mean(tmp_path)
    asked = settings(tmp_path, shift={"public": str(path)}, normalize=True)
    first = open_pretrained(asked, "backbone")
    received = load_blob(first.blob())
    inputs = make_inputs(tmp_path)
    assert torch.equal(received.encode(inputs), first.encode(inputs))
    assert str(path) not in first.spec
    assert resolve_settings(first.kind) == first.kind
    plain = open_pretrained(settings(tmp_path), "backbone")
    write_public_mean(path, 2 * mean_D, digest=plain.digest, num_records=100)
    assert open_pretrained(asked, "backbone").digest != first.digest


def test_settings_say_that_features_are_centred_before_and_after_they_travel(tmp_path: Path) -> None:
    path, _ = write_mean(tmp_path)
    asked = settings(tmp_path, shift={"public": str(path)}, normalize=True)
    assert declares_public_mean(asked)
    assert declares_public_mean(Spec(**asked))
    assert declares_public_mean(open_pretrained(asked, "backbone").public_spec())
    assert not declares_public_mean(settings(tmp_path))
    assert not declares_public_mean(settings(tmp_path, normalize=True))
    assert not declares_public_mean(settings(tmp_path, shift="batch_norm", normalize=True))


@pytest.mark.parametrize("changed", [{"input_size": 10}, {"weights": "other.safetensors"}])
def test_a_mean_of_another_backbone_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    original = settings(tmp_path)
    state = {name: 2 * tensor for name, tensor in read_state(Path(original["weights"])).items()}
    save_file(state, tmp_path / "other.safetensors")
    if "weights" in changed:
        changed = {"weights": str(tmp_path / "other.safetensors")}
    path, _ = write_mean(tmp_path)
    asked = {**original, **changed, "projection": {"shift": {"public": str(path)}, "normalize": True}}
    with pytest.raises(BadInput, match=r"^backbone\.projection\.shift\.public: .* another backbone, weights file or"):
        open_pretrained(asked, "backbone")


def test_a_file_that_holds_no_mean_is_refused(tmp_path: Path) -> None:
    path, mean_D = write_mean(tmp_path)
    digest = open_pretrained(settings(tmp_path), "backbone").digest
    asked = settings(tmp_path, shift={"public": str(path)}, normalize=True)
    for bad in (
        b"",
        b"\x80\x04.",
        path.read_bytes()[:-4],
    ):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match=r"^backbone\.projection\.shift\.public: expected a file that holds a mean"):
            open_pretrained(asked, "backbone")
    for tensor in (mean_D.double(), mean_D[None], mean_D / 0.0):
        write_public_mean(path, tensor, digest=digest, num_records=1)
        with pytest.raises(BadInput, match="expected a file that holds a mean"):
            open_pretrained(asked, "backbone")
    save_file({"mean": mean_D}, path)
    with pytest.raises(BadInput, match="another backbone"):
        open_pretrained(asked, "backbone")
    path.unlink()
    with pytest.raises(BadInput, match=r"found no file .*; `headwater simulate public-mean` makes it"):
        open_pretrained(asked, "backbone")
    with pytest.raises(BadInput, match="got nothing"):
        open_pretrained(settings(tmp_path, shift={"public": None}, normalize=True), "backbone")


def test_a_mean_of_another_length_is_refused(tmp_path: Path) -> None:
    path, mean_D = write_mean(tmp_path)
    digest = open_pretrained(settings(tmp_path), "backbone").digest
    write_public_mean(path, mean_D[1:], digest=digest, num_records=1)
    with pytest.raises(BadInput, match=r"^backbone\..*of another shape"):
        open_pretrained(settings(tmp_path, shift={"public": str(path)}, normalize=True), "backbone")


def test_random_weights_have_no_declared_mean(tmp_path: Path) -> None:
    path, _ = write_mean(tmp_path)
    backbone = open_random(settings(tmp_path, shift={"public": str(path)}, normalize=True), "backbone", seed=1)
    assert not dict(backbone.module.named_buffers())["projection.shift"].any()


def test_a_sites_own_backbone_is_opened_again_when_its_mean_changed(tmp_path: Path) -> None:
    path, mean_D = write_mean(tmp_path)
    asked = settings(tmp_path, shift={"public": str(path)}, normalize=True)
    assert list_weights_paths(resolve("common.backbones", asked, "backbone")) == [Path(asked["weights"]), path]
    plain = open_pretrained({**asked, "projection": None}, "backbone")
    store = BackboneStore(tmp_path / "store")
    assert not store.adopt("0" * 64, [Spec(**asked)])
    write_public_mean(path, mean_D * 2, digest=plain.digest, num_records=1)
    assert store.adopt(open_pretrained(asked, "backbone").digest, [Spec(**asked)])
