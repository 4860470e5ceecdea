"""Programs that torch.export has saved, read as data: a zip with JSON and the bytes of tensors.

`torch.export.load` is never called: it evaluates texts of the file, and unpickles some of its parts. Here the graph's
JSON becomes a `Program`, whose steps are checked one by one, and tensors are read as bytes; pickles stay unread.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from common.backbones.parts.graphs.program import (
    DTYPES,
    Program,
    Step,
    align,
    check_program,
    find_schema,
    is_allowed,
    read_program,
)
from common.backbones.parts.weights import DAMAGED
from common.errors import instead
from common.types import BadInput

MAX_BYTES = (2 << 30) - 1
"""Bytes of a program's tensors at most."""

_SAVE = "save it with torch 2.9 or newer by `torch.export.save(torch.export.export(model.eval(), (inputs,)), FILE)`"
_DTYPE_NAMES = "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool bfloat16"
_DTYPES = tuple(_DTYPE_NAMES.split())
"""Number formats, of which the first is number 1 in the file."""

_IGNORED = (
    "torch.ops.aten._assert_tensor_metadata.",
    "torch.ops.aten._assert_scalar.",
    "torch.ops.aten.sym_constrain_",
)
_VIEWS = ("view.default", "_unsafe_view.default")
_LENGTHS = ("_operator.", "math.", "torch.sym_")
_INPUTS = ("parameter", "buffer", "tensor_constant")


def read_exported(path: Path, output: str | None) -> tuple[bytes, Tensor]:
    """Returns a file's program up to one value, and the bytes of its tensors.

    Args:
        path: the file.
        output: name of the value in the printed graph; None for the first output.

    Raises:
        BadInput: no such file, one that `check_program` refuses, several inputs, memory, or an unknown name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.partition("/")[2]: name for name in archive.namelist()}
            if "models/model.json" not in files:
                raise BadInput(f"weights: expected a program that torch.export saved, found no graph in it; {_SAVE}")
            if sum(each.file_size for each in archive.infolist()) > MAX_BYTES:
                raise BadInput("weights: expected a file of less than 2 GiB")
            model = json.loads(archive.read(files["models/model.json"]))["graph_module"]
            reader = _Reader(model["graph"], model["signature"])
            program = reader.read(output)
            kept, tensors = _read_tensors(archive, files, program, reader.sources)
    except (*DAMAGED, StopIteration) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"weights: expected a program that torch.export saved, at {path}{instead(error)}") from error
    check_program(kept)
    return kept.write(), tensors


def draw_tensors(data: bytes, tensors: Tensor) -> Tensor:
    """Returns random tensors of a program from torch's current generator, as bytes; those of one dimension stay."""
    drawn = tensors.clone()
    for dtype, shape, first in read_program(data).tensors:
        size = math.prod(shape)
        if DTYPES[dtype].is_floating_point and len(shape) >= 2 and size:
            fan_in = size / max(shape[0], 1)
            values = (torch.randn(*shape) * math.sqrt(2.0 / max(fan_in, 1.0))).to(DTYPES[dtype])
            raw = values.reshape(-1).view(torch.uint8)
            drawn[first : first + len(raw)] = raw
    return drawn


@final
class _Reader:
    """Numbers a graph's values: tensors, the input, and what each step gives."""

    def __init__(self, graph: Mapping[str, Any], signature: Mapping[str, Any]) -> None:
        self._graph = graph
        if any(next(iter(each)) != "user_output" for each in signature["output_specs"]):
            raise BadInput("weights: refused a program that keeps something for the next record; export in eval mode")
        self.sources: list[tuple[str, str]] = []
        self._numbers: dict[str, int] = {}
        free = []
        for each in signature["input_specs"]:
            ((kind, spec),) = each.items()
            if kind in _INPUTS:
                self._numbers[spec["arg"]["name"]] = len(self.sources)
                self.sources.append((kind, spec[f"{kind}_name"]))
            elif kind == "user_input" and "as_tensor" in spec["arg"]:
                free.append(spec["arg"]["as_tensor"]["name"])
            elif kind not in ("constant_input", "user_input") or any(spec["arg"].get(key) for key in ("as_sym_int",)):
                raise BadInput("weights: refused a program with inputs that are no tensors, or run code of their own")
        if len(free) != 1:
            raise BadInput(f"weights: expected a program with one input, got {len(free)}; export a module with one")
        self._check_batch(free[0])
        self._numbers[free[0]] = len(self.sources)
        self._count = len(self.sources) + 1
        self._fresh: set[int] = set()

    def read(self, output: str | None) -> Program:
        nodes = [node for node in self._graph["nodes"] if not str(node["target"]).startswith(_IGNORED)]
        steps = self._read_steps(nodes)
        name = output or next(iter(_list_names(self._graph["outputs"][0])))
        if name not in self._numbers or self._numbers[name] <= len(self.sources):
            raise BadInput("output: expected the name of a value in the printed graph of the program")
        return Program([], steps, self._numbers[name])

    def _check_batch(self, name: str) -> None:
        length = self._graph["tensor_values"][name]["sizes"][:1]
        if length and "as_int" in length[0] and length[0]["as_int"] != 1:
            raise BadInput(
                "weights: expected a program whose batch is one record, or free, got a batch of "
                f"{length[0]['as_int']}; export it with one record, or with a free first axis"
            )

    def _read_steps(self, nodes: Sequence[Mapping[str, Any]]) -> list[Step]:
        uses = Counter(name for node in nodes for each in node["inputs"] for name in _list_names(each["arg"]))
        uses += Counter(name for each in self._graph["outputs"] for name in _list_names(each))
        steps = []
        for node in nodes:
            lengths = str(node["target"]).startswith(_LENGTHS)
            # Functions of lengths take their arguments by place.
            arguments = {
                str(at) if lengths else str(each["name"]): self._read_value(each["arg"])
                for at, each in enumerate(node["inputs"])
            }
            name = self._read_name(str(node["target"]), node, uses)
            if name == "dropout.default" and arguments.get("train") is False:
                # It does nothing, and some torches have no such call on what has no memory.
                self._numbers[next(iter(_list_names(node["outputs"])))] = next(iter(arguments.values()))["at"]
                continue
            outputs = [each for result in node["outputs"] for each in _list_names(result)]
            if len({*outputs, *self._numbers}) != len(outputs) + len(self._numbers):
                raise BadInput("weights: refused a program that gives one name to two values")
            numbers = list(range(self._count, self._count + len(outputs)))
            self._numbers.update(zip(outputs, numbers, strict=True))
            self._count += len(outputs)
            if name in _VIEWS:
                # The same for any order of memory, which a run without memory does not know.
                name, arguments = "reshape.default", {"self": arguments["self"], "shape": arguments["size"]}
            if not name.startswith("int.") and _is_fresh(name):
                self._fresh.update(numbers)
            kept = {key: value for key, value in arguments.items() if key not in _PLACES and value is not _GONE}
            steps.append(Step(name, kept, numbers))
        return steps

    def _read_name(self, target: str, node: Mapping[str, Any], uses: Mapping[str, int]) -> str:
        if target.startswith(_LENGTHS):
            function = target.removeprefix("torch.sym_").rpartition(".")[2]
            return f"int.{function}"
        name = target.removeprefix("torch.ops.aten.")
        packet, _, overload = name.partition(".")
        if not packet.endswith("_") or packet.endswith("__"):
            return name
        plain = f"{packet[:-1]}.{overload}"
        changed = next(iter(_list_names(node["inputs"][0]["arg"])), "")
        alone = uses[changed] == 1 and self._numbers.get(changed, -1) in self._fresh
        if packet != "detach_" and not (alone and is_allowed(plain)):
            raise BadInput(
                f"weights: refused a program in which {packet} changes a tensor in place; call "
                "`.run_decompositions({})` on what torch.export.export gives, and save that"
            )
        return plain

    def _read_value(self, argument: Mapping[str, Any]) -> Any:
        ((kind, value),) = argument.items()
        if kind in ("as_tensor", "as_optional_tensor"):
            return self._read_tensor(value)
        if kind in ("as_tensors", "as_optional_tensors"):
            return [self._read_tensor(each) for each in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._read_length(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._read_length(each) for each in value]
        if kind == "as_scalar_type":
            return {"dtype": _name_dtype(value)}
        if kind == "as_none":
            return None
        if kind in ("as_memory_format", "as_layout", "as_device"):
            return _GONE
        if kind in ("as_int", "as_bool", "as_string", "as_float"):
            return _read_number(value) if kind == "as_float" else value
        if kind in ("as_ints", "as_bools", "as_floats", "as_int_lists"):
            return [_read_number(each) for each in value] if kind == "as_floats" else value
        raise BadInput(
            f"weights: refused a program with {kind.removeprefix('as_')!r} as an argument, which may run code"
        )

    def _read_tensor(self, value: Any) -> Any:
        if value.get("as_none"):
            return None
        name = value["as_tensor"]["name"] if "as_tensor" in value else value["name"]
        return {"at": self._numbers[name]}

    def _read_length(self, value: Mapping[str, Any]) -> Any:
        ((kind, given),) = value.items()
        return {"at": self._numbers[given]} if kind == "as_name" else _read_number(given)


_GONE = object()
_PLACES = ("device", "layout", "memory_format", "pin_memory")


def _read_number(value: Any) -> Any:
    if isinstance(value, str):
        return {"number": {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}[value]}
    return value if not isinstance(value, float) or math.isfinite(value) else {"number": str(value)}


def _name_dtype(number: int) -> str:
    if not 1 <= number <= len(_DTYPES):
        raise BadInput("weights: refused a program with numbers of an unknown format")
    return _DTYPES[number - 1]


def _is_fresh(name: str) -> bool:
    """Returns whether an operator's result is memory of its own."""
    if not is_allowed(name) or name.startswith("dropout."):
        return False
    return all(each.alias_info is None for each in find_schema(name).returns)


def _list_names(value: Any) -> list[str]:
    """Returns the names of the tensors and lengths in an argument."""
    if isinstance(value, list):
        return [name for each in value for name in _list_names(each)]
    if not isinstance(value, Mapping):
        return []
    own = [value[key] for key in ("name", "as_name") if isinstance(value.get(key), str)]
    return own + [name for each in value.values() if isinstance(each, list | Mapping) for name in _list_names(each)]


def _drop_unused(program: Program) -> tuple[list[int], list[Step]]:
    """Returns the numbers of the values that the result needs, in order, and the steps that give them."""
    needed, steps = {program.result}, []
    for step in reversed(program.steps):
        if needed & set(step.outputs):
            steps.append(step)
            needed |= {*step.outputs, *_find_values(dict(step.arguments))}
    return sorted(needed), steps[::-1]


def _find_values(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [value["at"]] if "at" in value else [at for each in value.values() for at in _find_values(each)]
    return [at for each in value for at in _find_values(each)] if isinstance(value, list) else []


def _renumber(value: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(value, dict):
        own = {key: _renumber(each, numbers) for key, each in value.items()}
        return {"at": numbers[value["at"]]} if "at" in value else own
    return [_renumber(each, numbers) for each in value] if isinstance(value, list) else value


def _read_tensors(
    archive: zipfile.ZipFile, files: Mapping[str, str], program: Program, sources: Sequence[tuple[str, str]]
) -> tuple[Program, Tensor]:
    """Returns the program with nothing that its result does not need, and its tensors as bytes."""
    needed, steps = _drop_unused(program)
    kept = [at for at in needed if at < len(sources)]
    order = [*kept, len(sources), *(at for at in needed if at > len(sources))]
    numbers = {at: number for number, at in enumerate(order)}
    configs = {
        folder: json.loads(archive.read(files[f"data/{folder}/model_{folder}_config.json"]))["config"]
        for folder in ("weights", "constants")
        if f"data/{folder}/model_{folder}_config.json" in files
    }
    forms, pieces, length = [], [], 0
    for at in kept:
        kind, name = sources[at]
        folder = next((each for each in ("weights", "constants") if name in configs.get(each, {})), None)
        if folder is None:
            raise BadInput(f"weights: expected the values of every tensor of the program, found none of one {kind}")
        tensor = _read_tensor_bytes(archive, files, folder, configs[folder][name])
        forms.append((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), length))
        raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
        pieces += [raw, torch.zeros(align(len(raw)) - len(raw), dtype=torch.uint8)]
        length += align(len(raw))
        if length > MAX_BYTES:
            raise BadInput("weights: refused a program whose tensors take more than 2 GiB")
    moved = [
        replace(step, arguments=_renumber(dict(step.arguments), numbers), outputs=[numbers[at] for at in step.outputs])
        for step in steps
    ]
    # A program without tensors has one byte of them all the same: a buffer is not to be empty.
    tensors = torch.cat(pieces) if length else torch.zeros(1, dtype=torch.uint8)
    return Program(forms, moved, numbers[program.result]), tensors


def _read_tensor_bytes(
    archive: zipfile.ZipFile, files: Mapping[str, str], folder: str, entry: Mapping[str, Any]
) -> Tensor:
    meta = entry["tensor_meta"]
    if entry["use_pickle"] or meta["layout"] != 7:
        raise BadInput("weights: refused a program whose tensors are pickled, or not dense")
    dtype = _name_dtype(meta["dtype"])
    if dtype not in DTYPES:
        raise BadInput(f"weights: refused a program with tensors of {dtype}")
    data = archive.read(files[f"data/{folder}/{entry['path_name']}"])
    sizes, strides = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
    if not math.prod(sizes):
        return torch.zeros(sizes, dtype=DTYPES[dtype])
    if math.prod(sizes) * DTYPES[dtype].itemsize > MAX_BYTES:
        raise BadInput("weights: refused a program whose tensors take more than 2 GiB")
    values = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype])
    if min(strides, default=0) < 0 or min(sizes, default=0) < 0:
        raise BadInput("weights: refused a program whose tensors lie outside of their bytes")
    # Raises where it would lie outside.
    return values.as_strided(sizes, strides, meta["storage_offset"]["as_int"]).clone()
