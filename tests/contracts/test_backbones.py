"""Every backbone kind found in the folder, each with its own example: frozen, deterministic, independent of the batch,
with a digest that names exactly what shapes features, and a blob that travels and is verified."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from common.backbones import DecoderLanguage, Example, Language, WeightedKind, find_weights_file, resolve_settings
from common.backbones.parts.weights import compute_digest
from common.inputs import Text
from common.model.backbones import Backbone, load_blob, open_pretrained, open_random, open_untrained
from common.plugins import kinds, plugin_class
from common.types import BackboneBlob, BadInput, DigestMismatch
from tests.loaded import list_loaded

KINDS = kinds("common.backbones")
ROOT = Path(__file__).resolve().parents[2]


def example_of(kind: str, folder: Path) -> Example:
    return plugin_class("common.backbones", kind).example(folder)


@pytest.fixture(scope="module", params=KINDS)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    return example_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def backbone(example: Example) -> Backbone:
    return open_pretrained(example.settings, "backbone")


def inputs_of(backbone: Backbone, example: Example) -> Tensor:
    return torch.stack([backbone.preprocess(item) for item in example.items])


def state_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}


def test_features_are_finite_float32_of_the_stated_width(backbone: Backbone, example: Example) -> None:
    features_BD = backbone.encode(inputs_of(backbone, example))
    assert features_BD.shape == (len(example.items), *backbone.grid, backbone.feature_dim)
    assert features_BD.dtype == torch.float32
    assert torch.isfinite(features_BD).all()
    assert len({tuple(row.flatten().tolist()) for row in features_BD}) > 1, "the example's items must differ"


def test_a_network_without_memory_says_how_many_features_it_has(example: Example) -> None:
    plain = {**example.settings, "projection": None}
    with torch.device("meta"):
        untrained = open_untrained(plain, "backbone", seed=0)
    assert untrained.feature_dim == open_pretrained(plain, "backbone").feature_dim
    assert all(values.device.type == "meta" for values in untrained.module.parameters())


def test_encoding_twice_gives_the_same_bits_and_opening_twice_the_same_backbone(
    backbone: Backbone, example: Example
) -> None:
    inputs = inputs_of(backbone, example)
    again = open_pretrained(example.settings, "backbone")
    assert torch.equal(backbone.encode(inputs), backbone.encode(inputs))
    assert torch.equal(backbone.encode(inputs), again.encode(inputs_of(again, example)))
    assert again.digest == backbone.digest


def test_an_items_features_do_not_depend_on_its_batch(backbone: Backbone, example: Example) -> None:
    inputs = inputs_of(backbone, example)
    alone = torch.cat([backbone.encode(item.unsqueeze(0)) for item in inputs])
    torch.testing.assert_close(backbone.encode(inputs), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.encode(inputs.flip(0)).flip(0), alone, rtol=1e-5, atol=1e-5)


def test_raw_inputs_become_what_preprocessing_makes(backbone: Backbone, example: Example) -> None:
    if backbone.open_raw is None:
        pytest.skip("the kind says of no raw inputs: it is not exported")
    raw = backbone.open_raw()
    assert len({tensor.name for tensor in raw.tensors}) == len(raw.tensors)
    json.dumps(raw.before)
    for given in example.items:
        # A text that is to be written is not there yet.
        item = Text(given.first) if backbone.language is not None else given
        prepared = raw.prepare(item)
        for tensor, stated in zip(prepared, raw.tensors, strict=True):
            assert str(tensor.dtype) == f"torch.{stated.dtype}"
            assert len(tensor.shape) == len(stated.shape)
            assert all(
                isinstance(axis, str) or axis == own for axis, own in zip(stated.shape, tensor.shape, strict=True)
            )
        made = raw.module(*(tensor[None] for tensor in prepared))[0]
        torch.testing.assert_close(made, backbone.preprocess(item), rtol=1e-6, atol=1e-6)


def test_train_thaws_nothing(backbone: Backbone, example: Example) -> None:
    inputs = inputs_of(backbone, example)
    before, features = state_of(backbone), backbone.encode(inputs)
    backbone.module.train()
    for module in backbone.module.modules():
        module.train()
    assert torch.equal(backbone.encode(inputs), features)
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    after = state_of(backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_the_same_features(backbone: Backbone, example: Example) -> None:
    inputs = inputs_of(backbone, example)
    features = backbone.encode(inputs)
    moved = backbone.to(torch.device("cuda"))
    # TF32 convolutions keep three decimal places.
    torch.testing.assert_close(moved.encode(inputs), features, rtol=1e-2, atol=1e-2)
    assert moved.blob() == open_pretrained(example.settings, "backbone").blob()


def test_heads_train_on_encoded_features(backbone: Backbone, example: Example) -> None:
    features = backbone.encode(inputs_of(backbone, example))
    head = nn.Linear(backbone.feature_dim, 2)
    head(features).square().sum().backward()
    assert head.weight.grad is not None


def test_opening_leaves_torchs_generator_as_it_was(example: Example) -> None:
    before = torch.random.get_rng_state()
    load_blob(open_pretrained(example.settings, "backbone").blob())
    assert torch.equal(before, torch.random.get_rng_state())


def test_resolving_twice_changes_nothing_and_leaves_no_location(backbone: Backbone, example: Example) -> None:
    assert resolve_settings(backbone.kind) == backbone.kind
    assert find_weights_file(backbone.kind) is None
    weights = example.settings.get("weights")
    assert weights is None or str(weights) not in backbone.spec
    assert json.loads(backbone.spec) == backbone.public_spec()


def test_a_blob_becomes_the_same_backbone(backbone: Backbone, example: Example) -> None:
    received = load_blob(backbone.blob())
    inputs = inputs_of(received, example)
    assert received.digest == backbone.digest
    assert received.feature_dim == backbone.feature_dim
    assert torch.equal(received.encode(inputs), backbone.encode(inputs_of(backbone, example)))


def test_a_site_looks_at_no_place_that_settings_name(backbone: Backbone, example: Example) -> None:
    sent = backbone.blob()
    for key in {"folder", "weights"} & set(example.settings):
        # What is not there would be missed.
        spec = json.dumps({**example.settings, key: "/nowhere/q7"}, sort_keys=True)
        digest = compute_digest(spec, load(bytes(sent.weights)).items())
        with pytest.raises(BadInput, match="expected resolved settings without any location of weights"):
            load_blob(dataclasses.replace(sent, spec=spec, digest=digest))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "timm", "model": "hf-hub:q7/q7"},
        {"kind": "transformers", "model": "q7", "modality": "text"},
        {"kind": "open_clip", "model": "q7/q7"},
        {"kind": "seq2seq", "encoder": {"kind": "transformers", "model": "q7", "modality": "text"}},
    ],
)
def test_a_site_asks_no_hub_for_what_a_coordinator_names(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *place, **_: asked.append(place) or [])
    spec = json.dumps(settings, sort_keys=True)
    blob = BackboneBlob(spec=spec, weights=save({}), digest=compute_digest(spec, []))
    with pytest.raises(BadInput, match="expected resolved settings without any location of weights"):
        load_blob(blob)
    assert asked == []


def test_any_changed_tensor_is_a_digest_mismatch(backbone: Backbone) -> None:
    blob = backbone.blob()
    names = list(state_of(backbone))
    for name in {*names[:: max(1, len(names) // 8)], *names[-2:]}:
        state = load(blob.weights)
        flat = state[name].reshape(-1)
        flat[-1] += 1
        with pytest.raises(DigestMismatch):
            load_blob(dataclasses.replace(blob, weights=save(state)))


def test_changed_settings_are_a_digest_mismatch(backbone: Backbone) -> None:
    blob = backbone.blob()
    other = json.dumps({**backbone.public_spec(), "projection": {"normalize": True}}, sort_keys=True)
    with pytest.raises(DigestMismatch):
        load_blob(dataclasses.replace(blob, spec=other))


def test_malformed_and_oversized_blobs_are_bad_input(backbone: Backbone) -> None:
    blob = backbone.blob()
    for bad in (
        dataclasses.replace(blob, weights=b"\x80\x04."),
        dataclasses.replace(blob, spec="{"),
        BackboneBlob("[]", b"", ""),
    ):
        with pytest.raises(BadInput):
            load_blob(bad)
    with pytest.raises(BadInput, match="at most"):
        load_blob(blob, max_weight_bytes=len(blob.weights) - 1)


def test_a_language_writes_behind_its_own_tokens_from_the_states_of_the_features(
    backbone: Backbone, example: Example
) -> None:
    language = backbone.language
    if language is None:
        pytest.skip("the kind writes no texts")
    assert language.embedding_VD.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=1e-5)
    pairs = [item for item in example.items if item.second is not None]
    features_BPD = backbone.encode([backbone.preprocess(item) for item in pairs])
    if isinstance(language, DecoderLanguage):
        check_decoder(language, features_BPD, [item.second for item in pairs])
        return
    unread = backbone.encode([backbone.preprocess(dataclasses.replace(item, second=None)) for item in pairs])
    for row, item in enumerate(pairs):
        tokens = [*language.read(item.second), language.end]
        assert language.write(tokens[:-1]) == item.second
        # Without its text a record has the same source and nothing that tells the text.
        known, before = language.begin(unread[row : row + 1]), language.start
        assert not unread[row, : language.longest].any()
        for place, token in enumerate(tokens):
            state_1D, known = language.step(known, torch.tensor([before]), place)
            torch.testing.assert_close(state_1D[0], features_BPD[row, place], rtol=1e-4, atol=1e-5)
            before = token
        assert not features_BPD[row, len(tokens) : language.longest].any()


def check_decoder(language: Language, features_BPM: Tensor, texts: list[str]) -> None:
    """Checks that a copy of the decoder tells whole texts as the language does token by token."""
    assert isinstance(language, DecoderLanguage)
    for row, text in enumerate(texts):  # type: ignore[unreachable]
        tokens = [*language.read(text), language.end]
        assert language.write(tokens[:-1]) == text and len(tokens) <= language.longest
        before = [language.start, *tokens[:-1]]
        with torch.no_grad():
            whole_TD = language.open_decoder()(features_BPM[row : row + 1], torch.tensor([before]))[0]
            known = language.begin(features_BPM[row : row + 1])
            for place, token in enumerate(before):
                state_1D, known = language.step(known, torch.tensor([token]), place)
                torch.testing.assert_close(state_1D[0], whole_TD[place], rtol=1e-4, atol=1e-5)
        assert language.make_first_map().shape == language.find_map_shape()


def has_projections(backbone: Backbone) -> bool:
    """Whether the kind's features may be projected at all."""
    return type(backbone.kind).model_fields["projection"].annotation is not type(None)  # type: ignore[attr-defined]


def test_a_projection_of_the_same_weights_is_another_backbone(backbone: Backbone, example: Example) -> None:
    if not has_projections(backbone):
        pytest.skip("the kind's features stay as they are")
    other = open_pretrained({**example.settings, "projection": {"normalize": True}}, "backbone")
    assert other.digest != backbone.digest
    norms = other.encode(inputs_of(other, example)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_random_backbone_has_the_same_shape_and_other_features(backbone: Backbone, example: Example) -> None:
    if not isinstance(backbone.kind, WeightedKind):
        with pytest.raises(BadInput, match="backbone.kind"):
            open_random(example.settings, "backbone", seed=1)
        return
    first, same, other = (open_random(example.settings, "backbone", seed=seed) for seed in (1, 1, 2))
    inputs = inputs_of(backbone, example)
    assert first.spec == backbone.spec
    assert first.digest == same.digest
    assert len({first.digest, other.digest, backbone.digest}) == 3
    assert torch.equal(first.encode(inputs), same.encode(inputs))
    assert first.encode(inputs).shape == backbone.encode(inputs).shape


def test_random_features_are_as_large_as_real_ones_and_differ_between_items(example: Example) -> None:
    plain = {**example.settings, "projection": None}
    shifted = {**example.settings, "projection": {"shift": "batch_norm", "normalize": True}}
    if not isinstance(open_pretrained(plain, "backbone").kind, WeightedKind):
        pytest.skip("this kind has no weights")
    for settings in (plain, shifted) if has_projections(open_pretrained(plain, "backbone")) else (plain,):
        backbone = open_random(settings, "backbone", seed=1)
        features_BD = backbone.encode(inputs_of(backbone, example))
        if settings is plain:
            assert 0.1 < features_BD.square().mean().sqrt() < 10
        # An untrained BatchNorm normalises nothing: without care all items end in one point.
        assert features_BD.std(0).norm() > 0.01 * features_BD.norm(dim=1).mean()


def test_an_unusable_item_is_a_bad_record_that_does_not_repeat_it(backbone: Backbone) -> None:
    secret = "Jane Doe 1970"
    with pytest.raises(BadInput) as caught:
        backbone.preprocess(secret)
    assert secret not in str(caught.value)


@pytest.mark.slow
def test_digests_are_the_same_in_another_process(tmp_path: Path) -> None:
    here = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        here[kind] = open_pretrained(example_of(kind, tmp_path / kind).settings, "backbone").digest
    script = (
        "import json, sys; from pathlib import Path\n"
        "from common.model.backbones import open_pretrained\n"
        "from common.plugins import kinds, plugin_class, resolve\n"
        "root = Path(sys.argv[1])\n"
        "example = lambda kind: plugin_class('common.backbones', kind).example(root / kind)\n"
        "digests = {kind: open_pretrained(example(kind).settings, 'backbone').digest"
        " for kind in kinds('common.backbones')}\n"
        "print(json.dumps(digests))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == here


def test_reading_settings_loads_no_torch(tmp_path: Path) -> None:
    settings = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        settings[kind] = dict(example_of(kind, tmp_path / kind).settings)
    code = "from common.plugins import resolve\nread = lambda own: resolve('common.backbones', own, 'own').model_dump()"
    heavy = ("torch", "torchvision", "transformers", "tokenizers", "scipy")
    assert list_loaded(code, settings, heavy) == {kind: [] for kind in KINDS}
