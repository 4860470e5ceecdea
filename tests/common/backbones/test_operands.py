"""Programs that hand to torch's operators what their kernels believe: nothing is read beyond a tensor, nothing ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from common.backbones.parts.graphs.program import Program, ProgramNetwork, Step
from common.types import BadInput

INPUT, LAST = {"at": 0}, {"at": 1}
WIDE = {"dtype": "float32"}
WHOLE = {"dtype": "int64"}


def make_ones(number: int, *size: int, dtype: Mapping[str, str] = WIDE) -> Step:
    """Returns a step that gives ones."""
    return Step("ones.default", {"size": list(size), "dtype": dtype}, [number])


def run(steps: list[Step]) -> torch.Tensor:
    """Returns what a program gives for one series of two channels and six steps; value 0 is the series."""
    data = Program([], steps, steps[-1].outputs[0]).write()
    network = ProgramNetwork(len(data), 1, 0, None, windows=False)
    network.program.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    features_BD: torch.Tensor = network(torch.linspace(0, 1, 12).reshape(1, 2, 6))
    return features_BD


def normalise(name: str, **further: Any) -> list[Step]:
    """Returns steps with one statistic for two channels."""
    statistics = {key: LAST for key in ("weight", "bias", "running_mean", "running_var")}
    return [
        make_ones(1, 1),
        Step(name, {"input": INPUT, **statistics, "momentum": 0.1, "eps": 1e-5, **further}, [2, 3, 4]),
    ]


def recur(rows: int, hidden: int, records: int = 1, depth: int = 0) -> list[Step]:
    """Returns steps of an LSTM over the series, whose weights have so many rows, and a second state more axes."""
    weights = [{"at": 2}, {"at": 3}]
    plain = {"has_biases": False, "num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False}
    arguments = {"input": INPUT, "hx": [LAST, {"at": 4}], "params": weights, **plain, "batch_first": True}
    state = (1, records, hidden)
    shapes = [state, (rows, 6), (rows, hidden), (*state, depth) if depth else state]
    return [
        *(make_ones(number, *shape) for number, shape in enumerate(shapes, 1)),
        Step("lstm.input", arguments, [5, 6, 7]),
    ]


def resize(scale: float) -> list[Step]:
    """Returns steps that make a picture of 3 x 3 from one of 6 x 6."""
    arguments = {"self": LAST, "output_size": [3, 3], "align_corners": False, "scales_h": scale, "scales_w": scale}
    return [make_ones(1, 1, 1, 6, 6), Step("_upsample_bilinear2d_aa.default", arguments, [2])]


def divide(mode: str) -> list[Step]:
    """Returns steps that divide the least whole number by -1."""
    least = Step("full.default", {"size": [1, 9], "fill_value": -(2**63), "dtype": WHOLE}, [1])
    quotient = Step("div.Scalar_mode", {"self": LAST, "other": -1, "rounding_mode": mode}, [2])
    return [least, quotient, Step("to.dtype", {"self": {"at": 2}, "dtype": WIDE}, [3])]


def choose(name: str, place: int, **further: Any) -> list[Step]:
    """Returns steps that look up one place of three."""
    rows, index = make_ones(1, 3), Step("full.default", {"size": [1], "fill_value": place, "dtype": WHOLE}, [2])
    given = {"indices": [{"at": 2}]} if name == "index.Tensor" else {"index": {"at": 2}}
    return [rows, index, Step(name, {"self": LAST, **given, **further}, [3])]


HOSTILE = {
    "batch_norm": normalise("native_batch_norm.default", training=False),
    "batch_norm_later": normalise("_native_batch_norm_legit_no_training.default"),
    "no_statistics": [
        Step("native_batch_norm.default", {"input": INPUT, "training": False, "momentum": 0.1, "eps": 1e-5}, [1, 2, 3]),
    ],
    "lstm_rows": recur(4, 512),
    "lstm_records": recur(64, 16, records=2),
    "lstm_states": recur(64, 16, depth=4),
    "weight_norm": [make_ones(1, 1), Step("_weight_norm.default", {"v": INPUT, "g": LAST, "dim": 0}, [2])],
    "resize": resize(0.001),
    "divide": divide("trunc"),
    "number_format": [Step("zeros.default", {"size": [2], "dtype": 100_000}, [1])],
    "pool": [
        Step("max_pool1d.default", {"self": INPUT, "kernel_size": [1 << 40], "stride": [1], "padding": [1 << 39]}, [1])
    ],
    "pieces": [
        Step("expand.default", {"self": INPUT, "size": [1 << 20, 2, 6]}, [1]),
        Step("unbind.int", {"self": LAST, "dim": 0}, [2]),
    ],
    "place": choose("index_select.default", 3, dim=0),
    "place_below": choose("gather.default", -1, dim=0),
    "place_of_index": choose("index.Tensor", -4),
}


@pytest.mark.parametrize("steps", HOSTILE.values(), ids=HOSTILE)
def test_operands_that_torch_would_believe_are_refused(steps: list[Step]) -> None:
    with pytest.raises(BadInput, match=f"with which {steps[-1 - (steps[-1].name == 'to.dtype')].name} gives"):
        run(steps)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("int.mul", {"0": "a", "1": 1 << 30}, [1])], "counts with what is no number"),
        ([Step("int.mod", {"0": "%999999999d", "1": 1}, [1])], "counts with what is no number"),
        ([Step("mul.left_t", {"l": [1], "n": 1 << 30}, [1])], "'mul.left_t', which gives no tensor"),
        ([Step("add.str", {"a": "a", "b": "a"}, [1])], "'add.str', which gives no tensor"),
        (
            [
                Step("expand.default", {"self": INPUT, "size": [1 << 50, 2, 6]}, [1]),
                Step("sum.default", {"self": LAST}, [2]),
            ],
            "too many numbers one after the other",
        ),
    ],
    ids=["text", "format", "list", "texts", "repeated"],
)
def test_nothing_grows_beyond_the_bounds(steps: list[Step], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(steps)


def test_operands_that_fit_are_taken() -> None:
    assert run(recur(64, 16)).shape == (1, 32)
    assert run(resize(0.5)).shape == (1, 9)
    assert run(divide("floor")).shape == (1, 9)
    assert run(choose("index.Tensor", -3)).tolist() == [[1.0]]
    whole = [make_ones(1, 2), *normalise("native_batch_norm.default", training=False)[1:]]
    assert run(whole).shape == (1, 12)
