"""Messages: what is encoded is decoded, what is malformed is refused, and no field leaves without a privacy reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from common import messages
from common.flower import get_all_nested_objects
from common.types import MAX_STEPS, BadInput, DeclineReason, Delta, Heads, LedgerWitness, Plan, Unit
from tests.tiny import forged

names = st.from_regex(r"[a-z][a-z0-9_.]{0,10}", fullmatch=True)
arrays = npst.arrays(np.float32, npst.array_shapes(min_dims=0, max_dims=3, max_side=4), elements=st.floats(width=32))
heads_of_any_shape = st.dictionaries(names, st.dictionaries(names, arrays, min_size=1, max_size=3), max_size=3)
PLAN = Plan(sampling_rate=0.5, steps=3, clip_norm=1.0, noise_multiplier=2.0, unit=Unit.PATIENT)
HEADS: Heads = {"task": {"weight": np.ones((2, 3), np.float32)}}
WITNESS = LedgerWitness("a" * 64, 7, "b" * 64, "c" * 64)
ONE_OF_EACH: list[messages.Payload] = [
    messages.JoinRequest("run", {"rounds": 3, "name": "\u00e9", "rate": 0.1, "none": None}, {"backbone": "d" * 64}),
    messages.JoinReply(
        "north",
        {"b": 7, "a": 10},
        Unit.EXAMPLE,
        1e-5,
        3.0,
        {"one": messages.Held(False, (0, 2)), "two": messages.Held(True, ())},
    ),
    messages.PartRequest("run", "d" * 64, 2, 3, b"\x00\x01"),
    messages.PrepareRequest("run", {"d" * 64: '{"kind": "x"}'}),
    messages.Ready(),
    messages.TrainRequest("run", 2, HEADS),
    messages.TrainReply(Delta(HEADS), PLAN),
    messages.TrainReply(Delta(HEADS), PLAN, "float16"),
    messages.EvaluateRequest("run", 2, HEADS),
    messages.EvaluateReply({"task": {"sums": np.arange(3, dtype=np.float32)}}, 2.5),
    messages.FinishRequest("run", HEADS, "d" * 64),
    messages.Declined(DeclineReason.BUDGET, "north"),
    messages.TrainRequest("run", 2, HEADS, WITNESS),
    messages.EvaluateReply({"task": {"sums": np.arange(3, dtype=np.float32)}}, 2.5, WITNESS),
    messages.MomentsRequest("run"),
    messages.MomentsReply({"one.mean": {"sum": np.arange(3, dtype=np.float32)}}, {"one.mean": 2.5}),
    messages.SumKeysRequest("run", 2, 1),
    messages.SumKeysReply("ab" * 128, "d" * 64),
    messages.SumSharesRequest("run", 2, 1, {"north": "ab" * 128}),
    messages.SumSharesReply({"south": "cd" * 82}),
    messages.MaskedRequest("run", 2, 1, {"south": "cd" * 82}, HEADS),
    messages.MaskedReply(bytes(range(16)), PLAN),
    messages.SurvivorsRequest("run", 2, 1, ("north", "south")),
    messages.SurvivorsReply("ef" * 64),
    messages.UnmaskRequest("run", 2, 1, {"north": "ef" * 64}),
    messages.UnmaskReply({"north": "01" * 33}),
    messages.VoteRequest("run"),
    messages.VoteReply("small"),
]
BYTES_OF_VERSION_4 = [
    "fb25af7073aff0e8b159842595c87ec68efb6f9743fc47a7306ada4818701d83",
    "85215a74a26b708d9662cb1a57f2de5bc709c38c4f4aad7d21f34fec486cb946",
    "02c85e1b3fcd1702544fa76f95b3d7d3bb16199bde37f064af2033f5c8fca037",
    "8c4e6041abfad7d7db64d0bee2034387090533621a9e096a3e3229958c8250e3",
    "9cad123278b71364da5d4686fa5b0d2471aa0d4d781e1dfc01273ea164cd7561",
    "5bd3f5631540bd2d8aa2c9bec000df88183e37f4f6d419a56a39de96d07ec1ed",
    "4d38edcedb4ca4bdbdbca19c97507efdc4e322c0b9ae1e129207901fb61904b4",
    "0ec144bfa2c084129f371298fc4c17d3699dc5968b121fde91ab6fc55b1995c2",
    "aa0b0b2f4365b879021903a8494ec456072c6ffac4984beba02cae9fefb14839",
    "a1a2a573f8ffdff1cd8b1145c1ae789a81f6292d582104a5d2aa73f95753ca50",
    "27c0316382afff784152226e1e1c09143a2fbfcdff8dfb8b874511229ff85bfe",
    "cabe4608921201a48d70de0c97d7e0e8aabd891f4aae72bbc56c9abfee0cfc5e",
    "522ebebb71f913603b2183513509bf225d06aae0b1e3f6e0ad128915f5967810",
    "6730eac10c058652813892fd15e45616644f736c410e971ce3d8354049e53b4f",
    "320c46bbac2da3e448e2a5f01cae41d839ddb73280ae6707dda60c014af92ac9",
    "88d81f63180110cd9a149c4bba748ce8ccfa38b38001c49dcb0db5e0978e3a14",
    "cb5739b597f3d6c17ba58b4cf8c5d8904560383b5db38642610e59445a60423b",
    "19318fe20cf34ebe5359f091641f94d93a7bcfe776a673f8ddcdac4d6f1afaec",
    "b034333787ceb9efbe816735dcc4ddda5816f7d11e74cbeb47ac1c1ef896c019",
    "cd4326e16a8503ab2a1cce1671bbce0466fbab22d9184ea783ea4a961e5e89f2",
    "5f69df74542fa4dd790a8d9ac6a8c21546c2deecc542a2c39e176cf2b9e9a5a3",
    "e706991d6e200421337b551c4b78e8e70ad2ff8c95a027129dba73b2b69a0a4f",
    "b4f58e2b1d72b4593d10c4c75e5c2716a94c9c8d61afb7686c62c3aa550a0840",
    "9a3311529e352e4a314e8c5d2c2b5013dcc7857f7a3425ca977381c930cb8e55",
    "3aebac79a3ca7b429354b4525bb8401b1e0d4f1f700fd24182ea3da807b501f0",
    "99b3ed36e8d167012ea9eef40b5eb6a1cf344cb99801d34cbf4d9c8656431091",
    "371e16f42f8b1a0b491c74235ef690b83d170cdaf55304b7f097a152c6180dce",
    "b8617aa96818ffde548c08ddf3546e15e31ee15c32b51f1468381cbb88406cfc",
]


def same(left: Heads, right: Heads) -> bool:
    return {t: {n: (a.shape, a.tobytes()) for n, a in p.items()} for t, p in left.items()} == {
        t: {n: (a.shape, a.tobytes()) for n, a in p.items()} for t, p in right.items()
    }


@given(heads=heads_of_any_shape, round_=st.integers(1, 10**6))
def test_a_train_request_survives_the_wire_to_the_bit(heads: Heads, round_: int) -> None:
    records = messages.from_bytes(messages.to_bytes(messages.encode(messages.TrainRequest("run", round_, heads))))
    back = messages.decode(records, messages.TrainRequest)
    assert (back.run_id, back.round) == ("run", round_)
    assert same(back.heads, heads)


@pytest.mark.parametrize(
    "payload",
    [
        messages.JoinRequest("run", {"rounds": 3}, {"backbone": "d" * 64}),
        messages.JoinReply("north", {"task": 10}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(True, ())}),
        messages.PrepareRequest("run", {}),
        messages.PrepareRequest("run", {"d" * 64: "{}"}),
        messages.PartRequest("run", "d" * 64, 2, 3, b"\x00\x01"),
        messages.JoinReply("north", {"task": 10}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(False, (0, 2))}),
        messages.Ready(),
        messages.Declined(DeclineReason.BUDGET, "north"),
    ],
)
def test_every_payload_without_arrays_survives_the_wire(payload: messages.Payload) -> None:
    assert messages.decode(messages.from_bytes(messages.to_bytes(messages.encode(payload))), type(payload)) == payload


def test_a_field_that_came_later_is_left_out_where_it_is_empty_and_may_be_missing() -> None:
    plain, known = (messages.FinishRequest("run", HEADS, "d" * 64, each) for each in ({}, {"task": 1.5}))
    assert "temperatures" not in str(messages.encode(plain)["public"])
    assert messages.decode(messages.encode(plain), messages.FinishRequest).temperatures == {}
    assert messages.decode(messages.encode(known), messages.FinishRequest).temperatures == {"task": 1.5}
    for wrong in ({"task": 0.0}, {"task": "1"}, {"task": None}, [1.0]):
        with pytest.raises(BadInput, match="temperatures"):
            messages.decode(
                messages.encode(forged(messages.FinishRequest, "run", HEADS, "d" * 64, wrong, "")),
                messages.FinishRequest,
            )
    assert "chosen" not in str(messages.encode(plain)["public"])
    ended = messages.FinishRequest("run", {}, "d" * 64, chosen="small")
    assert messages.decode(messages.encode(ended), messages.FinishRequest) == ended
    with pytest.raises(BadInput, match="chosen"):
        bad = forged(messages.FinishRequest, "run", {}, "d" * 64, {}, "../small")
        messages.decode(messages.encode(bad), messages.FinishRequest)


def test_equal_requests_have_equal_digests_and_others_do_not() -> None:
    def digest(round_: int, value: float) -> str:
        heads = {"task": {"w": np.full((2,), value, np.float32)}}
        return messages.request_digest(messages.TrainRequest("run", round_, heads))

    assert digest(1, 0.5) == digest(1, 0.5)
    assert len({digest(1, 0.5), digest(2, 0.5), digest(1, 0.25)}) == 3


@pytest.mark.parametrize(
    ("layout", "data"),
    [
        ('{"task":{"weight":[1000000000,1000000000]}}', b"1234"),
        ('{"task":{"weight":[-1]}}', b""),
        ('{"task":{"weight":[-2,-2]}}', b"1" * 16),
        ('{"task":{"weight":[1.0]}}', b"1234"),
        ('{"task":{"weight":[true]}}', b"1234"),
        ('{"task":{"weight":1}}', b"1234"),
        ('{"task":[1]}', b"1234"),
        ('["task"]', b""),
        ('{"task":{"weight":[1]}}', b"12345678"),
        ("{", b""),
        ("[" * 100_000, b""),
        ('{"task":{"weight":[1]}}', "1234"),
        (7, b"1234"),
    ],
)
def test_heads_that_are_not_plain_float32_arrays_of_their_shapes_are_refused(layout: object, data: object) -> None:
    records = messages.encode(messages.TrainReply(Delta({}), PLAN))
    records["heads"] = ConfigRecord({"layout": layout, "data": data})  # type: ignore[dict-item]
    with pytest.raises(BadInput):
        messages.decode(records, messages.TrainReply)


@pytest.mark.parametrize("data", [b"12345678", b""])
def test_bytes_that_do_not_match_the_shapes_are_refused_before_any_array_is_made(data: bytes) -> None:
    records = messages.encode(messages.TrainReply(Delta({}), PLAN))
    records["heads"] = ConfigRecord({"layout": '{"task":{"weight":[1]}}', "data": data})
    with pytest.raises(BadInput, match="whose bytes match their shapes"):
        messages.decode(records, messages.TrainReply)


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"public": ConfigRecord({"json": "{"})}),
        RecordDict({"public": ConfigRecord({"json": "[" * 100_000})}),
        RecordDict({"public": ConfigRecord({"json": "[]"})}),
        RecordDict({"public": ConfigRecord({"json": 3})}),
        RecordDict({"public": ConfigRecord({"json": '{"payload": "TrainReply"}'})}),
        RecordDict({"public": ConfigRecord({"json": '{"payload": "TrainReply", "plan": 5}'})}),
        RecordDict({"public": ConfigRecord({"json": '{"payload": "TrainReply", "plan": {}, "loss": 1}'})}),
        RecordDict({"public": ArrayRecord({})}),
    ],
)
def test_a_malformed_message_is_refused_with_a_sentence(records: RecordDict) -> None:
    with pytest.raises(BadInput, match=r"TrainReply|public part"):
        messages.decode(records, messages.TrainReply)


def test_an_extra_record_is_refused() -> None:
    records = messages.encode(messages.TrainReply(Delta(HEADS), PLAN))
    records["metrics"] = ConfigRecord({"loss": 0.1})
    with pytest.raises(BadInput, match="unexpected record"):
        messages.decode(records, messages.TrainReply)


@pytest.mark.parametrize("size", [0, -5, 1.5, "10", True, 10**400])
def test_an_absurd_public_size_is_refused(size: object) -> None:
    records = messages.encode(
        messages.JoinReply("north", {"task": 10}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(True, ())})
    )
    text = json.loads(records.config_records["public"]["json"])
    text["tasks"]["task"] = size
    records["public"] = ConfigRecord({"json": json.dumps(text)})
    if size == 10**400:
        assert (
            messages.decode(records, messages.JoinReply).tasks["task"] == size
        )  # Bounded by the coordinator when sites join.
    else:
        with pytest.raises(BadInput, match=r"JoinReply\.tasks"):
            messages.decode(records, messages.JoinReply)


def test_a_message_is_few_objects_however_many_heads_it_has() -> None:
    """Flower asks for each object of a message in requests of its own."""
    heads = {f"task-{number}": {"weight": np.ones((2, 3), np.float32)} for number in range(20)}
    assert len(get_all_nested_objects(messages.encode(messages.TrainRequest("run", 1, heads)))) == 3


def changed(payload: messages.Payload, **changes: object) -> RecordDict:
    """A payload whose public part says something else."""
    text = json.loads(str(messages.encode(payload).config_records["public"]["json"]))
    return RecordDict({"public": ConfigRecord({"json": json.dumps({**text, **changes})})})


NOT_NAMES = ["", "../../x", "x" * 65, "x\x1b[2J", "two\nlines", "Upper", "-x", 7, None, ["x"]]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_a_site_or_task_whose_name_is_not_a_plain_one_is_refused(name: object) -> None:
    """It is shown on the coordinator's terminal and becomes a key of its reports."""
    honest = messages.JoinReply("north", {"task": 10}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(True, ())})
    with pytest.raises(BadInput):
        messages.decode(changed(honest, site=name), messages.JoinReply)
    if isinstance(name, str):
        with pytest.raises(BadInput):
            messages.decode(changed(honest, tasks={name: 10}), messages.JoinReply)
    if name != "":  # A site that cannot read its own file has no name.
        with pytest.raises(BadInput):
            messages.decode(changed(messages.Declined(DeclineReason.BUDGET, "north"), site=name), messages.Declined)


@pytest.mark.parametrize("field", ["delta", "budget_epsilon"])
@pytest.mark.parametrize("value", [0, -1.0, 1e-300, 1e6, 10**400, True, "1", None, float("nan"), float("inf")])
def test_a_budget_that_is_no_finite_number_is_refused(field: str, value: object) -> None:
    honest = messages.JoinReply("north", {"task": 10}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(True, ())})
    with pytest.raises(BadInput):
        messages.decode(changed(honest, **{field: value}), messages.JoinReply)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2.5},
        {"steps": True},
        {"steps": 10**400},
        {"steps": MAX_STEPS + 1},
        {"sampling_rate": True},
        {"sampling_rate": float("nan")},
        {"noise_multiplier": 10**400},
        {"noise_multiplier": 1e-150},
        {"noise_multiplier": 1e200},
        {"sampling_rate": 1e-150},
        {"clip_norm": 1e-300},
        {"noise_multiplier": 0.0, "clip_norm": "x" * 1000},
        {"noise_multiplier": 0.0, "clip_norm": {"nested": 1}},
        {"noise_multiplier": 0.0, "clip_norm": float("inf")},
    ],
    ids=str,
)
def test_a_plan_that_is_not_one_of_numbers_is_refused(change: dict[str, object]) -> None:
    """It is written into the coordinator's journal, from which every report is made."""
    plan = {**dataclasses.asdict(PLAN), "unit": "patient", **change}
    with pytest.raises(BadInput):
        messages.decode(changed(messages.TrainReply(Delta({}), PLAN), plan=plan), messages.TrainReply)


def test_a_round_costs_head_size_and_at_most_five_percent() -> None:
    heads = {"task": {"weight": np.zeros((8, 1280), np.float32), "bias": np.zeros(8, np.float32)}}
    size = messages.encoded_size(messages.encode(messages.TrainReply(Delta(heads), PLAN)))
    assert size <= 1.05 * 4 * (8 * 1280 + 8)


def test_float16_contributions_take_half_the_bytes_and_arrive_as_the_nearest_of_their_numbers() -> None:
    values = np.random.default_rng(0).normal(size=(8, 1280)).astype(np.float32)
    heads = {"task": {"bias": np.array([1e6, -1e6, 65504.0, 1e-9], np.float32), "weight": values}}
    records = messages.encode(messages.TrainReply(Delta(heads), PLAN, "float16"))
    got = messages.decode(messages.from_bytes(messages.to_bytes(records)), messages.TrainReply).delta.heads["task"]
    assert got["weight"].dtype == np.float32
    assert np.array_equal(got["weight"], values.astype(np.float16).astype(np.float32))
    # The largest ones are cut, not infinite: an infinite value would cost the site its whole reply.
    assert got["bias"].tolist() == [65504.0, -65504.0, 65504.0, 0.0]
    assert messages.encoded_size(records) <= 1.05 * 2 * (8 * 1280 + 4)


@pytest.mark.parametrize("precision", ["float32", "float64", None, ["float16"]])
def test_contributions_whose_bytes_are_not_of_the_stated_precision_are_refused(precision: object) -> None:
    reply = messages.TrainReply(Delta({"task": {"w": np.ones(3, np.float32)}}), PLAN, "float16")
    assert messages.decode(with_heads_of(reply, changed(reply)), messages.TrainReply).precision == "float16"
    with pytest.raises(BadInput):
        messages.decode(with_heads_of(reply, changed(reply, precision=precision)), messages.TrainReply)


def with_heads_of(reply: messages.TrainReply, records: RecordDict) -> RecordDict:
    return RecordDict({**records, "heads": messages.encode(reply)["heads"]})


def test_every_field_a_site_sends_has_one_privacy_reason_and_one_row_in_the_table() -> None:
    reasons = messages.privacy_reasons()
    sums = {"SumKeysReply", "SumSharesReply", "MaskedReply", "SurvivorsReply", "UnmaskReply"}
    others = {"JoinReply", "Held", "Ready", "MomentsReply", "VoteReply", "TrainReply", "EvaluateReply", "Declined"}
    assert set(reasons) == sums | others
    table = messages.format_privacy_table().splitlines()
    for model, fields in reasons.items():
        assert set(fields) == {field.name for field in dataclasses.fields(getattr(messages, model))}
        assert all(f"| {model} | {name} | {reason} |" in table for name, reason in fields.items())
    assert len(table) == 2 + sum(max(1, len(fields)) for fields in reasons.values())


@dataclass(frozen=True)
class Unreasoned:
    loss: float


@dataclass(frozen=True)
class Outer:
    inner: Annotated[dict[str, Unreasoned], messages.Reason("public")]


def test_a_field_without_a_privacy_reason_is_an_error_also_inside_another_model() -> None:
    for model in (Unreasoned, Outer):
        with pytest.raises(TypeError, match=r"Unreasoned\.loss"):
            messages.privacy_reasons((model,))


@pytest.mark.parametrize("digest", ["../../secret", "/etc", "d" * 5000, 7, "D" * 64, "d" * 63])
def test_a_digest_that_could_be_a_path_is_refused(digest: object) -> None:
    honest = messages.JoinRequest("run", {}, {"backbone": "d" * 64})
    with pytest.raises(BadInput, match=r"JoinRequest\.backbones"):
        messages.decode(changed(honest, backbones={"backbone": digest}), messages.JoinRequest)


@pytest.mark.parametrize("digest", ["../../secret", "d" * 5000, 7, None, "D" * 64, "d" * 63])
def test_a_part_or_settings_of_no_digest_are_refused(digest: object) -> None:
    honest = messages.encode(messages.PartRequest("run", "d" * 64, 0, 1, b"1"))
    part = changed(messages.PartRequest("run", "d" * 64, 0, 1, b"1"), digest=digest)
    with pytest.raises(BadInput, match=r"PartRequest\.digest"):
        messages.decode(RecordDict({**part, "part": honest["part"]}), messages.PartRequest)
    with pytest.raises(BadInput):
        messages.decode(changed(messages.PrepareRequest("run", {}), specs={str(digest): "{}"}), messages.PrepareRequest)


@pytest.mark.parametrize("specs", [None, "{}", ["d" * 64], {"d" * 64: 7}, {"d" * 64: None}])
def test_settings_that_are_no_texts_by_digest_are_refused(specs: object) -> None:
    with pytest.raises(BadInput):
        messages.decode(changed(messages.PrepareRequest("run", {}), specs=specs), messages.PrepareRequest)


@pytest.mark.parametrize("backbones", [{}, None, "d" * 64, {"../x": "d" * 64}, {f"b{n}": "d" * 64 for n in range(17)}])
def test_an_offer_without_named_digests_is_refused(backbones: object) -> None:
    with pytest.raises(BadInput):
        messages.decode(
            changed(messages.JoinRequest("run", {}, {"backbone": "d" * 64}), backbones=backbones), messages.JoinRequest
        )


@pytest.mark.parametrize(
    "held",
    [
        {},
        True,
        {"whole": 1, "parts": []},
        {"whole": True},
        {"whole": True, "parts": 3},
        {"whole": False, "parts": [True]},
    ],
)
def test_what_is_held_of_a_backbone_is_a_truth_and_numbers(held: object) -> None:
    honest = messages.JoinReply("north", {"task": 10}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(True, ())})
    with pytest.raises(BadInput):
        messages.decode(changed(honest, backbones={"backbone": held}), messages.JoinReply)


@pytest.mark.parametrize(("run_id", "round_"), [(["run"], 1), ("run", "1"), ("run", True), (3, 1)])
def test_a_run_or_round_of_another_type_is_refused(run_id: object, round_: object) -> None:
    honest = messages.TrainRequest("run", 1, {})
    records = changed(honest, run_id=run_id, round=round_)
    with pytest.raises(BadInput, match=r"TrainRequest\.(run_id|round)"):
        messages.decode(RecordDict({**records, "heads": messages.encode(honest)["heads"]}), messages.TrainRequest)


@pytest.mark.parametrize("change", [{"heads": {}}, {"loss": 0.1}], ids=str)
def test_a_field_that_does_not_belong_into_the_public_part_is_refused(change: dict[str, object]) -> None:
    """Also one that travels in a record of its own: its sizes are checked there."""
    honest = messages.TrainRequest("run", 1, HEADS)
    with pytest.raises(BadInput):
        messages.decode(
            RecordDict({**changed(honest, **change), "heads": messages.encode(honest)["heads"]}), messages.TrainRequest
        )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(messages.JoinReply)])
def test_a_field_that_is_missing_is_refused_and_no_error_quotes_the_sender(name: str) -> None:
    honest = messages.JoinReply("north", {"task": 10}, Unit.EXAMPLE, 1e-5, 3.0, {"backbone": messages.Held(True, ())})
    public = json.loads(str(messages.encode(honest).config_records["public"]["json"]))
    del public[name]
    with pytest.raises(BadInput):
        messages.decode(RecordDict({"public": ConfigRecord({"json": json.dumps(public)})}), messages.JoinReply)
    for value in ("secret", {"secret": "secret"}, {"a": {"secret": 1}}, ["secret"]):
        with pytest.raises(BadInput) as caught:
            messages.decode(changed(honest, **{name: value}), messages.JoinReply)
            if name == "site":
                raise BadInput("a name")  # "secret" is one.
        assert "secret" not in str(caught.value)


def test_a_message_cannot_be_made_of_values_that_no_receiver_accepts() -> None:
    with pytest.raises(ValidationError, match="index below"):
        messages.PartRequest("run", "d" * 64, 2, 2, b"1")
    with pytest.raises(ValidationError, match="greater than 0"):
        messages.EvaluateReply({}, 0.0)
    with pytest.raises(ValidationError):
        messages.JoinRequest("run", {}, {})


def test_messages_have_the_bytes_that_version_4_began_with() -> None:
    """Other bytes would be another request to a site that answered this one: then VERSION goes up."""
    assert messages.VERSION == 4
    digests = [hashlib.sha256(messages.to_bytes(messages.encode(message))).hexdigest() for message in ONE_OF_EACH]
    assert digests == BYTES_OF_VERSION_4


def test_a_request_that_shows_another_witness_is_the_same_request() -> None:
    """Else a coordinator that continues a run would ask something new, and the site would not resend its reply."""
    for request in (
        messages.TrainRequest("run", 2, HEADS),
        messages.EvaluateRequest("run", 2, HEADS),
        messages.VoteRequest("run"),
    ):
        shown = dataclasses.replace(request, witness=WITNESS)
        assert messages.decode(messages.encode(shown), type(request)).witness == WITNESS
        assert messages.request_digest(shown) == messages.request_digest(request)


@pytest.mark.parametrize(
    "change", [{"length": 0}, {"length": True}, {"length": 2**41}, {"mac": "A" * 64}, {"tag": "a" * 63}, {"chain": 7}]
)
def test_a_witness_that_is_none_is_refused(change: dict[str, object]) -> None:
    forged_witness = dataclasses.replace(WITNESS, **change)  # type: ignore[arg-type]
    records = messages.encode(forged(messages.TrainRequest, "run", 2, HEADS, forged_witness))
    with pytest.raises(BadInput, match="witness"):
        messages.decode(records, messages.TrainRequest)
