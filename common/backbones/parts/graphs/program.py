"""Programs of torch's operators as data that travels, and a module that runs them.

A program is JSON: tensors, steps and the value that is the result. Nothing of it is Python, and torch's own loader,
which evaluates texts of a file, is never asked. Invariants: a step calls one operator of a fixed list; none changes a
tensor in place, draws random numbers, calls a function, hands on memory that was not written, or gives a tensor whose
shape follows from values. So nothing stays from one record for the next, and a run without memory (device meta) says
before any record what every record takes. Each record is read by itself, as in `onnx_graph`.

# Shapes: B records, D features.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from common.backbones.parts.graphs.operands import check_operands, count_numbers
from common.backbones.parts.graphs.reads import average_axes
from common.errors import plain
from common.types import BadInput

MAX_MEMORY = 8 << 30
"""Bytes that the values of a program take at most at one time."""

MAX_NUMBERS = 1 << 40
"""Numbers that the steps of a program read and give at most: each takes time, also of a tensor that repeats one."""

MAX_STEPS = 200_000
_MAX_INTEGER = 1 << 62

_NAMES = (
    "abs acos acosh adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul "
    "addmm alias all amax amin any arange argmax argmin argsort asin asinh atan atan2 atanh avg_pool1d avg_pool2d "
    "avg_pool3d baddbmm bartlett_window batch_norm bilinear bitwise_and bitwise_not bitwise_or bitwise_xor "
    "blackman_window bmm broadcast_to bucketize cat ceil celu chunk clamp clamp_max clamp_min clone concat "
    "constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "_convolution cos cosh cosine_similarity cummax cumprod cumsum deg2rad detach diagonal diff div dot dropout "
    "einsum elu embedding eq erf erfc exp exp2 expand expand_as expm1 eye _fft_c2c _fft_c2r fft_fft fft_fft2 "
    "fft_ifft fft_irfft _fft_r2c fft_rfft fft_rfft2 fill flatten flip floor floor_divide fmod full full_like gather "
    "ge gelu glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gt hamming_window hann_window "
    "hardshrink hardsigmoid hardswish hardtanh hypot imag index index_select instance_norm isfinite isinf isnan "
    "layer_norm le leaky_relu lerp lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log log10 log1p "
    "log2 log_sigmoid _log_softmax log_softmax logaddexp logical_and logical_not logical_or logical_xor logit "
    "logsumexp lstm lt masked_fill matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d "
    "max_pool3d_with_indices maximum mean median min minimum mish mm movedim mul mv nan_to_num nanmean nansum "
    "narrow native_batch_norm _native_batch_norm_legit_no_training native_group_norm native_layer_norm ne neg "
    "new_full new_ones new_zeros norm numpy_T ones ones_like outer pad permute pixel_shuffle pixel_unshuffle polar "
    "pow prelu _prelu_kernel prod real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 "
    "remainder repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as "
    "rms_norm rnn_relu rnn_tanh roll rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter "
    "select select_scatter selu sgn sigmoid sign silu sin sinh slice slice_scatter softmax _softmax softmin "
    "softplus softshrink softsign sort split split_with_sizes sqrt square squeeze stack std std_mean stft sub sum "
    "swapaxes sym_numel sym_size t take_along_dim tan tanh tile to _to_copy topk transpose tril triu trunc type_as "
    "unbind unflatten unfold unsafe_chunk unsafe_split _unsafe_view unsqueeze upsample_bicubic2d "
    "_upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_trilinear3d var var_mean view view_as view_as_complex view_as_real "
    "_weight_norm where zeros zeros_like"
)
ALLOWED = frozenset(_NAMES.split())
"""Operators of a program: each gives the same numbers for the same input, and ends."""

_INTEGERS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv")},
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
    "max": max,
    "min": min,
    "float": float,
    "int": int,
    "bool": bool,
}
"""Functions of lengths, which are numbers of Python's."""

_COUNTS = ("sym_size", "sym_numel")
_OFF = {"train": False, "training": False, "dropout_p": 0.0}
"""Arguments that would make an operator draw random numbers, or learn."""

_PLACED = ("device", "layout", "memory_format", "pin_memory", "generator", "out")
"""Arguments that a program does not have: it runs where its input is."""

_NAMED_DTYPES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMED_DTYPES.split()}
"""Number formats by name."""

_ALIGNED = 64
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of operators on arguments that they do not take."""


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        name: `OPERATOR.OVERLOAD` of torch's operators, or `int.FUNCTION` of lengths.
        arguments: plain values by the operator's own names; `{"at": NUMBER}` is a value, `{"dtype": NAME}` a number
            format, `{"number": TEXT}` a number that JSON lacks.
        outputs: numbers of the values that it gives.
    """

    name: str
    arguments: Mapping[str, Any]
    outputs: Sequence[int]


@dataclass(frozen=True)
class Program:
    """Tensors, then the input, then what the steps give: each value has the number of its place in this order.

    Attributes:
        tensors: number format, shape and first byte of each tensor.
        steps: the steps, in order.
        result: number of the value that is the result.
    """

    tensors: Sequence[tuple[str, tuple[int, ...], int]]
    steps: Sequence[Step]
    result: int

    def write(self) -> bytes:
        """Returns the program as bytes; the same program is the same bytes."""
        steps = [[step.name, dict(step.arguments), list(step.outputs)] for step in self.steps]
        tensors = [[dtype, list(shape), first] for dtype, shape, first in self.tensors]
        values = {"tensors": tensors, "steps": steps, "result": self.result}
        return json.dumps(values, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()


def read_program(data: bytes) -> Program:
    """Returns a program from its bytes, each step checked. Raises BadInput."""
    try:
        values = json.loads(data)
        steps = [Step(str(name), dict(arguments), [int(n) for n in outs]) for name, arguments, outs in values["steps"]]
        tensors = [(str(dtype), tuple(map(int, shape)), int(first)) for dtype, shape, first in values["tensors"]]
        program = Program(tensors, steps, int(values["result"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput("backbone: expected a program among the weights, got other bytes") from error
    check_program(program)
    return program


def check_program(program: Program) -> None:
    """Refuses a program with anything but operators of the list, in order. Raises BadInput."""
    if len(program.steps) > MAX_STEPS:
        raise BadInput(f"weights: expected a program of at most {MAX_STEPS} steps, got {len(program.steps)}")
    if any(dtype not in DTYPES or first < 0 or min(shape, default=0) < 0 for dtype, shape, first in program.tensors):
        raise BadInput("weights: refused a program whose tensors are of no known format")
    known = len(program.tensors) + 1
    for step in program.steps:
        _open(step.name)
        for name, value in step.arguments.items():
            if name in _PLACED or (name in _OFF and value != _OFF[name]):
                raise BadInput(f"weights: refused a program whose {step.name} has {plain(name, 40)} as in training")
        if step.arguments.get("use_input_stats") and step.arguments.get("running_mean") is not None:
            raise BadInput("weights: refused a program that learns from what it reads")
        if any(not 0 <= at < known for at in _list_values(step.arguments)):
            raise BadInput("weights: refused a program whose steps do not stand in order")
        if list(step.outputs) != list(range(known, known + len(step.outputs))) or len(step.outputs) > 4096:
            raise BadInput("weights: refused a program whose values are not numbered in order")
        known += len(step.outputs)
    if not 0 <= program.result < known:
        raise BadInput("weights: refused a program without its result")


def is_allowed(name: str) -> bool:
    """Returns whether a step may call this."""
    try:
        _open(name)
    except BadInput:
        return False
    return True


def find_schema(name: str) -> Any:
    """Returns the schema of an operator of the list. Raises BadInput."""
    return _open(name)._schema


def align(length: int) -> int:
    """Returns the first byte behind a tensor at which another one can begin."""
    return -(-length // _ALIGNED) * _ALIGNED


def _open(name: str) -> Any:
    packet, _, overload = name.partition(".")
    if packet == "int" and overload in _INTEGERS:
        return _INTEGERS[overload]
    if packet not in ALLOWED or not re.fullmatch(r"\w{1,40}", overload):
        raise BadInput(
            f"weights: refused a program with the operator {plain(repr(name), 80)}, which is not one of those that are "
            "run here; export in eval mode, or name an `output` in front of it"
        )
    operators = getattr(torch.ops.aten, packet, None)
    called = getattr(operators, overload) if operators is not None and overload in operators.overloads() else None
    if called is None or called._schema.is_mutable:
        raise BadInput(f"weights: refused a program with {plain(repr(name), 80)}, which this torch does not have")
    # Others are functions of texts and lists, which no bound of memory covers.
    if any(str(each.type) not in ("Tensor", "List[Tensor]") for each in called._schema.returns) and (
        packet not in _COUNTS or str(called._schema.arguments[0].type) != "Tensor"
    ):
        raise BadInput(f"weights: refused a program with {plain(repr(name), 80)}, which gives no tensor")
    # Of those on the list, this one's shape follows from values only where a mask selects.
    if torch.Tag.dynamic_output_shape in called.tags and packet != "index":
        raise BadInput(f"weights: refused a program in which a record's values decide what {name} gives back")
    return called


def _list_values(value: Any) -> list[int]:
    if isinstance(value, Mapping):
        if "at" in value:
            return [value["at"]] if type(value["at"]) is int else [-1]
        return [at for each in value.values() for at in _list_values(each)]
    return [at for each in value for at in _list_values(each)] if isinstance(value, list) else []


@final
class _Runner:
    """A checked program, ready to run. It keeps nothing between two runs."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._calls = [_open(step.name) for step in program.steps]
        last = {at: number for number, step in enumerate(program.steps) for at in _list_values(step.arguments)}
        # What no step reads is not kept either.
        last |= {at: number for number, step in enumerate(program.steps) for at in step.outputs if at not in last}
        last.pop(program.result, None)
        self._gone: list[list[int]] = [[] for _ in program.steps]
        for at, number in last.items():
            self._gone[number].append(at)
        self._fits: set[tuple[int, ...]] = set()

    def run(self, tensors: Sequence[Tensor], input_1: Tensor) -> Tensor:
        shape = tuple(input_1.shape)
        if shape not in self._fits:
            metas = [torch.empty_like(tensor, device="meta") for tensor in tensors]
            self._run(metas, torch.empty_like(input_1, device="meta"), measured=True)
            self._fits.add(shape)
        return self._run(tensors, input_1, measured=False)

    def _run(self, tensors: Sequence[Tensor], input_1: Tensor, *, measured: bool) -> Tensor:
        values: dict[int, Any] = dict(enumerate([*tensors, input_1]))
        num_read = 0
        for step, call, gone in zip(self._program.steps, self._calls, self._gone, strict=True):
            arguments = {name: _fill(value, values) for name, value in step.arguments.items()}
            try:
                given = _call(call, step, arguments, input_1.device)
            except _ERRORS as error:
                raise BadInput(
                    f"reads: expected inputs that the program takes, got {tuple(input_1.shape)}, with which "
                    f"{step.name} gives {type(error).__name__}; its batch is one record, or free"
                ) from error
            if len(given) < len(step.outputs):
                raise BadInput(f"weights: refused a program that reads more than {step.name} gives")
            values.update(zip(step.outputs, given, strict=False))
            if measured and _count_bytes(values) > MAX_MEMORY:
                raise BadInput(f"weights: refused a program of which a record takes more than {MAX_MEMORY >> 30} GiB")
            num_read += count_numbers([*arguments.values(), *given]) if measured else 0
            if num_read > MAX_NUMBERS:
                raise BadInput(
                    "weights: refused a program of which a record takes too many numbers one after the other"
                )
            for at in gone:
                values.pop(at, None)
        result = values[self._program.result]
        if not isinstance(result, Tensor) or not result.is_floating_point():
            raise BadInput("output: expected a tensor of floating-point numbers, got another value")
        return result


def _fill(value: Any, values: Mapping[int, Any]) -> Any:
    if isinstance(value, list):
        return [_fill(each, values) for each in value]
    if not isinstance(value, Mapping):
        return value
    if "at" in value:
        return values.get(value["at"])
    if value.get("dtype") in DTYPES:
        return DTYPES[value["dtype"]]
    if value.get("number") in ("inf", "-inf", "nan"):
        return float(value["number"])
    raise BadInput("weights: refused a program with an argument that is no plain value")


def _call(call: Any, step: Step, arguments: Mapping[str, Any], device: torch.device) -> list[Any]:
    if step.name.startswith("int."):
        if any(type(value) not in (int, float, bool) for value in arguments.values()):
            raise BadInput("weights: refused a program that counts with what is no number")
        number = call(*arguments.values())
        if abs(number) > _MAX_INTEGER:
            raise BadInput("weights: refused a program that counts beyond all lengths")
        return [number]
    if step.name.startswith("index."):
        for index in arguments.get("indices") or ():
            if index is not None and index.dtype not in (torch.int64, torch.int32):
                raise BadInput("weights: refused a program in which a record's values decide what index gives back")
    check_operands(step.name, arguments)
    if any(each.name == "device" for each in call._schema.arguments):
        arguments = {**arguments, "device": device}
    given = call(**arguments)
    return list(given) if isinstance(given, tuple | list) else [given]


def _count_bytes(values: Mapping[int, Any]) -> int:
    storages = {}
    for value in values.values():
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@final
class ProgramNetwork(nn.Module):
    """A program and its tensors, both as bytes among the weights: number formats of the site do not touch them."""

    program: Tensor
    tensors: Tensor

    def __init__(self, program_bytes: int, tensor_bytes: int, width: int, axis: int | None, *, windows: bool) -> None:
        """Creates a network whose program is still to be filled in.

        Args:
            program_bytes: length of the program.
            tensor_bytes: length of its tensors.
            width: number of features; 0 where it is to be measured.
            axis: axis of the result, counted with that of records, that holds features; means are taken over all
                others. None keeps all numbers.
            windows: whether a record is the program's whole batch, piece after piece; means are taken over it.
        """
        super().__init__()
        self.register_buffer("program", torch.zeros(program_bytes, dtype=torch.uint8))
        self.register_buffer("tensors", torch.zeros(tensor_bytes, dtype=torch.uint8))
        self._width, self._axis, self._windows = width, axis, windows
        self._runner: _Runner | None = None
        self._forms: Sequence[tuple[str, tuple[int, ...], int]] = ()

    def forward(self, inputs_B: Tensor) -> Tensor:
        """Returns features_BD. Raises BadInput where the program does not take such inputs, or has another width."""
        if self._runner is None:
            program = read_program(self.program.cpu().numpy().tobytes())
            self._runner, self._forms = _Runner(program), program.tensors
        tensors = [self._view(*form) for form in self._forms]
        outputs = []
        for row in range(len(inputs_B)):
            one = inputs_B[row] if self._windows else inputs_B[row : row + 1]
            output = self._runner.run(tensors, one.to(torch.float32).contiguous())
            outputs.append(average_axes(output[None] if self._windows else output, self._axis))
        features_BD = torch.cat(outputs).to(torch.float32)
        if len(features_BD) != len(inputs_B) or (self._width and features_BD.shape[1] != self._width):
            raise BadInput(f"weights: expected a program with {self._width} features, got {features_BD.shape[1]}")
        return features_BD

    def _view(self, dtype: str, shape: tuple[int, ...], first: int) -> Tensor:
        length = math.prod(shape) * DTYPES[dtype].itemsize
        if first % _ALIGNED or first + length > len(self.tensors):
            raise BadInput("weights: refused a program whose tensors lie outside of its bytes")
        return self.tensors[first : first + length].view(DTYPES[dtype]).reshape(shape)
