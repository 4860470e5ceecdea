"""Chronos-Bolt and MOMENT: files as they are published give the numbers of the published code."""

from __future__ import annotations

import importlib.util
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import T5Config, T5Model

from common.model.backbones import load_blob, open_pretrained
from common.types import BadInput, BadRecord

T5: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 5}
LENGTH, PATCH = 64, 8
BLOCK = ("hidden_layer", "output_layer", "residual_layer")
REFERENCE = {
    "bolt": [0.037904, -0.005417, -0.005167, 0.076644],
    "moment": [-0.005329, -0.00062, -0.003198, -0.123266],
}
"""First features of `make_series()`, by chronos-forecasting 2.3.2 and momentfm 0.1.4; `compute_reference` made them."""


def write_published(family: str, folder: Path, **changes: Any) -> None:
    """Writes config.json and model.safetensors with the names and shapes of the published models, and fixed numbers."""
    config: dict[str, Any]
    if family == "bolt":
        sizes = {"context_length": LENGTH, "prediction_length": 4, "input_patch_size": PATCH}
        chronos = {**sizes, "input_patch_stride": PATCH, "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True}
        t5 = T5Config(**T5 | {"vocab_size": 2}, feed_forward_proj="relu", decoder_start_token_id=0)
        config = t5.to_dict() | {"architectures": ["ChronosBoltModelForForecasting"], "chronos_config": chronos}
        shapes = {name: tensor.shape for name, tensor in T5Model(t5).state_dict().items() if "embed_tokens" not in name}
        for part, (inputs, outputs) in {"input": (2 * PATCH, 16), "output": (16, 3 * 4)}.items():
            for layer, rows, columns in zip(BLOCK, (24, outputs, outputs), (inputs, 24, inputs), strict=True):
                shapes[f"{part}_patch_embedding.{layer}.weight"] = torch.Size([rows, columns])
                shapes[f"{part}_patch_embedding.{layer}.bias"] = torch.Size([rows])
    else:
        t5 = T5Config(**T5, feed_forward_proj="gated-gelu")
        config = {"task_name": "reconstruction", "model_name": "MOMENT", "transformer_type": "encoder_only"}
        config |= {"d_model": None, "seq_len": LENGTH, "patch_len": PATCH, "patch_stride_len": PATCH, "device": "cpu"}
        config |= {"transformer_backbone": "google/flan-t5-small", "model_kwargs": {}, "t5_config": t5.to_dict()}
        whole = T5Model(t5).state_dict()
        shapes = {name: tensor.shape for name, tensor in whole.items() if name.startswith("encoder.")}
        shapes |= {"patch_embedding.value_embedding.weight": torch.Size([16, PATCH])}
        shapes |= {"patch_embedding.mask_embedding": torch.Size([16])}
        shapes |= {"patch_embedding.position_embedding.pe": torch.Size([1, 5000, 16])}
        shapes |= {"head.linear.weight": torch.Size([PATCH, 16]), "head.linear.bias": torch.Size([PATCH])}
    tensors = {name: torch.from_numpy(draw(name, tuple(shape))) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def draw(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns the numbers of a tensor; a name has the same ones everywhere."""
    if name.endswith(".pe"):
        places, even = np.arange(shape[1])[:, None], np.arange(0, shape[2], 2)
        angles = places * np.exp(even * -(np.log(10000.0) / shape[2]))
        return np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(shape).astype(np.float32)
    return (0.3 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)).astype(np.float32)


def make_series() -> NDArray[np.float64]:
    """Returns 50 steps of two channels, with a gap longer than a patch and a single one."""
    series_TC = 100 + np.random.default_rng(0).normal(size=(50, 2)).cumsum(axis=0)
    series_TC[15:31] = np.nan
    series_TC[3, 1] = np.nan
    return series_TC


def compute_reference(family: str, folder: Path) -> torch.Tensor:
    """Returns the features of `make_series()` by the published code."""
    context_CT = torch.full((2, LENGTH), torch.nan)
    context_CT[:, LENGTH - 50 :] = torch.tensor(make_series().T, dtype=torch.float32)
    shown_CP = (~context_CT.isnan()).view(2, -1, PATCH).any(2).float()
    # Both packages warn of transformers' new names.
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        if family == "bolt":
            from chronos.chronos_bolt import ChronosBoltModelForForecasting

            bolt = ChronosBoltModelForForecasting.from_pretrained(folder).eval()
            states_CPD = bolt.encode(context_CT)[0][:, : LENGTH // PATCH]
            return ((states_CPD * shown_CP[..., None]).sum(1) / shown_CP.sum(1, keepdim=True)).mean(0)
        from momentfm.models.moment import MOMENTPipeline

        moment = MOMENTPipeline.from_pretrained(folder, model_kwargs={"task_name": "embedding"}).eval()
        moment.init()
        mask_BT = shown_CP[:1].repeat_interleave(PATCH, 1)
        features_BD: torch.Tensor = moment.embed(x_enc=context_CT[None], input_mask=mask_BT).embeddings
        return features_BD[0]


def open_folder(folder: Path, **settings: Any) -> Any:
    backbone = open_pretrained({"kind": "time_series", "folder": str(folder), **settings}, "backbone")
    return load_blob(backbone.blob())


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("family", ["bolt", "moment"])
def test_features_are_those_of_the_published_code(family: str, standardise: bool, tmp_path: Path) -> None:
    write_published(family, tmp_path)
    backbone = open_folder(tmp_path, num_channels=2, standardise=standardise)
    features_D = backbone.encode(backbone.preprocess(make_series())[None])[0]
    torch.testing.assert_close(features_D[:4], torch.tensor(REFERENCE[family]), rtol=1e-4, atol=1e-5)
    if importlib.util.find_spec("chronos" if family == "bolt" else "momentfm"):
        torch.testing.assert_close(features_D, compute_reference(family, tmp_path), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bolt", "moment"])
def test_a_channel_is_read_alone_and_one_without_values_has_features_of_zero(family: str, tmp_path: Path) -> None:
    write_published(family, tmp_path)
    apart = open_folder(tmp_path, num_channels=2, channels="apart")
    one = open_folder(tmp_path)
    series_TC = make_series()
    both_D = apart.encode(apart.preprocess(series_TC)[None])[0]
    for channel in (0, 1):
        alone_D = one.encode(one.preprocess(series_TC[:, channel])[None])[0]
        torch.testing.assert_close(both_D[channel * 16 : channel * 16 + 16], alone_D, rtol=1e-4, atol=1e-5)
    series_TC[:, 1] = np.nan
    without_D = apart.encode(apart.preprocess(series_TC)[None])[0]
    torch.testing.assert_close(without_D[:16], both_D[:16], rtol=1e-4, atol=1e-5)
    assert not without_D[16:].any()


@pytest.mark.parametrize("family", ["bolt", "moment"])
def test_steps_before_the_first_patch_and_the_unit_of_values_change_nothing(family: str, tmp_path: Path) -> None:
    write_published(family, tmp_path)
    backbone = open_folder(tmp_path, standardise=False)
    series_T = make_series()[:, 0]
    plain, longer = backbone.preprocess(series_T), backbone.preprocess(np.concatenate([[np.nan] * 30, series_T]))
    torch.testing.assert_close(plain, longer)
    fahrenheit = backbone.preprocess(series_T * 1.8 + 32)
    torch.testing.assert_close(backbone.encode(plain[None]), backbone.encode(fahrenheit[None]), rtol=1e-3, atol=1e-3)


def test_fewer_steps_are_read_in_whole_patches_and_of_a_longer_series_the_last(tmp_path: Path) -> None:
    write_published("bolt", tmp_path)
    backbone = open_folder(tmp_path, length=16)
    series_T = np.arange(50.0) ** 2
    torch.testing.assert_close(backbone.preprocess(series_T), backbone.preprocess(series_T[-16:]))
    assert backbone.preprocess(series_T).shape == (2, 1, 16)
    stretched = open_folder(tmp_path, length=16, fit="stretch", standardise=False).preprocess(series_T)
    assert stretched[0, 0, [0, -1]].tolist() == [0.0, 49.0**2]
    assert stretched[1].all()
    for length in (12, 72):
        with pytest.raises(BadInput, match="length: expected at most 64 time steps in whole patches of 8, got"):
            open_folder(tmp_path, length=length)
    with pytest.raises(BadRecord, match="2 channels, got 1"):
        open_folder(tmp_path, num_channels=2).preprocess(series_T)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["Chronos2Model"]}, "expected the architecture ChronosBoltModelForForecasting, got another"),
        ({"chronos_config": {"context_length": 0}}, "context_length: expected a number from 1 on"),
        ({"chronos_config": None, "model_type": "timesfm"}, "timesfm only forecasts; use a PatchTST, Chronos-Bolt"),
        ({"chronos_config": None}, "a Chronos-Bolt or a MOMENT, got 't5'"),
        ({"d_model": "wide"}, "expected values that a t5 can have"),
        ({"dense_act_fn": 3, "feed_forward_proj": "none"}, "expected a chronos_bolt that can be built from its config"),
    ],
)
def test_other_models_are_refused_in_a_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_published("bolt", tmp_path, **changes)
    with pytest.raises(BadInput, match=sentence):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch_stride_len": 4}, "patch_stride_len: expected patch_len"),
        ({"t5_config": None}, "t5_config: expected it"),
        ({"transformer_type": "encoder_decoder"}, "MOMENT with the transformer_type encoder_only"),
    ],
)
def test_other_moments_are_refused_in_a_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_published("moment", tmp_path, **changes)
    with pytest.raises(BadInput, match=sentence):
        open_folder(tmp_path)


def test_weights_that_lack_the_encoder_are_refused(tmp_path: Path) -> None:
    write_published("moment", tmp_path)
    save_file({"head.linear.bias": torch.zeros(PATCH)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="does not fit the architecture"):
        open_folder(tmp_path)
