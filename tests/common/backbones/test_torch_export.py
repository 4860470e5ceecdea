"""Exported programs as backbones: the network's own numbers, and nothing of a file that could run, draw or remember."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from common.backbones import resolve_settings, write_spec
from common.backbones.parts.graphs.program import Program, ProgramNetwork, Step
from common.backbones.parts.weights import compute_digest
from common.model.backbones import load_blob, open_pretrained
from common.plugins import resolve
from common.types import BackboneBlob, BadInput

SERIES = {"series": {"length": 6, "channels": 2}}


class Recurrent(nn.Module):
    """Reads a series by a convolution, two directions of an LSTM and a constant; one activation works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.layers = nn.LSTM(4, 3, batch_first=True, bidirectional=True)

    def forward(self, series_BCT: Tensor) -> Tensor:
        hidden_BCT = nn.functional.relu_(self.norm(self.first(series_BCT)))
        states_BTD, _ = self.layers(nn.functional.dropout(hidden_BCT, 0.5, self.training).transpose(1, 2))
        return torch.cat([states_BTD.mean(1) * torch.tensor([2.0]), states_BTD[:, -1]], dim=1)


class Called(nn.Module):
    """Calls a function."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, values: Tensor) -> Tensor:
        return self.call(values)


class Counting(nn.Module):
    """Adds what it has read before to what it reads."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, series_BCT: Tensor) -> Tensor:
        self.seen.add_(series_BCT.sum(dim=(0, 1)))
        return series_BCT * self.seen


def export(path: Path, net: nn.Module, *, free: bool = False) -> dict[str, Any]:
    """Saves a network's program, and returns settings that read it."""
    shapes = ({0: torch.export.Dim("records")},) if free else None
    inputs = (torch.randn(2 if free else 1, 2, 6),)
    torch.export.save(torch.export.export(net.eval(), inputs, dynamic_shapes=shapes), path)
    return {"kind": "torch_export", "weights": str(path), "reads": SERIES}


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Changes the entries of an archive."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.parametrize("free", [False, True])
def test_a_program_gives_the_numbers_of_its_network(free: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = Recurrent()
    assert isinstance(net.norm.running_mean, Tensor)
    nn.init.normal_(net.norm.running_mean)
    settings = export(tmp_path / "net.pt2", net, free=free)
    inputs_B = torch.randn(4, 2, 6)
    with torch.no_grad():
        expected_BD = net(inputs_B)
    received = load_blob(open_pretrained(settings, "backbone").blob())
    torch.testing.assert_close(received.encode(inputs_B), expected_BD, rtol=1e-5, atol=1e-6)


def test_a_digest_does_not_depend_on_where_a_file_was_made(tmp_path: Path) -> None:
    first = open_pretrained(export(tmp_path / "net.pt2", Called(torch.tanh)), "backbone")
    again = open_pretrained(export(tmp_path / "again.pt2", nn.Sequential(nn.Tanh())), "backbone")
    assert first.digest == again.digest
    assert str(tmp_path).encode() not in first.blob().weights


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Called(lambda values: values + torch.rand_like(values)), "the operator 'rand_like.default'"),
        (Called(lambda values: values[values > 0][:0].sum() + values), "decide what index gives back"),
        (
            Called(lambda values: torch.cond(values.sum() > 0, torch.sin, torch.cos, (values,))),
            "'graph' as an argument",
        ),
        (Called(lambda values: torch.empty_like(values)), "the operator 'empty_like.default'"),
        (Called(lambda values: values.new_ones(1 << 20, 1 << 20).sum() + values), "takes more than 8 GiB"),
        (Called(lambda values: nn.functional.dropout(values, 0.5, True)), "as in training"),
        (Called(lambda values: values[:, 0].clone().view(6).zero_() + values), "zero_ changes a tensor in place"),
        (Counting(), "add_ changes a tensor in place"),
    ],
    ids=["random", "shape", "branch", "unset", "memory", "training", "in_place", "state"],
)
def test_what_draws_branches_remembers_or_grows_is_refused(net: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        open_pretrained(export(tmp_path / "net.pt2", net), "backbone")


def test_a_program_that_changes_its_own_buffers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    program = torch.export.export(Counting(), (torch.randn(1, 2, 6),)).run_decompositions({})
    torch.export.save(program, path)
    with pytest.raises(BadInput, match="keeps something for the next record"):
        open_pretrained({"kind": "torch_export", "weights": str(path), "reads": SERIES}, "backbone")


def test_a_program_for_several_records_at_once_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(nn.Tanh(), (torch.randn(3, 2, 6),)), path)
    with pytest.raises(BadInput, match="whose batch is one record, or free, got a batch of 3"):
        open_pretrained({"kind": "torch_export", "weights": str(path), "reads": SERIES}, "backbone")


def test_no_text_of_a_file_is_evaluated_and_no_pickle_read(tmp_path: Path) -> None:
    path, marker = tmp_path / "net.pt2", tmp_path / "ran"
    settings = export(path, nn.Sequential(nn.Linear(6, 6)), free=True)
    wanted = open_pretrained(settings, "backbone").digest
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def change(name: str, data: bytes) -> bytes:
        if name.endswith("model.json"):
            model = json.loads(data)
            for meta in model["graph_module"]["graph"]["tensor_values"].values():
                for size in meta["sizes"]:
                    if "as_expr" in size:
                        size["as_expr"]["expr_str"] = code
            model["guards_code"] = [code]
            return json.dumps(model).encode()
        if name.endswith("model.pt"):
            return f"cpathlib\nPath\n(S{str(marker)!r}\ntR(dtR.".encode()
        return data

    rewrite(path, change)
    assert open_pretrained(settings, "backbone").digest == wanted
    assert not marker.exists()
    rewrite(path, lambda name, data: data.replace(b'"use_pickle": false', b'"use_pickle": true'))
    with pytest.raises(BadInput, match="whose tensors are pickled"):
        open_pretrained(settings, "backbone")


def test_another_zip_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.save({"weight": torch.ones(2)}, path)
    settings = {"kind": "torch_export", "weights": str(path), "reads": SERIES}
    with pytest.raises(
        BadInput, match=r"backbone\.weights: expected a program that torch\.export saved, found no graph"
    ):
        open_pretrained(settings, "backbone")
    path.write_bytes(b"not a zip")
    with pytest.raises(BadInput, match="got BadZipFile"):
        open_pretrained(settings, "backbone")


def make_network(steps: list[Step], result: int) -> ProgramNetwork:
    """Returns a network as a coordinator that was changed could send it; value 0 is the input."""
    data = Program([], steps, result).write()
    network = ProgramNetwork(len(data), 1, 0, None, windows=False)
    network.program.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return network


AT = {"at": 0}
SQUARES: Mapping[str, Any] = {"0": {"at": 1}, "1": {"at": 1}}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("add_.Tensor", {"self": AT, "other": AT}, [1])], "the operator 'add_.Tensor'"),
        ([Step("relu.out", {"self": AT}, [1])], "'relu.out', which this torch does not have"),
        ([Step("__class__.mro", {}, [1])], "the operator '__class__.mro'"),
        ([Step("add.__class__", {}, [1])], "which this torch does not have"),
        ([Step("int.__import__", {"0": "os"}, [1])], "the operator 'int.__import__'"),
        ([Step("from_file.default", {"filename": "/etc/passwd"}, [1])], "the operator 'from_file.default'"),
        ([Step("relu.default", {"self": {"at": 2}}, [1])], "do not stand in order"),
        ([Step("relu.default", {"self": {"at": -1}}, [1])], "do not stand in order"),
        ([Step("relu.default", {"self": AT}, [0])], "not numbered in order"),
        ([Step("relu.default", {"self": AT, "out": AT}, [1])], "has out as in training"),
        ([Step("to.device", {"self": AT, "device": "cuda", "dtype": {"dtype": "float32"}}, [1])], "has device"),
        ([Step("to.dtype", {"self": AT, "dtype": {"dtype": "object"}}, [1])], "no plain value"),
        (
            [
                Step("sym_size.int", {"self": AT, "dim": 1}, [1]),
                *(Step("int.mul", {"0": {"at": n}, "1": {"at": n}}, [n + 1]) for n in range(1, 40)),
            ],
            "counts beyond all lengths",
        ),
    ],
)
def test_a_site_checks_the_program_that_it_receives(steps: list[Step], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_network(steps, len(steps))(torch.zeros(1, 2, 6))


def test_a_changed_program_is_refused_where_it_arrives(tmp_path: Path) -> None:
    right = open_pretrained(export(tmp_path / "net.pt2", nn.Sequential(nn.Tanh())), "backbone")
    state = load(bytes(right.blob().weights))
    (name,) = (name for name in state if name.endswith("program"))
    data = state[name].numpy().tobytes().replace(b"tanh.default", b"rand.default")
    state[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    spec = write_spec(resolve_settings(resolve("common.backbones", right.public_spec(), "backbone")))
    sent = BackboneBlob(spec=spec, weights=save(state), digest=compute_digest(spec, state.items()))
    with pytest.raises(BadInput, match=r"the operator 'rand\.default'"):
        load_blob(sent).encode(torch.zeros(1, 2, 6))


def test_a_records_features_do_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    net = Called(lambda values: values + values.amax().sub(50.0).clamp(min=0))
    backbone = open_pretrained(export(tmp_path / "net.pt2", net, free=True), "backbone")
    inputs_B = torch.zeros(4, 2, 6)
    changed_B = inputs_B.clone()
    changed_B[2] = 1000.0
    differs = (backbone.encode(changed_B) != backbone.encode(inputs_B)).any(dim=1)
    assert differs.tolist() == [False, False, True, False]


def test_an_inner_value_can_be_the_features(tmp_path: Path) -> None:
    settings = export(tmp_path / "net.pt2", Called(lambda values: values.tanh().sum(dim=2)))
    inner = open_pretrained({**settings, "output": "tanh", "axis": 1}, "backbone")
    series_TC = np.arange(12, dtype=np.float32).reshape(6, 2)
    features_BD = inner.encode(inner.preprocess(series_TC)[None])
    torch.testing.assert_close(features_BD[0], inner.preprocess(series_TC).tanh().mean(dim=1))
    with pytest.raises(BadInput, match=r"backbone\.output: expected the name of a value"):
        open_pretrained({**settings, "output": "nowhere"}, "backbone")


def test_one_number_that_is_repeated_without_end_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    settings = export(tmp_path / "net.pt2", nn.Sequential(nn.Linear(6, 6)))

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("model_weights_config.json"):
            return data
        values = json.loads(data)
        for entry in values["config"].values():
            entry["tensor_meta"]["sizes"] = [{"as_int": 1 << 31}]
            entry["tensor_meta"]["strides"] = [{"as_int": 0}]
        return json.dumps(values).encode()

    rewrite(tmp_path / "net.pt2", change)
    with pytest.raises(BadInput, match="whose tensors take more than 2 GiB"):
        open_pretrained(settings, "backbone")
