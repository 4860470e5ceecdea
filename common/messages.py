"""Typed messages and the only place that spells Flower's record keys.

A payload is one frozen dataclass; `encode` turns it into a RecordDict, `decode` back. Public scalars travel as one JSON
text, all heads as raw little-endian float32 behind one layout of their shapes (contributions as float16 where a run
asks for it), the backbone's weights in parts. Nothing is unpickled, and every size is checked before memory is
allocated for it.

Every field that a site sends is listed here with its privacy reason:

| payload | field | reason |
|---|---|---|
| JoinReply | site, tasks (names and public sizes), unit, delta, budget_epsilon | public by declaration |
| JoinReply | backbones | their names follow from the tasks |
| Held | whole, parts | depend on earlier public messages and on the site file only |
| Ready | - | nothing but the fact of an answer |
| TrainReply | heads | charged: the contribution |
| TrainReply | plan, precision | public numbers derived from the request |
| EvaluateReply | sums | charged: noised sums of held-out units' bounded statistics, from a share fixed beforehand |
| EvaluateReply | noise_multiplier | follows from the share, cap and delta of the site file: public by declaration |
| Declined | refusal | one word of a fixed list |
| Declined | site | public by declaration in the site file |

What is not hidden: the time a site takes to answer grows with its number of records.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, assert_never

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from common.flower import (
    get_all_nested_objects,
    no_object_id_recompute,
    recorddict_from_proto,
    recorddict_pb2,
    recorddict_to_proto,
)
from common.types import MAX_BACKBONES, MAX_STEPS, BadInput, DeclineReason, Delta, Heads, Plan, Unit

VERSION = 2
"""Of the messages. A site and a coordinator of different versions do not work together."""

JOIN = "query.join"
PART = "query.part"
PREPARE = "query.prepare"
TRAIN = "train"
EVALUATE = "evaluate"
FINISH = "query.finish"

_PUBLIC = "public"
_HEADS = "heads"
_PART = "part"
_NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
MAX_JSON_BYTES = 1 << 20
MAX_HEAD_BYTES = 1 << 30
MAX_TASKS = 1024
PART_BYTES = 8 << 20
"""A backbone's weights travel in parts of this size; the last one may be shorter."""
MAX_PARTS = 1024


DeltaPrecision = Literal["float32", "float16"]
_DTYPES: Mapping[DeltaPrecision, str] = {"float32": "<f4", "float16": "<f2"}
_LARGEST_HALF = 65504.0


class OtherVersion(BadInput):
    """A message of another version: nothing more of it was read."""


@dataclass(frozen=True)
class JoinRequest:
    """What the coordinator proposes: a run without any path, and the digest of each of its backbones by name."""

    run_id: str
    run: Mapping[str, Any]
    backbones: Mapping[str, str]
    version: int = VERSION


@dataclass(frozen=True)
class Held:
    """What a site holds of one backbone: the whole, or parts from a transfer that broke off."""

    whole: bool
    parts: Sequence[int] = ()


@dataclass(frozen=True)
class JoinReply:
    """What a site declares about itself, and what it holds of each backbone that its tasks stand on."""

    site: str
    tasks: Mapping[str, int]
    unit: Unit
    delta: float
    budget_epsilon: float
    backbones: Mapping[str, Held]


@dataclass(frozen=True)
class PartRequest:
    """Keep one part of a backbone's weights.

    Attributes:
        run_id: of a run the site joined.
        digest: of one of the backbones that its tasks there stand on.
        index: of the part, from 0.
        total: number of parts.
        data: PART_BYTES of the weights; the last part may be shorter.
    """

    run_id: str
    digest: str
    index: int
    total: int
    data: bytes


@dataclass(frozen=True)
class PrepareRequest:
    """Get ready to train; `specs` are the settings of the backbones, by digest, whose weights were just sent."""

    run_id: str
    specs: Mapping[str, str]


@dataclass(frozen=True)
class Ready:
    """Done."""


@dataclass(frozen=True)
class TrainRequest:
    """Train these heads for one round."""

    run_id: str
    round: int
    heads: Heads


@dataclass(frozen=True)
class TrainReply:
    """A site's contribution and the public numbers it was made with.

    Attributes:
        delta: noised already: rounding it to float16, and its largest values down to 65504, reveals nothing more.
        plan: it was made with.
        precision: it travels in; read back it is float32.
    """

    delta: Delta
    plan: Plan
    precision: DeltaPrecision = "float32"


@dataclass(frozen=True)
class EvaluateRequest:
    """Evaluate these heads, which a round ended with, on held-out units."""

    run_id: str
    round: int
    heads: Heads


@dataclass(frozen=True)
class EvaluateReply:
    """Noised sums of held-out units' statistics: task -> "sums" -> vector.

    Attributes:
        sums: each task's in units of its bound on one unit; all tasks of a unit together are one release.
        noise_multiplier: standard deviation of the noise / bound on one unit over all tasks, sqrt(number of tasks).
    """

    sums: Heads
    noise_multiplier: float


@dataclass(frozen=True)
class FinishRequest:
    """The final heads and their digest."""

    run_id: str
    heads: Heads
    digest: str


@dataclass(frozen=True)
class Declined:
    """A refusal, from the fixed list, and the declared name of who refuses ("" when its file cannot be read)."""

    refusal: DeclineReason
    site: str


Request = JoinRequest | PartRequest | PrepareRequest | TrainRequest | EvaluateRequest | FinishRequest
Reply = JoinReply | Ready | TrainReply | EvaluateReply | Declined
Payload = Request | Reply
_Payload = TypeVar("_Payload")
_WITH_HEADS = (TrainRequest, TrainReply, EvaluateRequest, EvaluateReply, FinishRequest)


def encode(payload: Payload) -> RecordDict:
    """A payload as Flower records."""
    match payload:
        case JoinRequest(run_id, run, backbones, version):
            return _records(payload, run_id=run_id, run=dict(run), backbones=dict(backbones), version=version)
        case JoinReply():
            return _records(payload, **asdict(payload))
        case PartRequest(run_id, digest, index, total, data):
            records = _records(payload, run_id=run_id, digest=digest, index=index, total=total)
            records[_PART] = ConfigRecord({"data": data})
            return records
        case PrepareRequest(run_id, specs):
            return _records(payload, run_id=run_id, specs=dict(specs))
        case TrainRequest(run_id, round_, heads) | EvaluateRequest(run_id, round_, heads):
            return _with_heads(_records(payload, run_id=run_id, round=round_), heads)
        case TrainReply(delta, plan, precision):
            return _with_heads(_records(payload, plan=asdict(plan), precision=precision), delta.heads, precision)
        case EvaluateReply(sums, noise_multiplier):
            return _with_heads(_records(payload, noise_multiplier=noise_multiplier), sums)
        case FinishRequest(run_id, heads, digest):
            return _with_heads(_records(payload, run_id=run_id, digest=digest), heads)
        case Declined(refusal, site):
            return _records(payload, refusal=refusal.value, site=site)
        case Ready():
            return _records(payload)
        case _:
            assert_never(payload)


def decode(records: RecordDict, expected: type[_Payload]) -> _Payload:
    """The payload of a message.

    Raises:
        BadInput: the message is not a well-formed `expected`; says which part is wrong.
    """
    try:
        return _decode(records, expected)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInput(f"malformed {expected.__name__}: {type(error).__name__}") from error


def _decode(records: RecordDict, expected: type[_Payload]) -> _Payload:
    public = _public(records)
    kind, version = public.pop("payload", None), public.get("version")
    # First of all: what another version calls its messages and what it puts into them is not known here.
    invited = expected is JoinRequest and ("version" in public or kind == JoinRequest.__name__)
    if invited and not (type(version) is int and version == VERSION):
        raise OtherVersion(f"JoinRequest: expected version {VERSION} of the messages, got another")
    if kind != expected.__name__:
        raise BadInput(f"expected a {expected.__name__}, got another kind of message")
    allowed = {_PUBLIC}
    if expected is PartRequest:
        allowed |= {_PART}
        public["data"] = _record(records, _PART)["data"]
        _check_part(public)
    elif expected is PrepareRequest:
        _check_specs(public["specs"])
    elif expected in _WITH_HEADS:
        allowed |= {_HEADS}
        public["heads"] = _heads(records, public["precision"] if expected is TrainReply else "float32")
    if not isinstance(public.get("run_id", ""), str) or type(public.get("round", 1)) is not int:
        raise BadInput(f"{expected.__name__}: expected a run's id and a round's number")
    extra = set(records) - allowed
    if extra:
        raise BadInput(f"{expected.__name__}: {len(extra)} unexpected record(s)")
    if expected is TrainReply:
        public = {"delta": Delta(public.pop("heads")), "plan": _plan(public.pop("plan")), **public}
    elif expected is EvaluateReply:
        public["sums"] = public.pop("heads")
        if not (type(public["noise_multiplier"]) is float and 0.0 < public["noise_multiplier"] < math.inf):
            raise BadInput("EvaluateReply: expected a finite noise multiplier > 0")
    elif expected is JoinReply:
        public["unit"] = Unit(public["unit"])
        _check_join(public)
    elif expected is JoinRequest:
        _check_offer(public)
    elif expected is Declined:
        public["refusal"] = DeclineReason(public["refusal"])
        if public["site"] != "" and not _is_name(public["site"]):
            raise BadInput("Declined: expected a site's name")
    return expected(**public)


def _check_offer(public: Mapping[str, Any]) -> None:
    backbones = public["backbones"]
    named = isinstance(backbones, dict) and all(_is_name(name) for name in backbones)
    # A digest becomes a folder's name at the site.
    if not (named and 1 <= len(backbones) <= MAX_BACKBONES and all(map(_is_digest, backbones.values()))):
        raise BadInput(f"JoinRequest: expected 1 to {MAX_BACKBONES} names of backbones with digests of 64 hex digits")


def _check_specs(specs: Any) -> None:
    if not (isinstance(specs, dict) and all(_is_digest(key) and isinstance(text, str) for key, text in specs.items())):
        raise BadInput("PrepareRequest: expected backbones' settings as text, by digest")


def _check_part(public: Mapping[str, Any]) -> None:
    if not _is_digest(public["digest"]):
        raise BadInput("PartRequest: expected a digest of 64 hex digits")
    index, total, data = public["index"], public["total"], public["data"]
    if not (type(index) is int and type(total) is int and 0 <= index < total <= MAX_PARTS):
        raise BadInput(f"PartRequest: expected part 0 to {MAX_PARTS - 1} of at most {MAX_PARTS}")
    whole = index < total - 1
    if not isinstance(data, bytes) or not 0 < len(data) <= PART_BYTES or (whole and len(data) != PART_BYTES):
        raise BadInput(f"PartRequest: expected {PART_BYTES} bytes, fewer only in the last part")


def _check_join(public: dict[str, Any]) -> None:
    tasks = public["tasks"]
    sizes_valid = isinstance(tasks, dict) and all(
        _is_name(name) and type(size) is int and size >= 1 for name, size in tasks.items()
    )
    backbones = public["backbones"]
    if not (isinstance(backbones, dict) and len(backbones) <= MAX_BACKBONES and all(map(_is_name, backbones))):
        raise BadInput(f"JoinReply: expected at most {MAX_BACKBONES} names of backbones")
    public["backbones"] = {name: _held(held) for name, held in backbones.items()}
    numbers = (public["delta"], public["budget_epsilon"])
    numbers_valid = all(type(value) in (int, float) and math.isfinite(value) and value > 0 for value in numbers)
    if not (sizes_valid and numbers_valid and _is_name(public["site"])):
        raise BadInput("JoinReply: expected a name, positive public sizes, delta and budget")


def _held(values: Mapping[str, Any]) -> Held:
    held = Held(**values)
    parts = held.parts
    if not (isinstance(parts, list) and len(parts) <= MAX_PARTS and all(type(index) is int for index in parts)):
        raise BadInput("JoinReply: expected a list of held parts")
    if type(held.whole) is not bool:
        raise BadInput("JoinReply: expected whether a backbone is held whole")
    return Held(held.whole, tuple(parts))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_name(value: object) -> bool:
    """Whether it is a plain name: it is shown on terminals and becomes a key of reports."""
    return isinstance(value, str) and re.fullmatch(_NAME, value) is not None


def _plan(values: Mapping[str, Any]) -> Plan:
    plan = Plan(**{**values, "unit": Unit(values["unit"])})
    numbers = (plan.sampling_rate, plan.noise_multiplier, 0.0 if plan.clip_norm is None else plan.clip_norm)
    if type(plan.steps) is not int or plan.steps > MAX_STEPS or any(type(item) not in (int, float) for item in numbers):
        raise BadInput(f"expected a plan of numbers and of at most {MAX_STEPS} steps")
    if not all(math.isfinite(item) for item in numbers):
        raise BadInput("expected a plan of finite numbers")
    return plan


def _records(payload: Payload, **public: Any) -> RecordDict:
    # Sorted keys and no spaces: the same payload is the same bytes.
    text = json.dumps({"payload": type(payload).__name__, **public}, sort_keys=True, separators=(",", ":"))
    return RecordDict({_PUBLIC: ConfigRecord({"json": text})})


def _public(records: RecordDict) -> dict[str, Any]:
    text = _record(records, _PUBLIC)["json"]
    if not isinstance(text, str) or len(text) > MAX_JSON_BYTES:
        raise BadInput("expected a short public part")
    public = json.loads(text)
    if not isinstance(public, dict):
        raise BadInput("expected a public part with keys")
    return public


def _record(records: RecordDict, key: str) -> ConfigRecord:
    # Not `config_records`, which copies all records to look one up.
    record = records[key]
    if not isinstance(record, ConfigRecord):
        raise BadInput(f"malformed {key} part: expected settings")
    return record


def _with_heads(records: RecordDict, heads: Heads, precision: DeltaPrecision = "float32") -> RecordDict:
    """All arrays one after the other in one record: Flower asks for each of its objects in several requests."""
    layout = {task: {name: list(heads[task][name].shape) for name in sorted(heads[task])} for task in sorted(heads)}
    data = b"".join(_bytes(heads[task][name], precision) for task, shapes in layout.items() for name in shapes)
    records[_HEADS] = ConfigRecord({"layout": json.dumps(layout, separators=(",", ":")), "data": data})
    return records


def _bytes(values: np.ndarray, precision: DeltaPrecision) -> bytes:
    if precision == "float16":
        values = np.clip(values, -_LARGEST_HALF, _LARGEST_HALF)  # Else infinite, and the whole reply is set aside.
    return np.asarray(values, dtype=_DTYPES[precision], order="C").tobytes()


def _heads(records: RecordDict, precision: DeltaPrecision) -> Heads:
    dtype = np.dtype(_DTYPES[precision])
    record = _record(records, _HEADS)
    text, data = record["layout"], record["data"]
    if not isinstance(text, str) or len(text) > MAX_JSON_BYTES or not isinstance(data, bytes):
        raise BadInput("expected heads as a layout and their bytes")
    layout: dict[str, dict[str, list[int]]] = json.loads(text)
    if len(layout) > MAX_TASKS:
        raise BadInput(f"expected heads of at most {MAX_TASKS} tasks")
    sizes = [_size(shape) for shapes in layout.values() for shape in shapes.values()]
    # Checked before use: a shape that promises more than the bytes hold allocates nothing.
    if dtype.itemsize * sum(sizes) != len(data) or len(data) > MAX_HEAD_BYTES:
        raise BadInput(f"expected {precision} arrays whose bytes match their shapes")
    values = np.frombuffer(data, dtype=dtype).astype(np.float32)
    parts = iter(np.split(values, np.cumsum(sizes)[:-1]) if sizes else [])
    return {
        task: {name: next(parts).reshape(shape) for name, shape in shapes.items()} for task, shapes in layout.items()
    }


def _size(shape: list[int]) -> int:
    if not (isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)):
        raise BadInput("expected shapes of whole numbers")
    return math.prod(shape)


def encoded_size(records: RecordDict) -> int:
    """Bytes of the records in Flower's own encoding, as they cross the network."""
    with no_object_id_recompute():  # Else every part is encoded and hashed for each part above it.
        return sum(len(nested.deflate()) for nested in get_all_nested_objects(records).values())


def to_bytes(records: RecordDict) -> bytes:
    """Records as bytes for a site's reply store."""
    data: bytes = recorddict_to_proto(records).SerializeToString(deterministic=True)
    return data


def from_bytes(data: bytes) -> RecordDict:
    """Records from `to_bytes`."""
    return recorddict_from_proto(recorddict_pb2.RecordDict.FromString(data))


def request_digest(records: RecordDict) -> str:
    """64 hex digits that identify a request: equal requests get the identical stored reply."""
    return hashlib.sha256(to_bytes(records)).hexdigest()
