"""What a network that says nothing of its inputs is given: scans with spacing and orientation, series, recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from common.backbones.parts.graphs.reads import Reads
from common.inputs import Audio, Volume
from common.model.backbones import load_blob, open_pretrained
from common.types import BadInput, BadRecord

SCAN = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def read(settings: dict[str, Any], item: Any) -> torch.Tensor:
    return Reads.model_validate(settings).apply(item)


def test_axes_lead_to_the_sides_that_are_asked_for() -> None:
    item = Volume(SCAN, (1.0, 1.0, 1.0))
    as_is = read({"volumes": {"size": (2, 3, 4), "window": (0, 23)}}, item)
    torch.testing.assert_close(as_is, torch.from_numpy(SCAN)[None] / 23)
    turned = read({"volumes": {"size": (4, 2, 3), "window": (0, 23), "orientation": "SLP"}}, item)
    expected = np.moveaxis(SCAN, 2, 0)[:, ::-1, ::-1].copy()
    torch.testing.assert_close(turned, torch.from_numpy(expected)[None] / 23)


def test_a_scan_of_other_spacing_covers_the_same_millimetres() -> None:
    # A ramp of 1 a mm: coarse and fine, at the middles of the same 8 mm.
    fine, coarse = np.arange(8) + 0.5, np.arange(4) * 2 + 1.0
    settings = {"volumes": {"size": (8, 1, 1), "spacing_mm": (1, 1, 1), "window": (0, 10)}}
    own = read(settings, Volume(fine.astype(np.float32).reshape(8, 1, 1), (1.0, 1.0, 1.0)))
    other = read(settings, Volume(coarse.astype(np.float32).reshape(4, 1, 1), (2.0, 1.0, 1.0)))
    # Behind the last middles nothing is known.
    torch.testing.assert_close(own[0, 1:-1], other[0, 1:-1])
    middle = read({"volumes": {"size": (2, 1, 1), "window": (0, 10)}}, Volume(fine.reshape(8, 1, 1), (1.0, 1.0, 1.0)))
    torch.testing.assert_close(middle.flatten(), torch.tensor([0.35, 0.45]))
    padded = read({"volumes": {"size": (6, 1, 1), "window": (0, 10)}}, Volume(coarse.reshape(4, 1, 1), (1.0, 1.0, 1.0)))
    torch.testing.assert_close(padded.flatten(), torch.tensor([0.1, 0.1, 0.3, 0.5, 0.7, 0.1]))


@pytest.mark.parametrize(
    "item",
    [
        SCAN,
        Volume(SCAN[0], (1.0, 1.0, 1.0)),
        Volume(SCAN, (1.0, 0.0, 1.0)),
        Volume(np.full((2, 2, 2), np.nan, dtype=np.float32), (1.0, 1.0, 1.0)),
        Volume(np.full((2, 2, 2), np.inf, dtype=np.float32), (1.0, 1.0, 1.0)),
    ],
)
def test_what_is_no_scan_is_a_bad_record(item: Any) -> None:
    with pytest.raises(BadRecord):
        read({"volumes": {"size": (2, 3, 4)}}, item)


def test_channels_of_a_series_and_pieces_of_a_recording_keep_their_order() -> None:
    series_TC = np.stack([np.arange(5.0), 10 - np.arange(5.0)], axis=1)
    settings: dict[str, Any] = {"series": {"length": 3, "channels": 2, "standardise": False}}
    torch.testing.assert_close(read(settings, series_TC), torch.tensor([[0.0, 2.0, 4.0], [10.0, 8.0, 6.0]]))
    last = read({**settings, "channels_last": True}, series_TC)
    torch.testing.assert_close(last, torch.tensor([[0.0, 10.0], [2.0, 8.0], [4.0, 6.0]]))
    with pytest.raises(BadRecord, match="expected a series of 2 channels, got 1"):
        read(settings, np.arange(5.0))
    pieces = {"recordings": {"sample_rate": 8000, "samples": 6, "window": 4, "step": 2}}
    recording = Audio(np.arange(6, dtype=np.float32) / 10, 8000)
    torch.testing.assert_close(read(pieces, recording), torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.2, 0.3, 0.4, 0.5]]))


def test_a_network_of_three_dimensions_reads_scans(tmp_path: Path) -> None:
    cubes = np.stack([np.ones((1, 2, 2, 2)), -np.ones((1, 2, 2, 2))]).astype(np.float32)
    kernel = numpy_helper.from_array(cubes, "kernel")
    inputs = [helper.make_tensor_value_info("scan", TensorProto.FLOAT, ["B", 1, 2, 3, 4])]
    outputs = [helper.make_tensor_value_info("maps", TensorProto.FLOAT, None)]
    graph = helper.make_graph([helper.make_node("Conv", ["scan", "kernel"], ["maps"])], "t", inputs, outputs, [kernel])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    settings = {"kind": "onnx", "weights": str(tmp_path / "net.onnx"), "axis": 1}
    reads = {"volumes": {"size": [2, 3, 4], "window": [0, 1]}}
    backbone = load_blob(open_pretrained({**settings, "reads": reads}, "backbone").blob())
    features_BD = backbone.encode([backbone.preprocess(Volume(SCAN / 23, (1.0, 1.0, 3.0)))])
    sums = [SCAN[:, y : y + 2, z : z + 2].sum() / 23 for y in range(2) for z in range(3)]
    torch.testing.assert_close(features_BD, torch.tensor([[np.mean(sums), -np.mean(sums)]], dtype=torch.float32))
    with pytest.raises(BadInput, match="orientation: expected one side of each pair"):
        open_pretrained({**settings, "reads": {"volumes": {"size": [2, 3, 4], "orientation": "RLS"}}}, "backbone")


@pytest.mark.parametrize(
    "settings",
    [
        {"recordings": {"sample_rate": 8000, "samples": 80_000, "window": 40_000, "step": 1}},
        {"series": {"length": 1 << 20, "channels": 4096}},
        {"volumes": {"size": [2048, 2048, 2048]}},
    ],
)
def test_an_input_of_any_size_cannot_be_asked_for(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected inputs of at most 536,870,912 numbers"):
        Reads.model_validate(settings)
