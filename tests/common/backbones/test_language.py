"""A decoder of texts: what it knows at a place follows from the tokens before and the source's own tokens alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from common.backbones.parts.language.decoder import Decoder
from common.backbones.parts.language.vocabulary import Vocabulary, make_vocabulary
from common.backbones.parts.weights import compute_digest
from common.backbones.seq2seq import Seq2seqBackbone
from common.model.backbones import load_blob, open_pretrained
from common.types import BackboneBlob, BadInput, BadRecord


def make_decoder() -> Decoder:
    torch.manual_seed(3)
    return Decoder(11, 5, 7, width=12, layers=2, heads=3, hidden=20).train(False)


def test_writing_token_by_token_gives_the_states_of_the_whole_text() -> None:
    decoder, generator = make_decoder(), torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(11, (4, 7), generator=generator)
    memory_BSM, mask_BS = (
        torch.randn(4, 6, 5, generator=generator),
        torch.arange(6) < torch.tensor([[6], [1], [3], [5]]),
    )
    with torch.inference_mode():
        read_BSD = decoder.read_memory(memory_BSM)
        whole_BTD = decoder(tokens_BT, read_BSD, mask_BS)
        known, said, rows = decoder.prepare(read_BSD), None, []
        for place in range(7):
            state_BD, said = decoder.step(tokens_BT[:, place], place, known, mask_BS, said)
            rows.append(state_BD)
    torch.testing.assert_close(torch.stack(rows, dim=1), whole_BTD, rtol=1e-4, atol=1e-5)
    # All states have one length.
    torch.testing.assert_close(whole_BTD.norm(dim=2), torch.full((4, 7), 12**0.5), rtol=1e-3, atol=0)


def test_padding_and_what_comes_later_change_nothing() -> None:
    decoder, generator = make_decoder(), torch.Generator().manual_seed(2)
    tokens_BT = torch.randint(11, (2, 7), generator=generator)
    memory_BSM, mask_BS = torch.randn(2, 6, 5, generator=generator), torch.arange(6) < torch.tensor([[4], [2]])
    other_BSM = torch.where(mask_BS[..., None], memory_BSM, 1e3)
    later_BT = tokens_BT.clone()
    later_BT[:, 5:] = 0
    with torch.inference_mode():
        states_BTD = decoder(tokens_BT, decoder.read_memory(memory_BSM), mask_BS)
        changed_BTD = decoder(later_BT, decoder.read_memory(other_BSM), mask_BS)
        alone_TD = decoder(tokens_BT[1:, :4], decoder.read_memory(memory_BSM[1:, :2]), mask_BS[1:, :2])[0]
    torch.testing.assert_close(changed_BTD[:, :5], states_BTD[:, :5])
    assert not torch.equal(changed_BTD[:, 5:], states_BTD[:, 5:])
    torch.testing.assert_close(alone_TD, states_BTD[1, :4], rtol=1e-4, atol=1e-5)


def test_a_text_that_is_far_too_long_is_refused_before_it_is_divided() -> None:
    vocabulary = Vocabulary(make_vocabulary(["der Befund ist gut ."], 30))
    assert vocabulary.read("der Befund")
    with pytest.raises(BadRecord, match="expected a text of at most 131072 characters"):
        vocabulary.read("der " * 40_000)


def test_a_vocabulary_with_numbers_beyond_the_decoders_rows_is_refused(tmp_path: Path) -> None:
    sent = open_pretrained(Seq2seqBackbone.example(tmp_path).settings, "backbone").blob()
    state = load(bytes(sent.weights))
    data = state["encoder.vocabulary"].numpy().tobytes().replace(b'"nd":39', b'"nd":99')
    state["encoder.vocabulary"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    changed = BackboneBlob(spec=sent.spec, weights=save(state), digest=compute_digest(sent.spec, state.items()))
    language = load_blob(changed).language
    assert language is not None
    with pytest.raises(BadInput, match="whose tokens all have a row"):
        language.read("fund")
