"""Texts that a backbone writes: overlap as sacrebleu counts it, slopes of each alone, and writing by brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.tasks import EXACT_BUCKETS, open_on_backbones, open_task
from common.tasks.parts.transcripts.generating import compute_logits, write_texts
from common.tasks.parts.transcripts.overlap import split_words
from common.tasks.seq2seq import NONE, Seq2seq
from common.types import BadInput, BadRecord
from tests.written import TinyLanguage

WORDS = ["Klampfe", "Fagott", "Zimbel", "3,5", "1-2", "km/h", "(ja)", "z.B.", "Ende.", "Wer?", "&amp;", "so,", "A-B"]


def make_task(language: TinyLanguage | None = None, **settings: Any) -> Seq2seq:
    task = open_task({"kind": "seq2seq", "max_tokens": 8, **settings}, "task")
    assert isinstance(task, Seq2seq)
    return task.open_on(language or TinyLanguage(longest=task.max_tokens))


def say(language: TinyLanguage, texts: list[str], places: int = 8) -> Tensor:
    """What was written, as `generate` gives it."""
    width = language.embedding_VD.shape[1]
    written = torch.zeros(len(texts), places, width + 1)
    for row, text in enumerate(texts):
        tokens = [*language.read(text), language.end]
        written[row, : len(tokens), width] = 1.0 + torch.tensor(tokens)
    return written


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = np.random.default_rng(0)
    language = TinyLanguage(words=tuple(WORDS), longest=90)
    task = make_task(language, max_tokens=90, terms=["Fagott"])
    for wrong in (0.0, 0.3, 0.9):
        meant = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(40)]
        said = [
            " ".join(
                str(rng.choice(WORDS)) if rng.random() < wrong else word for word in text.split()[rng.integers(2) :]
            )
            for text, first in zip(meant, rng.integers(2, size=len(meant)), strict=True)
        ]
        labels = torch.stack([task.codec.encode([text]) for text in meant])
        statistic = task.statistic(EXACT_BUCKETS)
        values = statistic.values(statistic.sums(say(language, said, 90), labels))
        assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [meant]).score / 100, abs=1e-9)
        assert values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [meant]).score / 100, abs=1e-9)
    assert [split_words(word) for word in ("km/h", "3,5", "Ende.")] == [["km", "/", "h"], ["3,5"], ["Ende", "."]]


def test_terms_are_counted_where_a_reference_has_them_and_once_for_each() -> None:
    language = TinyLanguage()
    task = make_task(language, terms=["Klampfe", "Oboe123"])
    said = ["Klampfe Klampfe Zimbel", "Fagott", "Oboe123 Klampfe"]
    meant = ["Zimbel Klampfe", "Klampfe Oboe123 Fagott", "Zimbel"]
    labels = torch.stack([task.codec.encode([text]) for text in meant])
    statistic = task.statistic(EXACT_BUCKETS)
    assert statistic.values(statistic.sums(say(language, said), labels))["terms"] == pytest.approx(1 / 3)
    nothing = statistic.values(statistic.sums(say(language, said[2:]), labels[2:]))
    assert math.isnan(nothing["terms"]) and nothing["bleu"] == 0.0
    assert "terms" not in make_task(language).statistic(EXACT_BUCKETS).ranges


def test_slopes_are_those_of_each_text_alone_and_exactly_zero_behind_it() -> None:
    task = make_task()
    texts = ["Klampfe", "Fagott Fagott Zimbel Geige12 Trommel Posaune Oboe123", "Zimbel Klampfe"]
    labels = torch.stack([task.codec.encode([text]) for text in texts])
    outputs = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0)).double()
    slopes = task.loss_gradient(outputs, labels)
    for row, text in enumerate(texts):
        tokens = torch.tensor([*task.language.read(text), task.language.end])
        leaf = outputs[row, : len(tokens)].float().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf @ task.language.embedding_VD.T + task.language.bias_V, tokens)
        (expected,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(slopes[row, : len(tokens)].float(), expected)
        assert not slopes[row, len(tokens) :].any()
        assert torch.equal(task.loss_gradient(outputs[row : row + 1], labels[row : row + 1])[0], slopes[row])
        assert task.losses(outputs[row : row + 1], labels[row : row + 1]).item() == pytest.approx(loss.item(), rel=1e-6)
        # What lies behind has no say either.
        other = outputs.clone()
        other[row, len(tokens) :] = 1e6
        assert torch.equal(task.loss_gradient(other, labels), slopes)
    # A text that fills all places is as good as one with places to spare.
    assert torch.equal(task.loss_gradient(outputs[:, :8], labels), slopes[:, :8])


def list_texts(task: Seq2seq, head: torch.nn.Module, row_1PD: Tensor) -> dict[tuple[int, ...], float]:
    """Every list of tokens that ends, or fills all places, with its mean log probability: all are written down."""
    language, found = task.language, {}
    tokens = range(len(language.embedding_VD))
    for length in range(1, language.longest + 1):
        for before in itertools.product([token for token in tokens if token != language.end], repeat=length - 1):
            for last in tokens if length == language.longest else (language.end,):
                known, total = language.begin(row_1PD), 0.0
                for place, (previous, token) in enumerate(zip((language.start, *before), (*before, last), strict=True)):
                    states, known = language.step(known, torch.tensor([previous]), place)
                    total += float(compute_logits(language, head(states)).double().log_softmax(1)[0, token])
                found[(*before, last)] = total / length
    return found


def test_a_wide_beam_writes_the_most_probable_text_and_the_best_token_may_miss_it() -> None:
    language = TinyLanguage(words=("ja", "nein"), longest=4)
    task = make_task(language, max_tokens=4)
    missed = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        head = torch.nn.Linear(7, 6, bias=False)
        with torch.no_grad():
            head.weight.copy_(2.0 * torch.randn(6, 7, generator=generator))
        features = torch.randn(1, 5, 7, generator=generator)
        with torch.no_grad():
            every = list_texts(task, head, features)
            best = max(every, key=lambda tokens: every[tokens])
            assert len(every) == 1 + 2 + 4 + 8 * 3
            wide, narrow = (write_texts(language, head, features, width)[0] for width in (100, 1))
        tokens = tuple(int(token) - 1 for token in wide[:, -1] if token)
        assert tokens == best
        # The outputs beside the tokens are those behind the tokens before: they have the text's own probability.
        told = compute_logits(language, wide[: len(best), :-1]).double().log_softmax(1)
        assert told[range(len(best)), best].mean().item() == pytest.approx(every[best], abs=1e-5)
        assert task.serve(wide[None]).item() == pytest.approx(math.exp(every[best]), rel=1e-4)
        first = tuple(int(token) - 1 for token in narrow[:, -1] if token)
        missed += first != best
        assert every[first] <= every[best]
    assert missed


def test_what_is_written_ends_where_it_ended() -> None:
    language = TinyLanguage()
    task = make_task(language)
    written = say(language, ["Fagott Zimbel", "", "Klampfe"])
    assert task.codec.decode(written) == [["Fagott Zimbel"], [""], ["Klampfe"]]
    outputs = 50.0 * language.embedding_VD[torch.tensor([[2, 0, 3, 3, 0, 1, 1, 1]])]
    assert task.codec.decode(outputs) == [["Fagott"]]


def test_a_first_head_tells_what_the_backbone_itself_would() -> None:
    task = make_task()
    head = task.head(7)
    task.start_head(head)
    states = torch.randn(5, 7)
    torch.testing.assert_close(head(states), task.language.scale * states[:, :-1])
    with pytest.raises(BadInput, match=r"head\.hidden: expected none"):
        make_task(head={"hidden": 3, "bias": False}).start_head(torch.nn.Sequential())


def test_it_needs_a_backbone_that_writes_texts_of_its_length() -> None:
    task = open_task({"kind": "seq2seq", "max_tokens": 9}, "task")
    with pytest.raises(BadInput, match=r"tasks\.said\.max_tokens: expected 8, .* got 9"):
        open_on_backbones({"said": task}, {"said": TinyLanguage()})
    with pytest.raises(BadInput, match=r"tasks\.said: expected a backbone that writes texts"):
        open_on_backbones({"said": task}, {"said": None})


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "got an empty one"), ("  ", "got an empty one"), ("Fagott " * 8, "at most 7 tokens"), ("Баян", "words")],
)
def test_a_text_that_cannot_be_a_label_is_a_bad_record(text: str, message: str) -> None:
    with pytest.raises(BadRecord, match=message) as caught:
        make_task().codec.encode([text])
    assert "Fagott" not in str(caught.value)


def test_a_label_of_another_text_than_the_backbone_reads_is_a_bad_record() -> None:
    task = make_task()
    label = task.codec.encode(["Fagott Zimbel"])
    assert torch.equal(task.place_label(label, torch.tensor([0.3] * 3 + [0.0] * 7)), label)
    assert int((label != NONE).sum()) == 3
    with pytest.raises(BadRecord, match="the text that the backbone reads"):
        task.place_label(label, torch.tensor([0.3] * 2 + [0.0] * 6 + [0.3] * 4))
