"""ONNX graphs as bytes that travel, and a module that runs them.

Invariants: a graph that is run holds operators of a fixed list alone, all of ONNX's own domain: none draws random
numbers, loops, branches, reads a file or calls code that a library brings. Its weights are inside, and no tensor's
shape follows from a record's values: every record takes the same memory. A runtime of one thread gives the same numbers
every time. Each record is read by itself, because a graph can do anything along the axis of records: it could add one
record's values to all others' features, and do so for that record alone, which no trial on made-up inputs would show.

# Shapes: B records, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor, nn

from common.backbones.parts.graphs.reads import average_axes
from common.errors import instead, plain
from common.types import BadInput

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

MAX_BYTES = (2 << 30) - 1
"""Bytes of a graph at most: the file format has no longer ones."""

MAX_MEMORY = 8 << 30
"""Bytes that graphs' tensors take at most, together: a short file can ask for any number of them."""

_NAMES = (
    "Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant "
    "ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear "
    "Einsum Elu Equal Erf Exp Expand Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool "
    "GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization "
    "LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul MatMulInteger Max "
    "MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow QuantizeLinear RMSNormalization RNN Range Reciprocal "
    "ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
    "Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign "
    "SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor"
)
ALLOWED = frozenset(_NAMES.split())
"""Operators of a graph: each gives the same numbers for the same input, and ends."""

_SHAPING = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""Operator -> which of its inputs decide its output's shape. Reductions' axes also do."""

_PLAIN = ("FLOAT", "INT", "STRING", "TENSOR", "FLOATS", "INTS", "STRINGS")
"""Types of an attribute: all but graphs, lists of tensors and sparse ones."""


def read_graph(path: Path, output: str | None, fill: Mapping[str, float]) -> bytes:
    """Returns a file's graph, cut off behind one tensor, with everything that it needs inside.

    Args:
        path: the file; weights beside it are read from its own folder alone.
        output: name of the tensor, which need not be an output of the file's; None for its first output.
        fill: number with which each further input is filled.

    Raises:
        BadInput: no graph, one that `check_graph` refuses, weights elsewhere, or an unknown name.
    """
    onnx = _import("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            for place in places:
                if not (path.parent / place).resolve().is_relative_to(path.parent.resolve()):
                    raise BadInput("weights: refused a graph whose weights lie outside of its own folder")
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, TypeError, RuntimeError, onnx.checker.ValidationError, _decode_error()) as error:
        raise BadInput(f"weights: expected a readable ONNX file, got none at {path}{instead(error)}") from error
    _cut(model, output)
    _fill(model, fill)
    check_graph(model)
    data: bytes = _strip(model).SerializeToString(deterministic=True)
    if len(data) > MAX_BYTES:
        raise BadInput("weights: expected a graph of less than 2 GiB")
    return data


def check_graph(model: onnx.ModelProto) -> None:
    """Refuses a graph with anything but operators of the list, weights inside and public shapes. Raises BadInput."""
    onnx = _import("onnx")
    if model.functions or model.training_info or model.graph.sparse_initializer:
        raise BadInput("weights: refused a graph with functions, training or sparse weights of its own")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ALLOWED:
            name = plain(repr(f"{node.domain}:{node.op_type}".lstrip(":")), 80)
            raise BadInput(
                f"weights: refused a graph with the operator {name}, which is not one of those that are run here; "
                "export without branches and loops, or name an `output` in front of it"
            )
        if node.op_type == "Dropout" and any(node.input[2:]):
            raise BadInput("weights: refused a graph that leaves out features at random, as in training")
        types = onnx.AttributeProto.AttributeType
        if any(types.Name(attribute.type) not in _PLAIN or _is_nested(attribute) for attribute in node.attribute):
            raise BadInput("weights: refused a graph with graphs, lists of tensors or sparse tensors inside")
    held = [*model.graph.initializer, *(each.t for node in model.graph.node for each in node.attribute)]
    if any(tensor.external_data or tensor.data_location for tensor in held):
        raise BadInput("weights: refused a graph whose weights lie in other files")
    _refuse_shapes_of_values(model)


def _is_nested(attribute: onnx.AttributeProto) -> bool:
    lists = (attribute.graphs, attribute.tensors, attribute.sparse_tensors, attribute.type_protos)
    return any(lists) or any(attribute.HasField(name) for name in ("g", "sparse_tensor", "tp"))


def _refuse_shapes_of_values(model: onnx.ModelProto) -> None:
    """Refuses a graph of which one record's values could decide how much memory it takes.

    Whatever an operator makes of values is values, but for a tensor's shape: shapes are made of shapes alone.
    """
    held = {each.name for each in model.graph.initializer}
    values = {each.name for each in model.graph.input} - held
    known = held | values | {""}
    for node in model.graph.node:
        # Else values could come by a way that is looked at too late: onnxruntime puts operators in order itself.
        if not known.issuperset(node.input):
            raise BadInput("weights: refused a graph whose operators do not stand in order")
        known.update(node.output)
        shaping = (1,) if node.op_type.startswith("Reduce") else _SHAPING.get(node.op_type, ())
        if any(at < len(node.input) and node.input[at] in values for at in shaping):
            raise BadInput(
                f"weights: refused a graph in which a record's values decide what {node.op_type} gives back; name an "
                "`output` in front of it"
            )
        if node.op_type not in ("Shape", "Size") and values & set(node.input):
            values |= set(node.output) - {""}


def draw_graph(data: bytes) -> bytes:
    """Returns a graph of as many bytes with random weights, from torch's current generator.

    Weights of two and more dimensions are drawn so that they keep the size of what passes; others stay, such as
    normalisations'.
    """
    onnx = _import("onnx")
    model = onnx.ModelProto.FromString(data)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2 and math.prod(tensor.dims):
            fan_in = math.prod(tensor.dims) / max(tensor.dims[0], 1)
            values = torch.randn(*tensor.dims) * math.sqrt(2.0 / max(fan_in, 1.0))
            tensor.raw_data = values.numpy().astype("<f4").tobytes()
    drawn: bytes = model.SerializeToString(deterministic=True)
    return drawn


@final
class _Session:
    """A runtime's session. It keeps nothing between two runs, so that copies of a module may share it.

    What it is given is the graph that was checked, written anew: bytes that can be read as something else are not run.
    """

    def __init__(self, data: bytes) -> None:
        onnx, onnxruntime = _import("onnx"), _import("onnxruntime")
        try:
            model = onnx.ModelProto.FromString(data)
        except _decode_error() as error:
            raise BadInput("backbone: expected an ONNX graph among the weights, got other bytes") from error
        model.DiscardUnknownFields()
        check_graph(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.load_model_format", "ONNX")
        _bound_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except _list_errors() as error:
            raise BadInput(f"weights: expected a graph that onnxruntime opens, got {type(error).__name__}") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            names = ", ".join(f"{each.name} ({each.type})" for each in inputs)
            raise BadInput(f"weights: expected a graph with one input of float32, got {names}; name others in `fill`")
        self._input, self._shape = inputs[0].name, inputs[0].shape

    def __deepcopy__(self, memo: dict[int, Any]) -> _Session:
        return self

    def run(self, values_B: NDArray[np.float32]) -> NDArray[np.float32]:
        # Axes of length 1, such as one channel, are the graph's own affair.
        while self._shape and values_B.ndim < len(self._shape):
            ones = [axis for axis in range(1, len(self._shape)) if self._shape[axis] == 1]
            if not ones:
                break
            values_B = np.expand_dims(values_B, ones[-1])
        try:
            (result,) = self._session.run(None, {self._input: values_B})
        except _list_errors() as error:
            shapes = f"{values_B.shape[1:]}, the graph says {self._shape[1:]}"
            raise BadInput(
                f"reads: expected inputs that the graph takes, in {MAX_MEMORY >> 30} GiB of memory, got {shapes}"
            ) from error
        values: NDArray[np.float32] = np.asarray(result, dtype=np.float32)
        return values


@cache
def _bound_memory() -> None:
    onnxruntime = _import("onnxruntime")
    arena = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    info = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg({"max_mem": MAX_MEMORY}))


@final
class OnnxNetwork(nn.Module):
    """A graph, its bytes a buffer among the weights, run by onnxruntime on the CPU."""

    graph: Tensor

    def __init__(self, num_bytes: int, width: int, axis: int | None, windows: bool) -> None:
        """Creates a network whose graph is still to be filled in.

        Args:
            num_bytes: length of the graph.
            width: number of features.
            axis: axis of the output, counted with that of records, that holds features; means are taken over all
                others. None keeps all numbers.
            windows: whether a record is the graph's whole batch, piece after piece; means are taken over it.
        """
        super().__init__()
        self.register_buffer("graph", torch.zeros(num_bytes, dtype=torch.uint8))
        self._width, self._axis, self._windows = width, axis, windows
        self._session: _Session | None = None

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns features_BD. Raises BadInput where the graph does not take such inputs, or has another width."""
        if self._session is None:
            self._session = _Session(self.graph.cpu().numpy().tobytes())
        values_B = inputs_B.detach().to("cpu", torch.float32).contiguous().numpy()
        if self._windows:
            outputs = [self._session.run(row_WL)[None] for row_WL in values_B]
        else:
            outputs = [self._session.run(values_B[row : row + 1]) for row in range(len(values_B))]
        features_BD = torch.cat([average_axes(torch.from_numpy(output_1), self._axis) for output_1 in outputs])
        if self._width and features_BD.shape[1] != self._width:
            raise BadInput(f"weights: expected a graph with {self._width} features, got {features_BD.shape[1]}")
        return features_BD.contiguous().to(inputs_B.device)


def measure_width(data: bytes, axis: int | None, windows: bool, inputs_B: Tensor) -> int:
    """Returns the number of features that a graph gives.

    Args:
        data: the graph.
        axis: axis of features, as in the settings.
        windows: whether a record is the graph's whole batch.
        inputs_B: any inputs.

    Raises:
        BadInput: it does not take them.
    """
    network = OnnxNetwork(len(data), 0, axis, windows)
    network.graph.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return int(network(inputs_B).shape[1])


def _cut(model: onnx.ModelProto, output: str | None) -> None:
    onnx = _import("onnx")
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    name = output or (graph.output[0].name if graph.output else "")
    if name not in made:
        raise BadInput(f"output: expected the name of a tensor that the graph makes, such as {graph.output[0].name!r}")
    needed, waiting = set(), [name]
    while waiting:
        each = waiting.pop()
        if each not in needed:
            needed.add(each)
            waiting += made[each].input if each in made else ()
    nodes = [node for node in graph.node if needed & set(node.output)]
    inputs = [each for each in graph.input if each.name in needed]
    weights = [each for each in graph.initializer if each.name in needed]
    constants = [node for node in nodes if node.op_type == "Constant" and node.attribute[0].name == "value"]
    for node in constants:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        weights.append(tensor)
    held = {node.output[0] for node in constants}
    kept = [node for node in nodes if node.output[0] not in held]
    for field, values in (("node", kept), ("input", inputs), ("initializer", weights)):
        copies = [type(each).FromString(each.SerializeToString()) for each in values]
        graph.ClearField(field)
        getattr(graph, field).extend(copies)
    outputs = [each for each in graph.output if each.name == name]
    value = outputs[0] if outputs else onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    value = type(value).FromString(value.SerializeToString())
    graph.ClearField("output")
    graph.output.append(value)


def _fill(model: onnx.ModelProto, fill: Mapping[str, float]) -> None:
    onnx = _import("onnx")
    graph = model.graph
    held = {each.name for each in graph.initializer}
    # Old files list weights among the inputs.
    free = {each.name: each for each in graph.input if each.name not in held}
    for name, value in fill.items():
        if name not in free:
            raise BadInput(f"fill: expected inputs of the graph, {', '.join(free)}, got {name!r}")
        kind = free[name].type.tensor_type
        shape = [dim.dim_value or 1 for dim in kind.shape.dim]
        values = np.full(shape, value, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    remaining = [free[name] for name in free if name not in fill]
    copies = [type(each).FromString(each.SerializeToString()) for each in remaining]
    graph.ClearField("input")
    graph.input.extend(copies)


def _strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a graph without remarks, which may name paths, and with all numbers as raw bytes."""
    onnx = _import("onnx")
    model.ClearField("metadata_props")
    for holder in (model, model.graph, *model.graph.node):
        holder.ClearField("doc_string")
    for node in model.graph.node:
        node.ClearField("metadata_props")
    model.producer_name = model.producer_version = ""
    model.graph.ClearField("value_info")
    model.graph.ClearField("metadata_props")
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("doc_string")
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.HasField("raw_data"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return model


def _decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError

    error: type[Exception] = DecodeError
    return error


def _list_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of onnxruntime, which have no common class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as own

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return (*(getattr(own, name) for name in names), RuntimeError, ValueError)


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f'kind: expected the package {name}; run pip install "headwater[onnx]"') from error
