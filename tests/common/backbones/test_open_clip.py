"""Towers of open_clip: a published folder gives the library's own features for pictures and for texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common.backbones.open_clip import OpenClip
from common.inputs import Text
from common.model.backbones import load_blob, open_pretrained
from common.types import BadInput

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def publish(folder: Path, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT) -> open_clip.CLIP:
    """Writes a folder as models are published, and returns the model."""
    torch.manual_seed(0)
    model = open_clip.CLIP(24, vision, text, quick_gelu=True).eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}
    content = {"model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps({**content, "preprocess_cfg": pixels}))
    return model


def test_pictures_have_the_librarys_own_features(tmp_path: Path) -> None:
    model = publish(tmp_path)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    theirs = open_clip.image_transform(
        32, is_train=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), interpolation="bicubic", resize_mode="shortest"
    )
    backbone = open_pretrained({"kind": "open_clip", "folder": str(tmp_path)}, "backbone")
    torch.testing.assert_close(backbone.preprocess(picture), theirs(picture))
    received = load_blob(backbone.blob())
    with torch.no_grad():
        expected_BD = model.encode_image(theirs(picture)[None])
    torch.testing.assert_close(received.encode([received.preprocess(picture)]), expected_BD, rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("text") for name in received.module.state_dict())


def test_texts_have_the_librarys_own_features(tmp_path: Path) -> None:
    model = publish(tmp_path)
    texts = ["No tumour.", "A mass in the left upper lobe, spiculated, which was not there in the film of last year"]
    backbone = open_pretrained({"kind": "open_clip", "folder": str(tmp_path), "modality": "text"}, "backbone")
    received = load_blob(backbone.blob())
    with torch.no_grad():
        expected_BD = model.encode_text(open_clip.tokenize(texts, context_length=12))
    features_BD = received.encode([received.preprocess(Text(text)) for text in texts])
    torch.testing.assert_close(features_BD, expected_BD, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="expected one text"):
        received.preprocess(Text("a", "b"))


def test_a_tower_of_timm_fetches_nothing(tmp_path: Path) -> None:
    # As BiomedCLIP: its pictures are read by timm, its texts by transformers.
    vision = {"timm_model_name": "resnet10t", "timm_model_pretrained": True, "timm_pool": "avg", "timm_proj": "linear"}
    text = {"hf_model_name": "owner/text-encoder", "hf_tokenizer_name": "owner/text-encoder"}
    from open_clip.model import _build_vision_tower

    torch.manual_seed(0)
    tower = _build_vision_tower(24, {**vision, "image_size": 64, "timm_model_pretrained": False}).eval()
    save_file({f"visual.{key}": value for key, value in tower.state_dict().items()}, tmp_path / "model.safetensors")
    content = {"embed_dim": 24, "vision_cfg": {**vision, "image_size": 64}, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": content}))
    settings = {"kind": "open_clip", "folder": str(tmp_path)}
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected_BD = tower(pixels)
    torch.testing.assert_close(open_pretrained(settings, "backbone").encode(pixels), expected_BD, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match=r"backbone\.modality: .*`kind: transformers`.*'owner/text-encoder'"):
        open_pretrained({**settings, "modality": "text"}, "backbone")


@pytest.mark.parametrize("name", ["hf-hub:q7/q7", "local-dir:/q7"])
def test_a_tower_that_is_fetched_from_elsewhere_is_refused(name: str) -> None:
    pixels = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    tower = {"embed_dim": 16, "config": {"timm_model_name": name, "image_size": 32}}
    sent = OpenClip.model_validate({"kind": "open_clip", "tower": tower, "preprocess": pixels})
    with pytest.raises(BadInput, match="tower: expected the name of an architecture of timm"):
        sent.architecture()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"backbone\.folder: expected a file open_clip_config\.json, found none"),
        ("{}", r"backbone\.folder: expected a configuration of open_clip"),
        ('{"model_cfg": {"embed_dim": 8, "vision_cfg": {"size": 3}}}', r"backbone\.tower: expected a configuration"),
        ('{"model_cfg": {"embed_dim": 8, "vision_cfg": {}}}', r"backbone\.folder: expected open_clip_model"),
    ],
)
def test_wrong_folders_are_one_sentence(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "open_clip_config.json").write_text(content)
    if "size" in str(content):
        save_file({"visual.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=message):
        open_pretrained({"kind": "open_clip", "folder": str(tmp_path)}, "backbone")
