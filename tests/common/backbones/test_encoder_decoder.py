"""Whole pre-trained encoder-decoders: what they tell is what the library tells, and nothing of padding is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from common.backbones import DecoderLanguage, Language
from common.backbones.parts.hub.huggingface import silence
from common.inputs import Audio, Text
from common.model.backbones import Backbone, load_blob, open_pretrained
from common.tasks import open_task
from common.tasks.seq2seq import Seq2seq
from common.types import BadInput, BadRecord
from tests.encoder_decoders import CROSS, SYMBOLS, WRITERS, make_items


@pytest.fixture(scope="module", params=sorted(WRITERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(name)


@pytest.fixture(scope="module")
def backbone(name: str, folder: Path) -> Backbone:
    return open_pretrained(WRITERS[name](folder), "backbone")


def language_of(backbone: Backbone) -> Language:
    assert backbone.language is not None
    return backbone.language


def encode(backbone: Backbone, name: str) -> Tensor:
    return backbone.encode([backbone.preprocess(item) for item in make_items(name)])


def force(backbone: Backbone, features_BPM: Tensor, tokens_BT: Tensor) -> Tensor:
    """The states behind a text's tokens, from the decoder's own copy."""
    language = language_of(backbone)
    assert isinstance(language, DecoderLanguage)
    before_BT = torch.roll(tokens_BT, 1, dims=1)
    before_BT[:, 0] = language.start  # type: ignore[unreachable]
    states_BTD: Tensor = language.open_decoder()(features_BPM, before_BT)
    return states_BTD


def test_what_is_told_is_what_the_library_tells(backbone: Backbone, name: str, folder: Path) -> None:
    opened_by = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    with silence():
        whole = opened_by.from_pretrained(folder).eval()
    features_BPM, language = encode(backbone, name), language_of(backbone)
    module = backbone.module.encoder
    prefix = list(module.decoder.prefix)
    written = language.read("0 2 1 no 2")
    assert isinstance(language, DecoderLanguage)
    head_KD = language.make_first_map()
    for row in range(4):
        own = int((features_BPM[row, :, -1] > 0).sum())
        states_TD = force(backbone, features_BPM[row : row + 1], torch.tensor([written]))[0]
        logits_TV = states_TD @ head_KD.T @ language.embedding_VD.T
        allowed = language.bias_V > -1e30
        with torch.no_grad():
            memory = (features_BPM[row : row + 1, :own, :-1],)
            ids = torch.tensor([[*prefix, *written[:-1]]])
            told_TV = whole(encoder_outputs=memory, decoder_input_ids=ids).logits[0, len(prefix) - 1 :]
        expected_TV = told_TV - logits_TV - language.bias_V
        torch.testing.assert_close(
            expected_TV[:, allowed], torch.zeros_like(expected_TV[:, allowed]), atol=1e-3, rtol=0
        )
    assert language.write(written) == "0 2 1 no 2"


def test_neither_padding_nor_what_comes_later_changes_a_state(backbone: Backbone, name: str) -> None:
    features_BPM, language = encode(backbone, name), language_of(backbone)
    tokens = torch.tensor([language.read("0 2 1 no 2")]).expand(4, -1).contiguous()
    with torch.no_grad():
        states_BTD = force(backbone, features_BPM, tokens)
        mask_BP1 = features_BPM[..., -1:] > 0
        assert not bool(mask_BP1.all(dim=1).all())
        noise = torch.cat([torch.full_like(features_BPM[..., :-1], 1e2), torch.zeros_like(features_BPM[..., -1:])], 2)
        other_BPM = torch.where(mask_BP1, features_BPM, noise)
        torch.testing.assert_close(force(backbone, other_BPM, tokens), states_BTD, rtol=1e-4, atol=1e-5)
        for row in range(4):
            own = int(mask_BP1[row].sum())
            alone = force(backbone, features_BPM[row : row + 1, :own], tokens[row : row + 1])
            torch.testing.assert_close(alone[0], states_BTD[row], rtol=1e-4, atol=1e-5)
        later = tokens.clone()
        later[:, 3:] = language.end
        changed_BTD = force(backbone, features_BPM, later)
    torch.testing.assert_close(changed_BTD[:, :4], states_BTD[:, :4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed_BTD[:, 4], states_BTD[:, 4])


def test_a_site_tells_the_same_from_what_travels(backbone: Backbone, name: str) -> None:
    again = load_blob(backbone.blob())
    assert again.digest == backbone.digest and "folder" not in json.dumps(again.public_spec()["folder"] or "")
    assert torch.equal(encode(again, name), encode(backbone, name))
    assert torch.equal(language_of(again).embedding_VD, language_of(backbone).embedding_VD)


def make_task(backbone: Backbone, **settings: object) -> Seq2seq:
    task = open_task({"kind": "seq2seq", "max_tokens": 6, "rates": "transcript", **settings}, "task")
    assert isinstance(task, Seq2seq)
    return task.open_on(language_of(backbone))


def test_symbols_alone_are_told_as_the_model_itself_ranks_them(backbone: Backbone, name: str) -> None:
    whole, some = make_task(backbone), make_task(backbone, symbols=SYMBOLS)
    label = some.codec.encode(["two, ZERO 1!"])
    assert some.codec.write(label) == "two zero one" and some.read_text("2 0 one") == "two zero one"
    assert label.tolist()[3:] == [some.language.end, -1, -1]
    # A site's settings are sorted on the way.
    turned = make_task(backbone, symbols=dict(reversed(SYMBOLS.items())))
    assert turned.codec.encode(["two, ZERO 1!"]).tolist() == label.tolist()
    features_BPM = encode(backbone, name)
    heads = [task.head(backbone.feature_dim) for task in (whole, some)]
    outputs = []
    for task, head in zip((whole, some), heads, strict=True):
        task.start_head(head)
        labels = torch.stack([task.codec.encode(["2 0 1"])] * 4)
        logits = task.force(head, features_BPM, labels).detach() @ task.language.embedding_VD.T + task.language.bias_V
        outputs.append(logits[:, :4])
    tokens = [*(language_of(backbone).read(text)[0] for text in ("0", "1", "2")), language_of(backbone).end]
    torch.testing.assert_close(outputs[1], outputs[0][..., tokens], rtol=1e-3, atol=1e-3)
    with pytest.raises(BadRecord, match="the task's symbols"):
        some.codec.encode(["two no"])
    with pytest.raises(BadRecord, match="at most 5 tokens"):
        some.codec.encode(["two " * 6])


def test_bad_folders_and_records_are_refused_in_one_sentence(
    backbone: Backbone, name: str, folder: Path, tmp_path: Path
) -> None:
    settings = WRITERS[name](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, what in (("pad_token_id", "padding"), ("eos_token_id", "the end of a text")):
        for wrong in (None, 4000):
            (tmp_path / "config.json").write_text(json.dumps({**config, key: wrong}))
            with pytest.raises(BadInput, match=f"folder: expected a tokenizer with a token for {what}, `{key}`"):
                open_pretrained(settings, "backbone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="prefix: expected tokens of the model's tokenizer, got '<.xx.>'"):
        open_pretrained({**settings, "prefix": ["<|xx|>"]}, "backbone")
    if name == "whisper":
        with pytest.raises(BadRecord, match="a recording of at most 0.5 s"):
            backbone.preprocess(Audio(np.zeros(8001, np.float32), 16000))
        with pytest.raises(BadInput, match="max_tokens: expected at most 15"):
            open_pretrained({**settings, "max_tokens": 16}, "backbone")
        with pytest.raises(BadRecord):
            backbone.preprocess(Text("0 1"))
    else:
        with pytest.raises(BadRecord, match="expected a text"):
            backbone.preprocess(Audio(np.zeros(100, np.float32), 16000))
    targets = ", ".join(sorted(CROSS[name])[:1])
    with pytest.raises(BadInput, match=f"decoder.lora.targets: expected some of .*{targets}"):
        make_task(backbone, decoder={"lora": {"rank": 1, "alpha": 1, "targets": ["nothing"]}}).head(17)


def test_a_model_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "pad_token_id": 0}))
    with pytest.raises(BadInput, match="model: expected an encoder-decoder, such as whisper, marian or t5, got bert"):
        open_pretrained({"kind": "encoder_decoder", "folder": str(tmp_path)}, "backbone")


def test_a_text_with_a_token_beyond_the_models_rows_is_a_bad_record(name: str, tmp_path: Path) -> None:
    """A tokenizer travels with the weights: else one record with such a word would end a site's round."""
    settings = WRITERS[name](tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["word"] = 500
    path.write_text(json.dumps(tokenizer))
    language = language_of(open_pretrained(settings, "backbone"))
    assert max(language.read("0 2")) < len(language.embedding_VD)
    with pytest.raises(BadRecord, match="a text of the backbone's own tokens"):
        language.read("0 word 2")
