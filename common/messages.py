"""The messages between a coordinator and its sites, and the only place that spells Flower's record keys.

A message is one frozen model. `encode` turns it into Flower's records and `decode` back: its public values travel as
one JSON text, its arrays as raw little-endian bytes behind one layout of their shapes, a part of a backbone as bytes.

Guarantees:
- Every field that a site sends states the privacy reason why it may leave the site (`privacy_reasons`). What no field
  states does leave it: the time an answer takes, in whole intervals of `reply_every_s` of the site's file, which grows
  with the number of records.
- `decode` returns a message whose every value has its declared type and bounds, or raises BadInput. Nothing is
  unpickled or coerced, and every size is checked before memory is allocated for it.
- A run's offer states the version of the messages, which is checked before anything else is read.
- Equal messages are equal bytes, so that a request that is sent again is answered by the stored reply.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, InstanceOf, Strict, ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass

from common.flower import (
    get_all_nested_objects,
    no_object_id_recompute,
    recorddict_from_proto,
    recorddict_pb2,
    recorddict_to_proto,
)
from common.types import (
    DELTAS,
    EPSILONS,
    MAX_BACKBONES,
    MAX_STEPS,
    BadInput,
    DeclineReason,
    Delta,
    Heads,
    LedgerWitness,
    Plan,
    Unit,
)

VERSION = 4
"""Version of the messages. A site and a coordinator of different versions do not work together."""

JOIN = "query.join"
PART = "query.part"
PREPARE = "query.prepare"
MOMENTS = "query.moments"
VOTE = "query.vote"
SUM_KEYS = "query.sum_keys"
SUM_SHARES = "query.sum_shares"
MASKED = "train.masked"
SURVIVORS = "query.survivors"
UNMASK = "query.unmask"
TRAIN = "train"
EVALUATE = "evaluate"
FINISH = "query.finish"

MAX_UPLOAD_HEADER = "x-headwater-max-upload"
"""HTTP header of a coordinator's answers: the number of bytes that an upload may have."""
MAX_JSON_BYTES = 1 << 20
MAX_HEAD_BYTES = 1 << 30
MAX_TASKS = 1024
PART_BYTES = 8 << 20
"""A backbone's weights travel in parts of this size; the last one may be shorter."""
MAX_PARTS = 1024
MAX_ATTEMPTS = 1000
"""Attempts at one secure sum."""
_MAX_LINES = 2**40

DeltaPrecision = Literal["float32", "float16"]
_DTYPES: Mapping[DeltaPrecision, str] = {"float32": "<f4", "float16": "<f2"}
_LARGEST_HALF = 65504.0


class OtherVersion(BadInput):
    """A message of another version: nothing more of it was read."""


# --- fields ----------------------------------------------------------------------------------------------------------


@plain_dataclass(frozen=True)
class Reason:
    """Why a field may leave a site."""

    text: str


@plain_dataclass(frozen=True)
class Added:
    """Marks a field that came later: left out where it is empty, so that the other messages stay what they were."""


@plain_dataclass(frozen=True)
class InRecord:
    """The key of the record in which a field travels that is not JSON; a message has at most one such field."""

    key: str


_PUBLIC = "public"
_ARRAYS = InRecord("heads")
_PART = InRecord("part")


def _make_delta(value: object) -> object:
    return Delta(value) if isinstance(value, Mapping) else value


def _make_plan(value: object) -> object:
    return Plan(**{**value, "unit": Unit(value["unit"])}) if isinstance(value, dict) else value


def _check_plan(plan: Plan) -> Plan:
    numbers = (plan.sampling_rate, plan.noise_multiplier, 0.0 if plan.clip_norm is None else plan.clip_norm)
    if type(plan.steps) is not int or plan.steps > MAX_STEPS or any(type(item) not in (int, float) for item in numbers):
        raise ValueError(f"expected a plan of numbers and of at most {MAX_STEPS} steps")
    if not all(math.isfinite(item) for item in numbers):
        raise ValueError("expected a plan of finite numbers")
    return plan


def _make_witness(value: object) -> object:
    return LedgerWitness(**value) if isinstance(value, dict) else value


def _check_witness(witness: LedgerWitness) -> LedgerWitness:
    texts = (witness.chain, witness.mac, witness.tag)
    if not all(isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) for text in texts):
        raise ValueError("expected a witness of three digests")
    if type(witness.length) is not int or not 1 <= witness.length <= _MAX_LINES:
        raise ValueError("expected a witness of a number of lines")
    return witness


_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
_FROM_JSON = Strict(False)  # An enumeration or a tuple, which JSON has only as a text or a list.

# A name is shown on terminals and becomes a key of reports; a digest becomes a folder's name at a site.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublicSize = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Attempt = Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)]
SumKeys = Annotated[str, Field(pattern=r"^[0-9a-f]{256}$")]
EncryptedShare = Annotated[str, Field(pattern=r"^[0-9a-f]{164}$")]
SumSignature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
SumShare = Annotated[str, Field(pattern=r"^[0-9a-f]{66}$")]
Arrays = Annotated[InstanceOf[Heads], _ARRAYS]
Contribution = Annotated[InstanceOf[Delta], BeforeValidator(_make_delta), _ARRAYS]
Witness = Annotated[InstanceOf[LedgerWitness], BeforeValidator(_make_witness), AfterValidator(_check_witness)]
PublicPlan = Annotated[InstanceOf[Plan], BeforeValidator(_make_plan), AfterValidator(_check_plan)]


# --- what a coordinator asks -----------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_STRICT)
class JoinRequest:
    """An offer: a run without any path, and the digest of each of its backbones by name.

    Attributes:
        witness: The newest record of the site's ledger that the coordinator has.
        first_round: The number of the first round that the site would take part in. Above the run's number of rounds:
            no round is left.
    """

    run_id: str
    run: Mapping[str, Any]
    backbones: Annotated[Mapping[Name, Digest], Field(min_length=1, max_length=MAX_BACKBONES)]
    version: int = VERSION
    witness: Witness | None = None
    first_round: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 1


@dataclass(frozen=True, config=_STRICT)
class PartRequest:
    """A request to keep one part of a backbone's weights.

    Attributes:
        run_id: A run that the site joined.
        digest: The digest of one of the backbones that the site's tasks there stand on.
        index: The position of the part, from 0.
        total: The number of parts.
        data: PART_BYTES of the weights; the last part may be shorter.
    """

    run_id: str
    digest: Digest
    index: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(le=MAX_PARTS)]
    data: Annotated[bytes, Field(min_length=1, max_length=PART_BYTES), _PART]

    def __post_init__(self) -> None:
        if self.index >= self.total:
            raise ValueError("expected an index below the number of parts")
        if self.index < self.total - 1 and len(self.data) != PART_BYTES:
            raise ValueError(f"expected {PART_BYTES} bytes, fewer only in the last part")


@dataclass(frozen=True, config=_STRICT)
class PrepareRequest:
    """A request to get ready to train; `specs` are the settings of backbones just sent, as JSON texts by digest."""

    run_id: str
    specs: Mapping[Digest, str]


@dataclass(frozen=True, config=_STRICT)
class MomentsRequest:
    """A request to release what the run measures before its first round (`common.model.moments`)."""

    run_id: str
    witness: Witness | None = None

    @property
    def round(self) -> int:
        """The number under which a site's ledger keeps it: rounds begin at 1."""
        return 0

    @property
    def heads(self) -> Heads:
        """No parameters are sent."""
        return {}


@dataclass(frozen=True, config=_STRICT)
class VoteRequest:
    """A request for the one vote of a site on the backbone of a task; with another witness it is the same request."""

    run_id: str
    witness: Witness | None = None

    @property
    def round(self) -> int:
        """The number under which a site's ledger keeps it: a choice has one round."""
        return 1

    @property
    def heads(self) -> Heads:
        """No parameters are sent."""
        return {}


@dataclass(frozen=True, config=_STRICT)
class TrainRequest:
    """A request to train these heads for one round; with another witness it is the same request."""

    run_id: str
    round: int
    heads: Arrays
    witness: Witness | None = None


@dataclass(frozen=True, config=_STRICT)
class SumKeysRequest:
    """A request for a site's keys of one attempt at a secure sum (docs/secure-sum.md), its first step."""

    run_id: str
    round: int
    attempt: Attempt


@dataclass(frozen=True, config=_STRICT)
class SumSharesRequest:
    """The signed keys of all sites of an attempt; asks for the shares of a site's two secrets."""

    run_id: str
    round: int
    attempt: Attempt
    keys: Mapping[Name, SumKeys]


@dataclass(frozen=True, config=_STRICT)
class MaskedRequest:
    """The other sites' shares for one site; asks for its noised sum over these heads under all masks.

    With another witness it is the same request.
    """

    run_id: str
    round: int
    attempt: Attempt
    shares: Mapping[Name, EncryptedShare]
    heads: Arrays
    witness: Witness | None = None


@dataclass(frozen=True, config=_STRICT)
class SurvivorsRequest:
    """The names of the sites whose masked vectors arrived; asks for a signature of this one list."""

    run_id: str
    round: int
    attempt: Attempt
    survivors: Annotated[tuple[Name, ...], _FROM_JSON]


@dataclass(frozen=True, config=_STRICT)
class UnmaskRequest:
    """The signatures of the list of survivors; asks for shares that remove the masks from their sum."""

    run_id: str
    round: int
    attempt: Attempt
    signatures: Mapping[Name, SumSignature]


@dataclass(frozen=True, config=_STRICT)
class EvaluateRequest:
    """A request to evaluate the heads that a round ended with; with another witness it is the same request.

    Attributes:
        offsets: task -> the offset of its outputs in training, where the run asks for temperatures and the head is
            served with another one.
    """

    run_id: str
    round: int
    heads: Arrays
    witness: Witness | None = None
    offsets: Annotated[dict[str, list[float]], Added()] = Field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class FinishRequest:
    """The final heads and their digest.

    Attributes:
        heads: heads and trunks, and what the run released of classes (`common.model.class_moments`).
        digest: digest of the heads and trunks alone.
        temperatures: task -> number by which its head's outputs are to be divided before they become probabilities;
            tasks of which none is known are left out.
        chosen: the candidate that was chosen, where the run is a choice, which has no heads.
    """

    run_id: str
    heads: Arrays
    digest: Digest
    temperatures: Annotated[dict[str, Positive], Added()] = Field(default_factory=dict)
    chosen: Annotated[Name | Literal[""], Added()] = ""


_WITNESS = Reason(
    "the number of lines of the site's ledger, which follows from the requests of all its coordinators and from what "
    "its staff did, and keyed digests, which tell nothing without the key"
)


# --- what a site answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, config=_STRICT)
class Held:
    """The parts of one backbone that a site holds: the whole, or the numbers of some from a transfer that broke off."""

    whole: Annotated[bool, Reason("depends on earlier public messages and on the site file only")]
    parts: Annotated[
        tuple[int, ...],
        _FROM_JSON,
        Field(max_length=MAX_PARTS),
        Reason("depend on earlier public messages and on the site file only"),
    ]


def _make_held(value: object) -> object:
    return Held(**value) if isinstance(value, dict) else value


@dataclass(frozen=True, config=_STRICT)
class JoinReply:
    """The declarations of a site, and the parts that it holds of each backbone that its tasks stand on."""

    site: Annotated[Name, Reason("public by declaration")]
    tasks: Annotated[Mapping[Name, PublicSize], Reason("names and public sizes: public by declaration")]
    unit: Annotated[Unit, _FROM_JSON, Reason("public by declaration")]
    delta: Annotated[float, Field(ge=DELTAS.low, le=DELTAS.high), Reason("public by declaration")]
    budget_epsilon: Annotated[float, Field(ge=EPSILONS.low, le=EPSILONS.high), Reason("public by declaration")]
    backbones: Annotated[
        Mapping[Name, Annotated[Held, BeforeValidator(_make_held)]],
        Field(max_length=MAX_BACKBONES),
        Reason("their names follow from the tasks"),
    ]
    witness: Annotated[Witness | None, _WITNESS] = None


@dataclass(frozen=True, config=_STRICT)
class Ready:
    """Done: nothing but the fact of an answer."""


@dataclass(frozen=True, config=_STRICT)
class TrainReply:
    """A site's contribution and the public numbers it was made with.

    Attributes:
        delta: The contribution, noised already: rounding it to float16, and its largest values down to 65504, reveals
            nothing more.
        plan: The public numbers of the round.
        precision: The precision in which the contribution travels; read back it is float32.
    """

    delta: Annotated[Contribution, Reason("charged: the contribution")]
    plan: Annotated[PublicPlan, Reason("public numbers derived from the request")]
    precision: Annotated[DeltaPrecision, Reason("public: derived from the request")] = "float32"
    witness: Annotated[Witness | None, _WITNESS] = None


@dataclass(frozen=True, config=_STRICT)
class MomentsReply:
    """Noised sums over a site's training units: part -> "sum" -> vector.

    Attributes:
        sums: The sums, each unit's part of which has a length of at most 1.
        deviations: Part -> deviation of the noise in each of its values; 0 without privacy. A sum that was released
            for an earlier run, and is sent again, has the noise of that run.
    """

    sums: Annotated[
        Arrays, Reason("charged: noised sums of features and of labels, once for a population, backbone and task")
    ]
    deviations: Annotated[
        Mapping[str, Annotated[float, Field(ge=0)]], Reason("public numbers derived from the run file")
    ]
    witness: Annotated[Witness | None, _WITNESS] = None


@dataclass(frozen=True, config=_STRICT)
class VoteReply:
    """The name of the candidate that a site votes for."""

    vote: Annotated[Name, Reason("charged: the candidate that the exponential mechanism chose, and no cost")]
    witness: Annotated[Witness | None, _WITNESS] = None


@dataclass(frozen=True, config=_STRICT)
class SumKeysReply:
    """A site's public keys of one attempt, signed by its identity key, as hex digits, and the digest of its roster."""

    keys: Annotated[SumKeys, Reason("random keys of one attempt and their signature: they depend on no record")]
    roster: Annotated[
        Digest, Reason("digest of the names, public keys and rules in the site file: public by declaration")
    ]


@dataclass(frozen=True, config=_STRICT)
class SumSharesReply:
    """Name of each other site -> encrypted shares of this site's two secrets, as hex digits."""

    shares: Annotated[
        Mapping[Name, EncryptedShare], Reason("encrypted shares of random secrets: they depend on no record")
    ]


@dataclass(frozen=True, config=_STRICT)
class MaskedReply:
    """A site's noised sum modulo 2**64 under all masks, and the public numbers it was made with.

    Attributes:
        masked: Little-endian words of 64 bits.
        plan: The public numbers of the round; its noise is that of the sum of all sites.
    """

    masked: Annotated[
        bytes,
        Field(min_length=8, max_length=2 * MAX_HEAD_BYTES),
        _PART,
        Reason(
            "charged: a noised sum under masks; what removes them leaves only the sum of at least the number of sites "
            "in the site file"
        ),
    ]
    plan: Annotated[PublicPlan, Reason("public numbers derived from the request")]
    witness: Annotated[Witness | None, _WITNESS] = None


@dataclass(frozen=True, config=_STRICT)
class SurvivorsReply:
    """A site's signature of the one list of survivors that it confirms, as hex digits."""

    signature: Annotated[SumSignature, Reason("signature of names and of what was received: it depends on no record")]


@dataclass(frozen=True, config=_STRICT)
class UnmaskReply:
    """Name of each site -> this site's share of one of its two secrets, as hex digits."""

    shares: Annotated[
        Mapping[Name, SumShare],
        Reason(
            "shares of random secrets, which remove the masks from the survivors' sum only: they depend on no record"
        ),
    ]


@dataclass(frozen=True, config=_STRICT)
class EvaluateReply:
    """Noised sums of held-out units' statistics: task -> "sums" -> vector.

    Attributes:
        sums: Each task's sums in units of its bound on one unit; all tasks of a unit together are one release.
        noise_multiplier: The standard deviation of the noise, divided by the bound on one unit over all tasks, which
            is sqrt(number of tasks).
    """

    sums: Annotated[
        Arrays, Reason("charged: noised sums of held-out units' bounded statistics, from a budget fixed beforehand")
    ]
    noise_multiplier: Annotated[
        Positive, Reason("follows from the evaluation budget, cap and delta of the site file: public by declaration")
    ]
    witness: Annotated[Witness | None, _WITNESS] = None


@dataclass(frozen=True, config=_STRICT)
class Declined:
    """A reason from the fixed list, and the declared name of the site ("" where its file cannot be read)."""

    refusal: Annotated[DeclineReason, _FROM_JSON, Reason("one word of a fixed list")]
    site: Annotated[Name | Literal[""], Reason("public by declaration in the site file")]


SumRequest = SumKeysRequest | SumSharesRequest | MaskedRequest | SurvivorsRequest | UnmaskRequest
"""The steps of an attempt at a secure sum."""
Request = (
    JoinRequest
    | PartRequest
    | PrepareRequest
    | MomentsRequest
    | VoteRequest
    | TrainRequest
    | SumKeysRequest
    | SumSharesRequest
    | MaskedRequest
    | SurvivorsRequest
    | UnmaskRequest
    | EvaluateRequest
    | FinishRequest
)
Reply = (
    JoinReply
    | Ready
    | MomentsReply
    | VoteReply
    | TrainReply
    | SumKeysReply
    | SumSharesReply
    | MaskedReply
    | SurvivorsReply
    | UnmaskReply
    | EvaluateReply
    | Declined
)
Payload = Request | Reply
_Payload = TypeVar("_Payload")


def _find_record(hint: Any) -> InRecord | None:
    return next((item for item in get_args(hint)[1:] if isinstance(item, InRecord)), None)


_FIELDS: Mapping[type, Mapping[str, InRecord | None]] = {
    model: {name: _find_record(hint) for name, hint in get_type_hints(model, include_extras=True).items()}
    for model in get_args(Payload)
}
"""The fields of each message, each with the record in which it travels; None for the JSON text."""

_LATER: Mapping[type, set[str]] = {
    model: {name for name, hint in get_type_hints(model, include_extras=True).items() if Added() in get_args(hint)[1:]}
    for model in get_args(Payload)
}
"""The fields of each message that came later and may be missing."""


# --- privacy reasons -------------------------------------------------------------------------------------------------


def privacy_reasons(replies: tuple[type, ...] = get_args(Reply)) -> dict[str, dict[str, str]]:
    """Returns why each field that a site sends may leave it: name of the model -> name of the field -> reason.

    Args:
        replies: The models of the replies; the models of which their fields consist are found from them.

    Raises:
        TypeError: A field states no reason, or more than one.
    """
    reasons: dict[str, dict[str, str]] = {}
    waiting = list(replies)
    while waiting:
        model = waiting.pop(0)
        reasons[model.__name__] = {}
        for name, hint in get_type_hints(model, include_extras=True).items():
            stated = [item.text for item in get_args(hint)[1:] if isinstance(item, Reason)]
            if len(stated) != 1:
                raise TypeError(f"{model.__name__}.{name}: expected one privacy reason, got {len(stated)}")
            reasons[model.__name__][name] = stated[0]
            waiting += [inner for inner in _walk_types(hint) if is_pydantic_dataclass(inner)]
    return reasons


def format_privacy_table() -> str:
    """Returns the Markdown table of everything that a site sends, one row for each field, with its privacy reason."""
    rows = ["| message | field | why it may leave the site |", "|---|---|---|"]
    for model, reasons in privacy_reasons().items():
        stated = reasons or {"-": "nothing but the fact of an answer"}
        rows += [f"| {model} | {name} | {reason} |" for name, reason in stated.items()]
    return "\n".join(rows)


def _walk_types(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for part in get_args(hint):
        yield from _walk_types(part)


# --- encoding and decoding -------------------------------------------------------------------------------------------


def encode(message: Payload, packed: dict[int, ConfigRecord] | None = None) -> RecordDict:
    """Returns a message as Flower's records.

    Args:
        message: The message.
        packed: Arrays packed before, by the identity of the object that holds them; those of this message are added.
    """
    return _encode(message, {name: getattr(message, name) for name in _FIELDS[type(message)]}, packed)


def _encode(message: Payload, values: dict[str, Any], packed: dict[int, ConfigRecord] | None) -> RecordDict:
    """Returns a message's records.

    Args:
        message: The message.
        values: Its fields by name, or others in their place.
        packed: As in `encode`.
    """
    values = {name: value for name, value in values.items() if value or name not in _LATER[type(message)]}
    binary = {name: values.pop(name) for name, record in _FIELDS[type(message)].items() if record}
    # Sorted keys and no spaces: the same message is the same bytes.
    named = {"payload": type(message).__name__, **values}
    text = json.dumps(named, default=_list_fields, sort_keys=True, separators=(",", ":"))
    records = RecordDict({_PUBLIC: ConfigRecord({"json": text})})
    for content in binary.values():
        if isinstance(content, bytes):
            records[_PART.key] = ConfigRecord({"data": content})
        else:
            heads = content.heads if isinstance(content, Delta) else content
            known = {} if packed is None else packed
            if id(heads) not in known:
                known[id(heads)] = _pack_arrays(heads, values.get("precision", "float32"))
            records[_ARRAYS.key] = known[id(heads)]
    return records


def _list_fields(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass by name; `dataclasses.asdict` copies everything in them."""
    return {each.name: getattr(value, each.name) for each in fields(value)}


def decode(records: RecordDict, expected: type[_Payload]) -> _Payload:
    """Returns the message that records hold.

    Args:
        records: The records as they arrived; anything may be in them.
        expected: The model of the message that is due.

    Raises:
        OtherVersion: The message is an offer of another version of the messages.
        BadInput: The message is no well-formed `expected`; says which field is wrong and quotes nothing of it.
    """
    try:
        return expected(**_read_fields(records, expected))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # A place is a field of ours or a key of the sender's; only the former is repeated.
        place = "".join(f".{name}" for name in first["loc"][:1] if name in _FIELDS[expected])
        raise BadInput(f"malformed {expected.__name__}{place}: {first['msg']}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInput(f"malformed {expected.__name__}: {type(error).__name__}") from error


def _read_fields(records: RecordDict, expected: type) -> dict[str, Any]:
    """Returns the value of each field; their names and sizes are checked here, their types and bounds by the model."""
    values = _read_public(records)
    kind, version = values.pop("payload", None), values.get("version")
    # First of all: what another version calls its messages and what it puts into them is not known here.
    offered = expected is JoinRequest and ("version" in values or kind == JoinRequest.__name__)
    if offered and not (type(version) is int and version == VERSION):
        raise OtherVersion(f"JoinRequest: expected version {VERSION} of the messages, got another")
    if kind != expected.__name__:
        raise BadInput(f"expected a {expected.__name__}, got another kind of message")
    binary = {name: record for name, record in _FIELDS[expected].items() if record}
    if set(values) | _LATER[expected] != _FIELDS[expected].keys() - binary.keys():
        raise BadInput(f"malformed {expected.__name__}: expected its fields and no others")
    extra = set(records) - {_PUBLIC} - {record.key for record in binary.values()}
    if extra:
        raise BadInput(f"{expected.__name__}: {len(extra)} unexpected record(s)")
    for name, record in binary.items():
        content = _read_record(records, record.key)
        arrays = record == _ARRAYS
        values[name] = _unpack_arrays(content, values.get("precision", "float32")) if arrays else content["data"]
    return values


def _read_public(records: RecordDict) -> dict[str, Any]:
    text = _read_record(records, _PUBLIC)["json"]
    if not isinstance(text, str) or len(text) > MAX_JSON_BYTES:
        raise BadInput("expected a short public part")
    public = json.loads(text)
    if not isinstance(public, dict):
        raise BadInput("expected a public part with keys")
    return public


def _read_record(records: RecordDict, key: str) -> ConfigRecord:
    # Not `config_records`, which copies all records to look one up.
    record = records[key]
    if not isinstance(record, ConfigRecord):
        raise BadInput(f"malformed {key} part: expected settings")
    return record


# --- arrays ----------------------------------------------------------------------------------------------------------


def _pack_arrays(heads: Heads, precision: DeltaPrecision) -> ConfigRecord:
    """Returns all arrays one after the other in one record: Flower asks for each of its objects in several requests."""
    layout = {task: {name: list(heads[task][name].shape) for name in sorted(heads[task])} for task in sorted(heads)}
    data = b"".join(_to_bytes(heads[task][name], precision) for task, shapes in layout.items() for name in shapes)
    return ConfigRecord({"layout": json.dumps(layout, separators=(",", ":")), "data": data})


def _to_bytes(values: np.ndarray, precision: DeltaPrecision) -> bytes:
    if precision == "float16":
        values = np.clip(values, -_LARGEST_HALF, _LARGEST_HALF)  # Else infinite, and the whole reply is rejected.
    return np.asarray(values, dtype=_DTYPES[precision], order="C").tobytes()


def round_as_sent(values: NDArray[np.float32], precision: DeltaPrecision) -> NDArray[np.float32]:
    """Returns values as a receiver reads them.

    Args:
        values: what is sent.
        precision: precision in which it travels.
    """
    if precision == "float32":
        return values
    return np.frombuffer(_to_bytes(values, precision), _DTYPES[precision]).astype(np.float32).reshape(values.shape)


def _unpack_arrays(record: ConfigRecord, precision: DeltaPrecision) -> Heads:
    dtype = np.dtype(_DTYPES[precision])
    text, data = record["layout"], record["data"]
    if not isinstance(text, str) or len(text) > MAX_JSON_BYTES or not isinstance(data, bytes):
        raise BadInput("expected heads as a layout and their bytes")
    layout: dict[str, dict[str, list[int]]] = json.loads(text)
    if len(layout) > MAX_TASKS:
        raise BadInput(f"expected heads of at most {MAX_TASKS} tasks")
    sizes = [_count_elements(shape) for shapes in layout.values() for shape in shapes.values()]
    # Checked before use: a shape that promises more than the bytes hold allocates nothing.
    if dtype.itemsize * sum(sizes) != len(data) or len(data) > MAX_HEAD_BYTES:
        raise BadInput(f"expected {precision} arrays whose bytes match their shapes")
    values = np.frombuffer(data, dtype=dtype).astype(np.float32)
    ends = iter(accumulate(sizes))
    return {
        task: {name: values[(end := next(ends)) - math.prod(shape) : end].reshape(shape) for name, shape in own.items()}
        for task, own in layout.items()
    }


def _count_elements(shape: list[int]) -> int:
    if not (isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)):
        raise BadInput("expected shapes of whole numbers")
    return math.prod(shape)


# --- bytes -----------------------------------------------------------------------------------------------------------


def encoded_size(records: RecordDict) -> int:
    """Returns the bytes of the records in Flower's own encoding, as they cross the network."""
    with no_object_id_recompute():  # Else every part is encoded and hashed for each part above it.
        return sum(len(nested.deflate()) for nested in get_all_nested_objects(records).values())


def to_bytes(records: RecordDict) -> bytes:
    """Returns records as bytes for a site's reply store."""
    data: bytes = recorddict_to_proto(records).SerializeToString(deterministic=True)
    return data


def from_bytes(data: bytes) -> RecordDict:
    """Returns the records of `to_bytes`."""
    return recorddict_from_proto(recorddict_pb2.RecordDict.FromString(data))


def request_digest(request: MomentsRequest | VoteRequest | TrainRequest | MaskedRequest | EvaluateRequest) -> str:
    """Returns 64 hex digits that identify a request: equal requests get the identical stored reply."""
    values = {name: getattr(request, name) for name in _FIELDS[type(request)]}
    return hashlib.sha256(to_bytes(_encode(request, {**values, "witness": None}, None))).hexdigest()
