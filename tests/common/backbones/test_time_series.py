"""Transformers of time series: the model's own numbers, its heads left behind, gaps told from values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction, PatchTSTConfig, PatchTSTForClassification

from common.model.backbones import load_blob, open_pretrained
from common.types import BadInput, BadRecord

SIZES: dict[str, Any] = {
    "num_input_channels": 3,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 16,
    "num_targets": 2,
}


def make_model(family: str, folder: Path) -> Any:
    """Saves a model with a head, and returns its encoder."""
    torch.manual_seed(2)
    if family == "patchtst":
        # As pre-training leaves it: some steps are hidden at random.
        more = {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "do_mask_input": True}
        whole: Any = PatchTSTForClassification(PatchTSTConfig(**SIZES, **more))
    else:
        whole = PatchTSMixerForPrediction(PatchTSMixerConfig(**SIZES, num_layers=1))
    whole.save_pretrained(folder)
    return whole.model.eval()


@pytest.mark.parametrize(("family", "mask"), [("patchtst", "past_observed_mask"), ("patchtsmixer", "observed_mask")])
def test_features_are_means_over_the_encoders_patches(family: str, mask: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    settings = {"kind": "time_series", "folder": str(tmp_path), "standardise": False}
    backbone = load_blob(open_pretrained({**settings, "channels": "apart"}, "backbone").blob())
    series_TC = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    series_TC[5:20, 1] = np.nan
    seen_TC = np.isfinite(series_TC)
    values_1TC = torch.from_numpy(np.where(seen_TC, series_TC, 0.0))[None]
    if family == "patchtst":
        model.do_mask_input = False
    with torch.no_grad():
        hidden_1CPD = model(past_values=values_1TC, **{mask: torch.from_numpy(seen_TC)[None]}).last_hidden_state
    features_1D = backbone.encode(backbone.preprocess(series_TC)[None])
    torch.testing.assert_close(features_1D, hidden_1CPD.mean(2).flatten(1), rtol=1e-4, atol=1e-5)
    averaged = open_pretrained(settings, "backbone")
    torch.testing.assert_close(
        averaged.encode(averaged.preprocess(series_TC)[None]), hidden_1CPD.mean((1, 2)), rtol=1e-4, atol=1e-5
    )


def test_a_gap_is_no_value_and_other_series_are_bad_records(tmp_path: Path) -> None:
    make_model("patchtst", tmp_path)
    backbone = open_pretrained({"kind": "time_series", "folder": str(tmp_path)}, "backbone")
    series_TC = np.random.default_rng(0).normal(size=(40, 3))
    zeros_TC = series_TC.copy()
    series_TC[10:20, 0], zeros_TC[10:20, 0] = np.nan, 0.0
    both = torch.stack([backbone.preprocess(series_TC), backbone.preprocess(zeros_TC)])
    features_BD = backbone.encode(both)
    assert not torch.allclose(features_BD[0], features_BD[1], atol=1e-3)
    for bad in (series_TC[:, :2], np.full((40, 3), np.nan), np.full((40, 3), np.inf), series_TC[:1]):
        with pytest.raises(BadRecord):
            backbone.preprocess(bad)


@pytest.mark.parametrize("family", ["patchtst", "patchtsmixer"])
def test_a_channel_without_any_value_is_read_as_one_gap(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path)
    backbone = open_pretrained({"kind": "time_series", "folder": str(tmp_path), "channels": "apart"}, "backbone")
    series_TC = np.random.default_rng(0).normal(size=(40, 3))
    series_TC[:, 2] = np.nan
    inputs_2CT = backbone.preprocess(series_TC)
    assert not inputs_2CT[:, 2].any()
    assert backbone.encode(inputs_2CT[None]).isfinite().all()


def test_a_patchtst_has_its_own_channels_and_length_and_pads_on_request(tmp_path: Path) -> None:
    make_model("patchtst", tmp_path)
    settings = {"kind": "time_series", "folder": str(tmp_path)}
    padded = open_pretrained({**settings, "fit": "pad", "standardise": False}, "backbone").preprocess(np.ones((30, 3)))
    assert not padded[:, :, :2].any()
    assert padded[:, :, 2:].all()
    for key, value in (("num_channels", 2), ("length", 16)):
        with pytest.raises(BadInput, match=f"{key}: expected (3|32), that of the model, or nothing, got {value}"):
            open_pretrained({**settings, key: value}, "backbone")


def test_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(
        BadInput, match=r"backbone\.folder: .*model_type: expected one of patchtst, patchtsmixer, .*got 'bert'"
    ):
        open_pretrained({"kind": "time_series", "folder": str(tmp_path)}, "backbone")
