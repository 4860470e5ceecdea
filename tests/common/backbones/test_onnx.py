"""ONNX graphs as backbones: cut at a tensor, checked operator by operator, and real ones from packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load, save

from common.backbones import resolve_settings, write_spec
from common.backbones.parts.weights import compute_digest
from common.inputs import Audio
from common.model.backbones import load_blob, open_pretrained
from common.plugins import resolve
from common.types import BackboneBlob, BadInput

SERIES = {"series": {"length": 6, "standardise": False}}
WEIGHTS = np.arange(18, dtype=np.float32).reshape(6, 3)


def write_graph(
    path: Path, nodes: Sequence[Any], *, shape: Sequence[Any] = ("B", 1, 6), domain: str = "", held: Any = None
) -> dict[str, Any]:
    """Writes a graph from `x` to `y` that may use a matrix `w`, and returns settings that read it."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    weights = [numpy_helper.from_array(WEIGHTS, "w")] if held is None else held
    graph = helper.make_graph(list(nodes), "test", inputs, outputs, weights)
    domains = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    path.write_bytes(helper.make_model(graph, opset_imports=domains, ir_version=8).SerializeToString())
    return {"kind": "onnx", "weights": str(path), "reads": SERIES}


def test_features_are_a_tensor_inside_the_graph(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["inner"]), helper.make_node("Softmax", ["inner"], ["y"])]
    settings = write_graph(tmp_path / "net.onnx", nodes)
    backbone = open_pretrained({**settings, "output": "inner"}, "backbone")
    series_T = np.array([1.0, 0, 0, 0, 0, 2.0])
    inputs = torch.stack([backbone.preprocess(series_T), backbone.preprocess(series_T[::-1].copy())])
    expected = torch.tensor([[30.0, 33.0, 36.0], [15.0, 18.0, 21.0]])
    torch.testing.assert_close(load_blob(backbone.blob()).encode(inputs), expected)
    # What stands behind the tensor does not travel.
    assert b"Softmax" not in backbone.blob().weights
    assert open_pretrained(settings, "backbone").digest != backbone.digest


def test_a_graph_for_one_record_reads_each_by_itself(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    fixed = open_pretrained(write_graph(tmp_path / "one.onnx", nodes, shape=(1, 1, 6)), "backbone")
    free = open_pretrained(write_graph(tmp_path / "any.onnx", nodes), "backbone")
    inputs = torch.randn(3, 1, 6)
    torch.testing.assert_close(fixed.encode(inputs), free.encode(inputs))


@pytest.mark.parametrize(
    ("node", "domain", "message"),
    [
        (helper.make_node("RandomNormalLike", ["x"], ["y"]), "", r"the operator 'RandomNormalLike'"),
        (
            helper.make_node("Inverse", ["x"], ["y"], domain="com.microsoft"),
            "com.microsoft",
            r"'com\.microsoft:Inverse'",
        ),
        (helper.make_node("Relu", ["x"], ["y"], domain="own"), "own", r"the operator 'own:Relu'"),
        (helper.make_node("NonZero", ["x"], ["y"]), "", r"the operator 'NonZero'"),
    ],
)
def test_other_operators_are_refused(node: Any, domain: str, message: str, tmp_path: Path) -> None:
    settings = write_graph(tmp_path / "net.onnx", [node], domain=domain)
    with pytest.raises(BadInput, match=rf"backbone\.weights: refused a graph with {message}|{message}"):
        open_pretrained(settings, "backbone")


def test_a_site_checks_the_graph_that_it_receives(tmp_path: Path) -> None:
    right = open_pretrained(write_graph(tmp_path / "right.onnx", [helper.make_node("Relu", ["x"], ["y"])]), "backbone")
    write_graph(tmp_path / "wrong.onnx", [helper.make_node("RandomNormalLike", ["x"], ["y"])])
    # As a coordinator that was changed would send it.
    graph = (tmp_path / "wrong.onnx").read_bytes()
    state = load(bytes(right.blob().weights))
    (name,) = (name for name in state if name.endswith("graph"))
    state[name] = torch.frombuffer(bytearray(graph), dtype=torch.uint8)
    settings = right.public_spec()
    settings["graph"]["num_bytes"] = len(graph)
    spec = write_spec(resolve_settings(resolve("common.backbones", settings, "backbone")))
    sent = BackboneBlob(spec=spec, weights=save(state), digest=compute_digest(spec, state.items()))
    with pytest.raises(BadInput, match="RandomNormalLike"):
        load_blob(sent).encode(torch.zeros(1, 1, 6))


def test_a_records_features_do_not_depend_on_a_neighbour_that_a_graph_looks_for(tmp_path: Path) -> None:
    # The greatest value of the whole batch is added to all, but only where it is beyond what made-up inputs have.
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Sub", ["most", "limit"], ["beyond"]),
        helper.make_node("Relu", ["beyond"], ["mark"]),
        helper.make_node("Add", ["x", "mark"], ["y"]),
    ]
    held = [numpy_helper.from_array(np.array(50, np.float32), "limit")]
    backbone = open_pretrained(write_graph(tmp_path / "net.onnx", nodes, held=held), "backbone")
    inputs = torch.zeros(4, 1, 6)
    changed = inputs.clone()
    changed[2] = 1000.0
    differs = (backbone.encode(changed) != backbone.encode(inputs)).any(dim=1)
    assert differs.tolist() == [False, False, True, False]


def _hold(**numbers: Any) -> list[Any]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()]


_COUNTED = [
    helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
    helper.make_node("Cast", ["most"], ["count"], to=TensorProto.INT64),
    helper.make_node("Range", ["zero", "count", "one"], ["steps"]),
    helper.make_node("Cast", ["steps"], ["y"], to=TensorProto.FLOAT),
]


@pytest.mark.parametrize(
    ("nodes", "held", "message"),
    [
        (_COUNTED, _hold(zero=0, one=1), "in which a record's values decide what Range gives back"),
        # onnxruntime puts operators in order: what is counted would be looked at before it is known to be values.
        (_COUNTED[::-1], _hold(zero=0, one=1), "whose operators do not stand in order"),
        (
            [helper.make_node("Dropout", ["x", "half", "yes"], ["y"])],
            _hold(half=np.float32(0.5), yes=True),
            "that leaves out features at random",
        ),
        (
            [
                helper.make_node(
                    "Constant",
                    [],
                    ["s"],
                    sparse_value=helper.make_sparse_tensor(_hold(v=[1.0])[0], _hold(i=[0])[0], [2]),
                ),
                helper.make_node("Add", ["x", "s"], ["y"]),
            ],
            [],
            "with graphs, lists of tensors or sparse tensors",
        ),
    ],
)
def test_what_would_depend_on_more_than_public_shapes_is_refused(
    nodes: Any, held: Any, message: str, tmp_path: Path
) -> None:
    settings = write_graph(tmp_path / "net.onnx", nodes, held=held)
    with pytest.raises(BadInput, match=rf"backbone\.weights: refused a graph {message}"):
        open_pretrained(settings, "backbone")


def test_shapes_that_follow_from_shapes_are_read(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["length"]),
        helper.make_node("Concat", ["rest", "length"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    settings = write_graph(tmp_path / "net.onnx", nodes, held=_hold(last=np.array([2]), rest=np.array([-1])))
    assert open_pretrained(settings, "backbone").feature_dim == 6


def test_a_short_graph_cannot_take_a_machines_memory(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["count"], ["many"]),
        helper.make_node("ReduceSum", ["many"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    settings = write_graph(tmp_path / "net.onnx", nodes, held=_hold(count=np.array([1 << 36])))
    with pytest.raises(BadInput, match=r"backbone\.reads: expected inputs that the graph takes, in 8 GiB of memory"):
        open_pretrained(settings, "backbone")


def test_weights_in_other_files_are_read_from_the_graphs_own_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_graph(tmp_path / "net.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])])
    inside = str(tmp_path / "model" / "net.onnx")
    onnx.save(
        onnx.load(str(tmp_path / "net.onnx")), inside, save_as_external_data=True, location="net.bin", size_threshold=0
    )
    settings = {"kind": "onnx", "weights": inside, "reads": SERIES}
    whole = {**settings, "weights": str(tmp_path / "net.onnx")}
    assert open_pretrained(settings, "backbone").digest == open_pretrained(whole, "backbone").digest
    outside = onnx.load(str(tmp_path / "model" / "net.onnx"), load_external_data=False)
    (tmp_path / "secret.bin").write_bytes(WEIGHTS.tobytes())
    for entry in outside.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret.bin"
    (tmp_path / "model" / "net.onnx").write_bytes(outside.SerializeToString())
    with pytest.raises(BadInput, match=r"backbone\.weights: refused a graph whose weights lie outside"):
        open_pretrained(settings, "backbone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "z"}, r"backbone\.output: expected the name of a tensor that the graph makes, such as 'y'"),
        ({"axis": 5}, r"backbone\.axis: expected an axis of the output from 1 to 2, got 5"),
        ({"fill": {"state": 0}}, r"backbone\.fill: expected inputs of the graph, x, got 'state'"),
        ({"reads": {"series": {"length": 7}}}, r"backbone\.reads: expected inputs that the graph takes"),
        ({"reads": {}}, r"backbone\.reads: expected exactly one of pictures, recordings, series and volumes"),
        ({"weights": "absent.onnx"}, r"backbone\.weights: expected a readable ONNX file, .*no such file"),
    ],
)
def test_wrong_settings_are_one_sentence_with_the_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = write_graph(tmp_path / "net.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])])
    with pytest.raises(BadInput, match=message):
        open_pretrained({**settings, **changes}, "backbone")


def test_bytes_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x80\x04 no graph")
    with pytest.raises(BadInput, match=r"backbone\.weights: expected a readable ONNX file"):
        open_pretrained({"kind": "onnx", "weights": str(path), "reads": SERIES}, "backbone")


def _find(package: str, name: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package}")
    return str(next(Path(spec.submodule_search_locations[0]).rglob(name)))


def test_a_pitch_network_tells_a_low_tone_from_a_high_one() -> None:
    settings = {
        "kind": "onnx",
        "weights": _find("basic_pitch", "nmp.onnx"),
        "reads": {"recordings": {"sample_rate": 22050, "samples": 43844}},
        "axis": -1,
    }
    backbone = open_pretrained(settings, "backbone")
    times = np.arange(16000) / 8000
    tones = [Audio(np.sin(2 * np.pi * pitch * times).astype(np.float32), 8000) for pitch in (220.0, 880.0)]
    low_D, high_D = backbone.encode([backbone.preprocess(tone) for tone in tones])
    # 88 keys of a piano from A0 at 27.5 Hz: A3 is key 36, A5 key 60.
    assert (int(low_D.argmax()), int(high_D.argmax())) == (36, 60)


def test_a_voice_network_keeps_its_state_over_a_recordings_pieces() -> None:
    settings = {
        "kind": "onnx",
        "weights": _find("silero_vad", "silero_vad_16k_sequence.onnx"),
        "reads": {"recordings": {"sample_rate": 16000, "samples": 16000, "window": 576, "step": 512}},
        "fill": {"h": 0, "c": 0},
    }
    backbone = open_pretrained(settings, "backbone")
    assert backbone.feature_dim == 31
