"""A backbone divided at a block: both sides are the whole, what trains is separable, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.backbones import Divisible
from common.backbones.parts.boundary import divide_chain
from common.inputs import Audio, Text
from common.model.backbones import Backbone, open_pretrained
from common.model.parameters import parameters
from common.model.trunks import create_modules, cut
from common.plugins import kinds, plugin_class
from common.run import RunConfig, Trainable
from common.types import BadInput
from common.yaml import parse

KINDS = [kind for kind in kinds("common.backbones") if issubclass(plugin_class("common.backbones", kind), Divisible)]
IMAGE = {"resize": 36, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def opened(kind: str, folder: Path) -> tuple[Backbone, Tensor]:
    """A kind's own example with its inputs."""
    example = plugin_class("common.backbones", kind).example(folder)
    backbone = open_pretrained(example.settings, "backbone")
    return backbone, torch.stack([backbone.preprocess(item) for item in example.items])


def torchvision_model(model: str, folder: Path) -> Backbone:
    from safetensors.torch import save_file
    from torchvision import models

    torch.manual_seed(0)
    path = folder / f"{model}.safetensors"
    module = models.get_model(model, weights=None, num_classes=5)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.02, 0.1)
    save_file(module.state_dict(), path)
    settings = {"kind": "torchvision", "model": model, "weights": str(path), "num_classes": 5, "preprocess": IMAGE}
    return open_pretrained({**settings, "projection": {"normalize": True}}, "backbone")


def check_every_block(backbone: Backbone, inputs: Tensor) -> None:
    with torch.no_grad():
        # The modules themselves: `encode` may fold BatchNorms, which rounds in another way.
        whole = backbone.module(inputs)
    blocks = backbone.kind.blocks(backbone.module.encoder)
    digests = {backbone.digest}
    for block in ["input", *blocks]:
        parts = cut(backbone, Trainable(**{"from": block}), "backbone.trunk", "trainable", seed=0)
        with torch.no_grad():
            again = parts.trunk(parts.below.module(inputs))
        torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
        assert parts.below.feature_dim == parts.below.encode(inputs[:1]).shape[1]
        if block != "input":
            digests.add(parts.below.digest)
    # Outputs of two blocks may have equal shapes: what was cached at one would be trained on at the other, unseen.
    assert len(digests) == 1 + len(blocks)
    with torch.no_grad():
        assert torch.equal(backbone.module(inputs), whole), "dividing must leave the backbone as it is"


@pytest.mark.parametrize(
    # Every block of a whole network takes many seconds; the others are small.
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind == "torchvision" else ()) for kind in KINDS],
)
def test_every_block_divides_a_network_into_its_whole_and_has_cached_features_of_its_own(
    kind: str, tmp_path: Path
) -> None:
    check_every_block(*opened(kind, tmp_path))


@pytest.mark.parametrize(
    "model",
    [
        "resnet18",
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("efficientnet_b0", "mobilenet_v3_small", "densenet121")
        ),
    ],
)
def test_usual_torchvision_models_are_divided_at_every_block(model: str, tmp_path: Path) -> None:
    check_every_block(torchvision_model(model, tmp_path), torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize("pooling", ["mean", "cls", "tokens"])
def test_picture_encoders_of_the_library_are_divided_before_their_last_norm(pooling: str, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=32, patch_size=8, initializer_range=0.5, **sizes)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    settings = {"kind": "transformers", "folder": str(tmp_path), "modality": "image", "pooling": pooling}
    backbone = open_pretrained(settings, "backbone")
    inputs = torch.stack([backbone.preprocess(np.full((40, 40, 3), 30 * shade, dtype=np.uint8)) for shade in range(4)])
    check_every_block(backbone, inputs + 0.1 * torch.randn(inputs.shape))


def test_a_pooler_is_not_divided(tmp_path: Path) -> None:
    settings = plugin_class("common.backbones", "transformers").example(tmp_path).settings
    backbone = open_pretrained({**settings, "pooling": "mean"}, "backbone")
    backbone.module.encoder.pooling = "pooler"
    with pytest.raises(BadInput, match="got `pooler`"):
        backbone.kind.divide(backbone.module.encoder, "encoder.layer.1")


def save_tiny(folder: Path, family: str) -> dict[str, Any]:
    """Writes a small model with random weights; returns settings of a backbone that reads it."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    picture = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    if family in ("CLIPVision", "SiglipVision", "DINOv3ViT"):
        config = getattr(transformers, f"{family}Config")(image_size=32, patch_size=8, **sizes)
        getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
        picture.save_pretrained(folder)
        return {"modality": "image"}
    if family == "Whisper":
        sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        own = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 20}
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
        transformers.WhisperModel(transformers.WhisperConfig(**sizes, **own, **tokens)).save_pretrained(folder)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
        return {"modality": "audio", "part": "encoder", "seconds": 1.0}
    if family == "AST":
        config = transformers.ASTConfig(max_length=64, num_mel_bins=32, **sizes)
        transformers.ASTModel(config).save_pretrained(folder)
        transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(folder)
        return {"modality": "audio", "seconds": 0.6}
    if family.startswith("Wav2Vec2"):
        waves = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
        waves |= {"conv_depthwise_kernel_size": 7} if family == "Wav2Vec2Conformer" else {}
        config = getattr(transformers, f"{family}Config")(num_conv_pos_embedding_groups=4, **sizes, **waves)
        getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
        return {"modality": "audio", "seconds": 0.2}
    if family == "Parakeet":
        more = {"subsampling_conv_channels": 8, "num_mel_bins": 80, "conv_kernel_size": 3, "attention_bias": False}
        transformers.ParakeetEncoder(transformers.ParakeetEncoderConfig(**sizes, **more)).save_pretrained(folder)
        transformers.ParakeetFeatureExtractor().save_pretrained(folder)
        return {"modality": "audio", "seconds": 1.0}
    plugin_class("common.backbones", "transformers").example(folder)
    if family == "T5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        transformers.T5Model(transformers.T5Config(vocab_size=12, **sizes)).save_pretrained(folder)
        return {"modality": "text", "part": "encoder", "max_length": 24}
    config = getattr(transformers, f"{family}Config")(vocab_size=12, pad_token_id=0, **sizes, **_HEADS.get(family, {}))
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    return {"modality": "text", "max_length": 24, "pooling": "last" if family == "Qwen3" else "mean"}


_HEADS: dict[str, dict[str, Any]] = {
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "ModernBert": {"local_attention": 4, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
}
"""More settings of small models."""


def list_items(settings: dict[str, Any]) -> list[Any]:
    """Returns four records of unequal length or content."""
    rng = np.random.default_rng(0)
    if settings["modality"] == "image":
        return list(rng.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8))
    if settings["modality"] == "audio":
        return [Audio(rng.normal(size=size).astype(np.float32) / 4, 16000) for size in (2400, 1500, 3000, 2000)]
    return [Text("the scan shows no tumour . " * count) for count in (1, 2, 4, 3)]


@pytest.mark.parametrize(
    "family",
    [
        *("CLIPVision", "SiglipVision", "DINOv3ViT", "Whisper", "AST", "Wav2Vec2", "Wav2Vec2Conformer"),
        *("T5", "Qwen3", "ModernBert", "Parakeet"),
    ],
)
def test_encoders_of_every_modality_are_divided_and_take_adapters(family: str, tmp_path: Path) -> None:
    """Masks of a model's own, rotary tables, biases by distance and padding reach the layers above the boundary."""
    from client.solvers.parts.private_step import hook_record_gradients

    settings = save_tiny(tmp_path, family)
    backbone = open_pretrained({"kind": "transformers", "folder": str(tmp_path), **settings}, "backbone")
    inputs = torch.stack([backbone.preprocess(item) for item in list_items(settings)])
    check_every_block(backbone, inputs)
    last = backbone.kind.blocks(backbone.module.encoder)[-1]
    linear = [
        name for name, part in backbone.module.encoder.named_modules() if type(part) is nn.Linear and last in name
    ]
    lora = {"rank": 2, "alpha": 2, "targets": [linear[0].rpartition(".")[2]]}
    own = cut(backbone, Trainable(**{"from": last, "lora": lora}), "backbone.trunk", "trainable", seed=1)
    hooked = hook_record_gradients({"backbone.trunk": own.trunk})
    own.trunk(own.below.encode(inputs).requires_grad_()).square().sum().backward()
    trained = [parameter for parameter in hooked.parameters() if parameter.requires_grad]
    assert trained and all(len(parameter.grad_sample) == 4 for parameter in trained)


def test_an_unknown_block_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    backbone, _ = opened("cifar_resnet", tmp_path)
    with pytest.raises(BadInput, match=r"trainable\.backbone\.from: expected input or one of conv1, .*'layer3'"):
        cut(backbone, Trainable(**{"from": "layr3"}), "backbone.trunk", "trainable.backbone", seed=0)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_an_encoder_that_is_no_chain_up_to_a_block_is_refused(tmp_path: Path) -> None:
    """Its input is used again further up."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            both: Tensor = self.second(self.first(x)) + x
            return both

    with pytest.raises(BadInput, match="where it cannot"):
        divide_chain(Crossed(), "second", (4,))


def test_settings_alone_say_what_would_train(tmp_path: Path) -> None:
    """Without weights and memory: as many parameters, of the same names and shapes, as with them."""
    from client.protocol.requirements import untrained_modules
    from common.tasks import open_task

    for kind in KINDS:
        (tmp_path / kind).mkdir()
        backbone, _ = opened(kind, tmp_path / kind)
        block = backbone.kind.blocks(backbone.module.encoder)[-1]
        run = parse(
            RunConfig,
            {
                "name": "depth",
                "seed": 1,
                "rounds": 1,
                "backbone": backbone.public_spec(),
                "trainable": {"backbone": {"from": block}},
                "tasks": {"grade": {"kind": "classification", "labels": ["a", "b"]}},
                "solver": {"kind": "sgd", "trunk": {"learning_rate": 0.1}},
                "privacy": "non_private",
                "aggregation": {"kind": "mean"},
            },
            base=tmp_path,
        )
        tasks = {name: open_task(spec, name) for name, spec in run.tasks.items()}
        bare = untrained_modules(run, tasks)
        full = create_modules(run, tasks, {"backbone": backbone})

        def shapes(modules: dict[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
            return {
                name: {key: tuple(p.shape) for key, p in module.named_parameters() if p.requires_grad}
                for name, module in modules.items()
            }

        assert shapes(bare) == shapes(full)
        assert all(p.device.type == "meta" for module in bare.values() for p in module.parameters())


def test_a_trunk_is_as_large_as_its_largest_task() -> None:
    values = {
        "name": "depth",
        "seed": 1,
        "rounds": 1,
        "backbones": {"eye": {"kind": "small_cnn"}, "ear": {"kind": "series_cnn"}},
        "trainable": {"eye": {"from": "input"}},
        "tasks": {
            "grade": {"kind": "regression", "range": [0, 1], "backbone": "eye"},
            "stage": {"kind": "regression", "range": [0, 1], "backbone": "eye"},
            "pitch": {"kind": "regression", "range": [0, 1], "backbone": "ear"},
        },
        "solver": {"kind": "sgd", "trunk": {"learning_rate": 0.1}},
        "privacy": "non_private",
        "aggregation": {"kind": "mean"},
    }
    run = parse(RunConfig, values, base=Path.cwd())
    assert run.parameter_group_sizes({"grade": 30, "stage": 50, "pitch": 90}) == {
        "grade": 30,
        "stage": 50,
        "pitch": 90,
        "eye.trunk": 50,
    }
    assert run.parameter_group_sizes({"pitch": 90}) == {"pitch": 90}
    assert [run.trunk_of(task) for task in run.tasks] == ["eye.trunk", "eye.trunk", None]


def test_adapters_change_nothing_at_first_and_are_the_same_for_one_seed(tmp_path: Path) -> None:
    backbone, inputs = opened("transformers", tmp_path)
    lora = {"rank": 2, "alpha": 8, "targets": ["query"]}
    asked = Trainable(**{"from": "encoder.layer.1", "lora": lora})
    first, same, other = (cut(backbone, asked, "backbone.trunk", "trainable", seed=seed) for seed in (1, 1, 2))
    plain = cut(backbone, Trainable(**{"from": "encoder.layer.1"}), "backbone.trunk", "trainable", seed=1)
    assert first.below.digest == plain.below.digest != backbone.digest
    with torch.no_grad():
        torch.testing.assert_close(first.trunk(first.below.module(inputs)), backbone.module(inputs))
    drawn = [parameters(each.trunk) for each in (first, same, other)]
    assert set(drawn[0]) and all(".lora_" in name for name in drawn[0])
    (a,) = (name for name in drawn[0] if "lora_A" in name)
    assert np.array_equal(drawn[0][a], drawn[1][a]) and not np.array_equal(drawn[0][a], drawn[2][a])


def test_adapters_stand_beside_layers_whose_name_something_else_has_too(tmp_path: Path) -> None:
    backbone, inputs = opened("transformers", tmp_path)
    lora = {"rank": 2, "alpha": 8, "targets": ["dense"]}
    own = cut(backbone, Trainable(**{"from": "encoder.layer.1", "lora": lora}), "backbone.trunk", "trainable", seed=1)
    assert any(name.endswith("dense") for name, _ in own.trunk.named_modules() if "layers" not in name)
    beside = {name.partition(".lora_")[0] for name in parameters(own.trunk)}
    assert {name.partition(".layers.0.")[2] for name in beside} == {
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    }
    with torch.no_grad():
        torch.testing.assert_close(own.trunk(own.below.module(inputs)), backbone.module(inputs))


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_an_encoder_that_is_no_chain_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """GoogLeNet pools between its blocks, which is no block: the parts do not fit each other."""
    backbone = torchvision_model("googlenet", tmp_path)
    with pytest.raises(BadInput, match="trainable.from: expected a block .* got 'inception5b', where it cannot"):
        cut(backbone, Trainable(**{"from": "inception5b"}), "backbone.trunk", "trainable", seed=0)
