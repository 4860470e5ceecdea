"""Families of the transformers library that say other widths, read spectra, or need their folder's own steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel, BertModel

from common.backbones.parts.hub.huggingface import silence
from common.backbones.parts.hub.spectra import SILENCE_FRAMES, encode_spectra
from common.backbones.transformers import Transformers
from common.inputs import Audio, Text
from common.model.backbones import Backbone, load_blob, open_pretrained
from common.types import BadInput

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_model(folder: Path, model: Any, processor: Any) -> dict[str, Any]:
    with silence():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    is_picture = "ImageProcessor" in type(processor).__name__
    return {"kind": "transformers", "folder": str(folder), "modality": "image" if is_picture else "audio"}


def encode(backbone: Backbone, items: Any) -> torch.Tensor:
    return backbone.encode([backbone.preprocess(item) for item in items])


def pictures() -> list[Any]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), dtype=np.uint8))


def recordings(sizes: tuple[int, ...] = (9000, 16000, 5200)) -> list[Audio]:
    rng = np.random.default_rng(0)
    return [Audio(rng.normal(size=size).astype(np.float32) / 4, 16000) for size in sizes]


def resize(side: int = 64) -> Any:
    return transformers.ViTImageProcessor(size={"height": side, "width": side})


CONVOLUTIONAL = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "MobileNetV2": {"depth_multiplier": 0.25},
}


@pytest.mark.parametrize("family", ["ResNet", "EfficientNet", "MobileNetV2"])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_convolutional_nets_encode_and_say_their_width(family: str, pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CONVOLUTIONAL[family])
    settings = save_model(tmp_path, getattr(transformers, f"{family}Model")(config), resize())
    backbone = open_pretrained({**settings, "pooling": pooling}, "b")
    model = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pixels = resize()(images=pictures(), return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).last_hidden_state.mean((2, 3))
    torch.testing.assert_close(encode(backbone, pictures()), expected, rtol=1e-3, atol=1e-5)
    assert backbone.feature_dim == expected.shape[1]


def test_a_width_other_than_declared_is_seen_by_a_trial(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 24}
    config = transformers.SamVisionConfig(image_size=64, patch_size=16, window_size=2, **sizes)
    backbone = open_pretrained(save_model(tmp_path, transformers.SamVisionModel(config), resize()), "b")
    assert encode(backbone, pictures()).shape == (3, 24)


def test_pictures_in_their_own_shape_do_not_depend_on_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(num_patches=16, patch_size=8, **TINY)
    processor = transformers.Siglip2ImageProcessor(max_num_patches=16, patch_size=8)
    model = transformers.Siglip2VisionModel(config).eval()
    backbone = open_pretrained(save_model(tmp_path, model, processor), "b")
    uneven = [np.full((32, 32, 3), 90, np.uint8), np.full((24, 40, 3), 200, np.uint8), *pictures()[:1]]
    used = processor(images=uneven, return_tensors="pt")["pixel_attention_mask"].sum(1)
    assert len(set(used.tolist())) > 1, "some pictures must have fewer patches than others"
    found = encode(backbone, uneven)
    for row, picture in enumerate(uneven):
        made = processor(images=[picture], return_tensors="pt")
        with torch.no_grad():
            hidden = model(**made).last_hidden_state[0]
        own = made["pixel_attention_mask"][0].bool()
        torch.testing.assert_close(found[row], hidden[own].mean(0), rtol=1e-4, atol=1e-5)


def tiny_whisper(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    more = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 20}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = transformers.WhisperConfig(**sizes, **more, **tokens)
    settings = save_model(folder, transformers.WhisperModel(config), transformers.WhisperFeatureExtractor())
    return {**settings, "part": "encoder", "seconds": 2.0}


def test_whisper_is_averaged_over_a_recordings_own_frames(tmp_path: Path) -> None:
    backbone = open_pretrained(tiny_whisper(tmp_path), "b")
    model = AutoModel.from_pretrained(tmp_path).eval().encoder
    found = encode(backbone, recordings())
    for row, clip in enumerate(recordings()):
        spectra = transformers.WhisperFeatureExtractor()(clip.samples_T, sampling_rate=16000, return_tensors="pt")
        own = -(-len(clip.samples_T) // 160)
        with torch.no_grad():
            frames = encode_spectra(model, spectra["input_features"][:, :, : own + 2 * SILENCE_FRAMES])
        torch.testing.assert_close(found[row], frames[0, : -(-own // 2)].mean(0), rtol=1e-4, atol=1e-5)


def test_a_spectrogram_of_fixed_size_is_averaged_over_the_patches_of_the_recording(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ASTConfig(max_length=128, num_mel_bins=32, initializer_range=0.5, **TINY)
    extractor = transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=32)
    settings = save_model(tmp_path, transformers.ASTModel(config), extractor)
    backbone = open_pretrained({**settings, "seconds": 1.2}, "b")
    (clip,) = recordings((8000,))
    model = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hidden = model(**extractor(clip.samples_T, sampling_rate=16000, return_tensors="pt")).last_hidden_state[0]
    # Two bands of twelve patches, ten steps apart; half a second is fifty steps.
    bands = hidden[2:].view(2, 12, 16)[:, :5].reshape(10, 16)
    expected = torch.cat([hidden[:2], bands]).mean(0)
    torch.testing.assert_close(encode(backbone, [clip])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:divide by zero")  # In the library's own extractor.
@pytest.mark.parametrize("family", ["Speech2Text", "Wav2Vec2Bert"])
def test_spectra_of_unequal_length_stack_and_do_not_depend_on_each_other(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if family == "Speech2Text":
        sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        config: Any = transformers.Speech2TextConfig(
            vocab_size=20, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, conv_channels=16, **sizes
        )
        extractor: Any = transformers.Speech2TextFeatureExtractor()
    else:
        config = transformers.Wav2Vec2BertConfig(conv_depthwise_kernel_size=7, **TINY)
        extractor = transformers.SeamlessM4TFeatureExtractor()
    settings = save_model(tmp_path, getattr(transformers, f"{family}Model")(config), extractor)
    part = {"part": "encoder"} if family == "Speech2Text" else {}
    backbone = open_pretrained({**settings, **part, "seconds": 1.0}, "b")
    found = encode(backbone, recordings())
    model = AutoModel.from_pretrained(tmp_path).eval()
    model = model.encoder if part else model
    for row, clip in enumerate(recordings()):
        made = extractor(clip.samples_T, sampling_rate=16000, return_tensors="pt")
        values = made["input_features"][:, made["attention_mask"][0].bool()]
        with torch.no_grad():
            expected = model(values).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_encode_such_records_names_the_part_that_does(tmp_path: Path) -> None:
    settings = tiny_whisper(tmp_path)
    with pytest.raises(BadInput, match=r"b\.model: expected one that encodes .* write `part: encoder`"):
        open_pretrained({**settings, "part": None}, "b")


@pytest.fixture
def sentences(tmp_path: Path) -> dict[str, Any]:
    """A folder as sentence-transformers writes it: last token, one linear layer, norm, and a prompt."""
    settings = dict(Transformers.example(tmp_path).settings)
    steps = ["Transformer", "Pooling", "Dense", "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{step}" if i else "", "type": f"sentence_transformers.models.{step}"}
        for i, step in enumerate(steps)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for i, step in enumerate(steps[1:], 1):
        (tmp_path / f"{i}_{step}").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    dense = {
        "in_features": 16,
        "out_features": 6,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(dense))
    torch.manual_seed(1)
    layer = {"linear.weight": torch.randn(6, 16), "linear.bias": torch.randn(6)}
    save_file(layer, tmp_path / "2_Dense" / "model.safetensors")
    prompts = {"prompts": {"query": "the scan ", "plain": ""}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return settings


def test_a_folder_of_sentence_transformers_gives_its_own_embeddings(sentences: dict[str, Any]) -> None:
    folder = Path(sentences["folder"])
    model = BertModel.from_pretrained(folder).eval()
    from safetensors.torch import load_file

    layer = load_file(folder / "2_Dense" / "model.safetensors")
    # [CLS] the scan shows an edema [SEP]
    with torch.no_grad():
        last = model(torch.tensor([[2, 4, 5, 6, 9, 10, 3]])).last_hidden_state[0, -1]
    expected = torch.tanh(layer["linear.weight"] @ last + layer["linear.bias"])
    backbone = open_pretrained(sentences, "b")
    found = encode(backbone, [Text("shows an edema"), Text("shows no tumour . an edema .")])
    torch.testing.assert_close(found[0], expected / expected.norm(), rtol=1e-4, atol=1e-5)
    assert torch.equal(encode(load_blob(backbone.blob()), [Text("shows an edema")])[0], found[0])
    unprompted = open_pretrained({**sentences, "prompt": "none"}, "b")
    torch.testing.assert_close(encode(unprompted, [Text("the scan shows an edema")])[0], found[0])
    own = open_pretrained({**sentences, "prompt": "the scan "}, "b")
    assert own.digest == backbone.digest != unprompted.digest


def test_written_pooling_reads_a_model_without_its_folders_steps(sentences: dict[str, Any]) -> None:
    backbone = open_pretrained({**sentences, "pooling": "mean"}, "b")
    assert backbone.feature_dim == 16
    assert json.loads(backbone.spec)["projection"] is None


@pytest.mark.parametrize(
    ("file", "content", "change", "message"),
    [
        ("1_Pooling/config.json", '{"pooling_mode": "max"}', {}, "b.folder: expected pooling by mean.*write `pooling`"),
        ("2_Dense/config.json", '{"in_features": 16}', {}, "expected a Dense step of one linear layer"),
        ("modules.json", '[{"type": "sentence_transformers.models.WordWeights"}]', {}, "got 'WordWeights'"),
        ("1_Pooling/config.json", '{"include_prompt": false}', {}, "prompt: expected a model that pools its prompt"),
        ("notes", "", {"prompt": "qery"}, "nearest: 'query'"),
    ],
)
def test_other_steps_are_refused_with_what_to_write(
    sentences: dict[str, Any], file: str, content: str, change: dict[str, Any], message: str
) -> None:
    (Path(sentences["folder"]) / file).write_text(content)
    with pytest.raises(BadInput, match=message):
        open_pretrained({**sentences, **change}, "b")


def test_a_prompt_stands_in_front_of_a_pairs_first_text(sentences: dict[str, Any]) -> None:
    """As sentence-transformers has it."""
    prompted = open_pretrained(sentences, "b")
    plain = open_pretrained({**sentences, "prompt": "none"}, "b")
    found = prompted.encode([prompted.preprocess(Text("shows an edema", "no tumour"))])
    torch.testing.assert_close(encode(plain, [Text("the scan shows an edema", "no tumour")]), found)
    both = encode(plain, [Text("the scan shows an edema", "the scan no tumour")])
    assert not torch.allclose(both, found, atol=1e-3)


@pytest.mark.parametrize("own", ["<s> $A", None])
def test_a_token_that_only_the_settings_name_ends_every_text(own: str | None, tmp_path: Path) -> None:
    """E5-Mistral's tokenizer.json begins texts, and tokenizer_config.json alone says that a token ends them."""
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    words = {"<s>": 0, "</s>": 1, "the": 2, "scan": 3, "[UNK]": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if own:
        pair = "<s> $A <s>:1 $B:1"
        tokenizer.post_processor = TemplateProcessing(single=own, pair=pair, special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=5, num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1, **TINY
    )
    model = transformers.MistralModel(config).eval()
    with silence():
        model.save_pretrained(tmp_path)
    settings = {"kind": "transformers", "folder": str(tmp_path), "modality": "text", "pooling": "last", "max_length": 4}
    begin = [0] if own else []
    plain = open_pretrained(settings, "b")
    assert plain.preprocess(Text("the scan"))[0].tolist()[: len(begin) + 2] == [*begin, 2, 3]
    end = {"add_eos_token": True, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(end))
    backbone = open_pretrained(settings, "b")
    whole = [*begin, 2, 3, 1]
    with torch.no_grad():
        expected = model(torch.tensor([whole])).last_hidden_state[0, -1]
    torch.testing.assert_close(encode(backbone, [Text("the scan")])[0], expected, rtol=1e-4, atol=1e-5)
    assert backbone.preprocess(Text("the scan scan scan scan"))[0].tolist()[-1] == 1, "cut before the token that ends"
    assert backbone.digest != plain.digest
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True, "eos_token": "<end>"}))
    with pytest.raises(BadInput, match="folder: expected an eos_token of the tokenizer beside add_eos_token"):
        open_pretrained(settings, "b")


def test_the_linear_layers_behind_a_model_make_its_width(tmp_path: Path) -> None:
    """EmbeddingGemma: Gemma 3 that reads both ways, the mean, two linear layers, and a norm."""
    settings = dict(Transformers.example(tmp_path).settings)
    torch.manual_seed(0)
    sizes = {**TINY, "num_key_value_heads": 1, "head_dim": 8, "use_bidirectional_attention": True}
    config = transformers.Gemma3TextConfig(vocab_size=12, pad_token_id=0, **sizes)
    model = transformers.Gemma3TextModel(config).eval()
    with silence():
        model.save_pretrained(tmp_path)
    steps = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    modules = [{"path": f"{i}_{step}" if i else "", "type": f"x.{step}"} for i, step in enumerate(steps)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    layers = []
    for i, (wide, narrow) in ((2, (16, 64)), (3, (64, 20))):
        folder = tmp_path / f"{i}_Dense"
        folder.mkdir()
        activation = "torch.nn.modules.linear.Identity"
        dense = {"in_features": wide, "out_features": narrow, "bias": False, "activation_function": activation}
        (folder / "config.json").write_text(json.dumps(dense))
        layers.append(torch.randn(narrow, wide))
        save_file({"linear.weight": layers[-1]}, folder / "model.safetensors")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    backbone = open_pretrained(settings, "b")
    with torch.no_grad():
        mean = model(torch.tensor([[2, 9, 10, 11, 3]])).last_hidden_state[0].mean(0)
    expected = layers[1] @ (layers[0] @ mean)
    found = encode(backbone, [Text("an edema ."), Text("the scan shows an edema .")])
    assert backbone.feature_dim == 20
    torch.testing.assert_close(found[0], expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_a_net_that_gives_outputs_of_stages_alone_is_read_at_its_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"stem_channels": [3, 8, 8], "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    stages = {"stage_in_channels": [8, 8], "stage_mid_channels": [8, 8], "stage_out_channels": [8, 16]}
    shapes = {"stage_num_blocks": [1, 1], "stage_numb_of_layers": [1, 1], "stage_kernel_size": [3, 3]}
    flags = {"stage_downsample": [False, True], "stage_light_block": [False, False]}
    config = transformers.HGNetV2Config(**sizes, **stages, **shapes, **flags)
    backbone = open_pretrained(save_model(tmp_path, transformers.HGNetV2Backbone(config), resize()), "b")
    model = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pixels = resize()(images=pictures(), return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).feature_maps[-1].mean((2, 3))
    torch.testing.assert_close(encode(backbone, pictures()), expected, rtol=1e-3, atol=1e-5)
    assert backbone.kind.blocks(backbone.module.encoder) == ["encoder.stages.0", "encoder.stages.1"]


def test_a_model_that_no_part_of_encodes_such_records_says_where_others_stand(tmp_path: Path) -> None:
    settings = Transformers.example(tmp_path).settings
    processor = resize()
    processor.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"name an encoder of pictures \(docs/reference/architectures.md lists them\)"):
        open_pretrained({"kind": "transformers", "folder": settings["folder"], "modality": "image"}, "b")


def test_the_last_token_is_that_before_the_padding(tmp_path: Path) -> None:
    settings = {**Transformers.example(tmp_path).settings, "pooling": "last"}
    backbone = open_pretrained(settings, "b")
    model = BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(torch.tensor([[2, 9, 10, 11, 3]])).last_hidden_state[0, -1]
    found = encode(backbone, [Text("an edema ."), Text("the scan shows an edema . " * 3)])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
