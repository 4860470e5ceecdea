"""Transcripts: all alignments, an even division, decoding and error rates, each against what is written out by hand."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.backbones import QUIET, SPEECH
from common.tasks import EXACT_BUCKETS, open_task, select_round
from common.tasks.ctc import Ctc
from common.tasks.parts.transcripts.decoding import search_prefixes, take_best_path
from common.tasks.parts.transcripts.symbols import Symbols, count_edits
from common.types import BadInput, BadRecord

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def make_task(**settings: Any) -> Ctc:
    values = {"kind": "ctc", "symbols": ["yes", "no"], "unit": "words", "max_symbols": 3, **settings}
    task = open_task(values, "task")
    assert isinstance(task, Ctc)
    return task


def place(task: Ctc, text: str, marks: str) -> Tensor:
    """A placed label; in the marks `#` is loud, `-` quiet, and a blank what lies behind the recording."""
    values = {"#": SPEECH, "-": QUIET, " ": 0.0}
    return task.place_label(task.codec.encode([text]), torch.tensor([values[mark] for mark in marks]))


def draw_outputs(places: int, outputs: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(places, outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read_path(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(key - 1 for key, _ in itertools.groupby(path) if key)


def sum_paths(outputs_TK: Tensor) -> dict[tuple[int, ...], float]:
    """Every list of symbols with the probability of all its paths, which are all written down."""
    probability_TK = outputs_TK.softmax(-1).numpy()
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(outputs_TK.shape[1]), repeat=len(outputs_TK)):
        found[read_path(path)] += math.prod(probability_TK[place, index] for place, index in enumerate(path))
    return found


@pytest.mark.parametrize("text", ["", "no", "yes yes", "no yes no", "yes no no"])
def test_the_loss_is_that_of_all_paths_over_the_recordings_own_frames(text: str) -> None:
    task = make_task()
    label = place(task, text, "#-##-   ")
    outputs_PK = draw_outputs(8)
    wanted = tuple(["yes", "no"].index(word) for word in text.split())
    expected = -math.log(sum_paths(outputs_PK[:5])[wanted]) / 5
    assert task.losses(outputs_PK[None], label[None]).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("even", [False, True])
def test_slopes_are_those_of_each_recording_alone_and_exactly_zero_behind_it(even: bool) -> None:
    task = make_task().select_round(1 if even else 2, 2)
    marks = ["#-##-   ", "########", "##      ", "-       ", "--##--# "]
    labels = [
        place(task, text, each) for text, each in zip(["no no", "yes no yes", "no", "", "no"], marks, strict=True)
    ]
    outputs_BPK = torch.stack([draw_outputs(8, seed=seed) for seed in range(5)]).requires_grad_()
    (slopes_BPK,) = torch.autograd.grad(task.losses(outputs_BPK, torch.stack(labels)).sum(), outputs_BPK)
    for row, label in enumerate(labels):
        alone = outputs_BPK[row : row + 1].detach().requires_grad_()
        (expected,) = torch.autograd.grad(task.losses(alone, label[None]).sum(), alone)
        assert torch.equal(slopes_BPK[row], expected[0])
        length = len(marks[row].rstrip())
        assert not slopes_BPK[row, length:].any()
        assert bool(slopes_BPK[row, :length].any(dim=1).all())
        # What lies behind has no say either: not in the loss, and in no other slope.
        other = outputs_BPK.detach().clone()
        other[row, length:] = 1e6
        moved = task.losses(other, torch.stack(labels))
        assert torch.equal(moved, task.losses(outputs_BPK.detach(), torch.stack(labels)))


@pytest.mark.parametrize(
    ("text", "marks", "targets"),
    [
        ("yes no", "-####-  ", [0, 1, 1, 2, 2, 0]),
        ("yes no", "#-#-#   ", [1, 0, 1, 0, 2]),
        ("no yes no", "#######", [2, 2, 2, 1, 1, 2, 2]),
        ("", "-##-", [0, 0, 0, 0]),
        ("no yes", "--- ", [2, 2, 1]),  # Silent throughout: nothing is louder.
    ],
)
def test_symbols_are_divided_evenly_among_loud_frames(text: str, marks: str, targets: list[int]) -> None:
    task = make_task().select_round(1, 4)
    outputs_PK = draw_outputs(len(marks))
    log_PK = outputs_PK.log_softmax(-1)
    expected = -sum(log_PK[frame, target].item() for frame, target in enumerate(targets)) / len(targets)
    assert task.losses(outputs_PK[None], place(task, text, marks)[None]).item() == pytest.approx(expected, rel=1e-12)


def test_the_round_alone_decides_which_loss_is_trained() -> None:
    outputs, label = draw_outputs(6)[None], place(make_task(), "yes no", "-####-")[None]
    task = make_task(even_part=0.25)
    tasks: dict[str, Any] = {"said": task}
    losses = [select_round(tasks, round_, 8)["said"].losses(outputs, label).item() for round_ in range(1, 9)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[2:] == [task.losses(outputs, label).item()] * 6
    never = make_task(even_part=0.0)
    assert never.select_round(1, 8).losses(outputs, label).item() == losses[2]
    always = make_task(even_part=1.0)
    assert always.select_round(8, 8).losses(outputs, label).item() == losses[0]


@pytest.mark.parametrize(
    ("text", "frames"), [("", 1), ("no", 1), ("yes no", 2), ("no no", 3), ("yes no no", 4), ("no no no", 5)]
)
def test_a_recording_shorter_than_its_transcript_is_a_bad_record(text: str, frames: int) -> None:
    task = make_task()
    assert torch.isfinite(task.losses(draw_outputs(9)[None], place(task, text, ("#" * frames).ljust(9))[None])).all()
    with pytest.raises(BadRecord, match="long enough for its transcript"):
        place(task, text, ("#" * (frames - 1)).ljust(9))


def test_decoding_takes_the_best_path_or_the_best_sum_of_paths() -> None:
    disagreements = 0
    for seed in range(40):
        outputs_TK = 2.0 * draw_outputs(4, seed=seed)
        paths = {path: outputs_TK[range(4), path].sum().item() for path in itertools.product(range(3), repeat=4)}
        sums = sum_paths(outputs_TK)
        best = take_best_path(outputs_TK.numpy())
        assert tuple(best) == read_path(max(paths, key=lambda path: paths[path]))
        assert tuple(search_prefixes(outputs_TK.numpy(), 1000)) == max(sums, key=lambda symbols: sums[symbols])
        disagreements += best != search_prefixes(outputs_TK.numpy(), 1000)
    assert disagreements
    assert take_best_path(np.zeros((0, 3))) == search_prefixes(np.zeros((0, 3)), 5) == []


def test_a_language_of_public_texts_counts_beside_the_frames() -> None:
    # Behind nothing: yes, yes, no; behind yes: no, no; behind no: three ends. One is added to each.
    behind = {(0, 0): 1, (0, 1): 3, (0, 2): 2, (1, 0): 1, (1, 1): 1, (1, 2): 3, (2, 0): 4, (2, 1): 1, (2, 2): 1}
    language = {"texts": ["Yes, no.", "yes no", "no"], "weight": 0.7}
    task, changed = make_task(symbols=["yes", "no"], max_symbols=4, beam=100, language=language), 0
    for seed in range(40):
        outputs_TK, scores = draw_outputs(4, seed=seed), {}
        for symbols, probability in sum_paths(outputs_TK).items():
            steps = itertools.pairwise([0, *(index + 1 for index in symbols), 0])
            each = [behind[step] / sum(behind[step[0], other] for other in range(3)) for step in steps]
            scores[symbols] = probability * math.prod(each) ** 0.7
        best = max(scores, key=lambda symbols: scores[symbols])
        ((said,),) = task.codec.decode(outputs_TK[None])
        assert said.split() == [["yes", "no"][index] for index in best]
        changed += list(best) != search_prefixes(outputs_TK.numpy(), 100)
    assert changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": {"texts": ["yes"], "weight": 1.0}}, "beam: expected more than 1 beside `language`"),
        ({"beam": 2, "language": {"texts": ["yes", "maybe"], "weight": 1.0}}, "symbols, got other words in text 2"),
        ({"beam": 2, "language": {"texts": ["yes " * 400_000], "weight": 1.0}}, "at most 1048576 characters"),
        ({"beam": 2, "language": {"texts": ["yes"], "weight": 0.0}}, "weight"),
    ],
    ids=["one prefix", "other words", "too long", "no weight"],
)
def test_a_language_that_cannot_help_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make_task(**settings)


def test_a_narrow_beam_is_no_worse_than_the_best_path_where_that_is_sure() -> None:
    path = [1, 1, 0, 1, 2, 2, 0]
    outputs_TK = 20.0 * np.eye(3)[path]
    assert take_best_path(outputs_TK) == search_prefixes(outputs_TK, 2) == [0, 0, 1]


@pytest.mark.parametrize("beam", [1, 8])
def test_frames_without_outputs_are_not_the_recordings_own(beam: int) -> None:
    codec = make_task(beam=beam).codec
    outputs_PK = torch.zeros(9, 3)
    outputs_PK[:5] = 9.0 * torch.eye(3)[[1, 0, 1, 2, 0]]
    assert codec.decode(outputs_PK[None]) == [["yes yes no"]]
    assert codec.decode(torch.zeros(2, 9, 3)) == [[""], [""]]


def test_confidence_is_the_mean_over_own_frames() -> None:
    task = make_task()
    outputs_PK = torch.zeros(6, 3)
    outputs_PK[0] = torch.tensor([0.8, 0.1, 0.1]).log()
    outputs_PK[1] = torch.tensor([0.1, 0.5, 0.4]).log()
    assert task.serve(outputs_PK[None]).tolist() == [[pytest.approx(math.sqrt(0.4))]]


def test_error_rates_are_those_of_edits_and_each_recording_is_capped() -> None:
    task = make_task(symbols=DIGITS, figures=DIGITS, max_symbols=4)

    def say(words: str) -> Tensor:
        return 30.0 * torch.eye(11)[[0, *[each for word in words.split() for each in (1 + DIGITS.index(word), 0)]]]

    said = ["one two", "one three two", "", "five nine nine"]
    meant = ["1 2", "one two", "six six", "five nine"]
    outputs = torch.nn.utils.rnn.pad_sequence([say(words) for words in said], batch_first=True)
    labels = torch.stack([task.codec.encode([words]) for words in meant])
    statistic = task.statistic(EXACT_BUCKETS)
    values = statistic.values(statistic.sums(outputs, labels))
    # One word inserted, two left out, one inserted, of eight; so "three ", "six six" and " nine" of 30 characters.
    assert values == {"wer": pytest.approx(4 / 8), "cer": pytest.approx((6 + 7 + 5) / (7 + 7 + 7 + 9))}
    rows = statistic.rows(outputs, labels)
    assert rows[1].tolist() == pytest.approx([1 / 4, 2 / 4, 6 / 23, 7 / 23])
    nothing = statistic.values(statistic.sums(outputs[2:3], task.codec.encode([""])[None]))
    assert all(math.isnan(value) for value in nothing.values())


def test_edits_are_the_fewest() -> None:
    assert count_edits("kitten", "sitting") == 3
    assert count_edits("", "abc") == count_edits("abc", "") == 3
    assert count_edits(["a", "b"], ["a", "b"]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Three, SIX; eight!", "three six eight"),
        ("914", "nine one four"),
        ("  7\t½ ", None),
        ("seven-eight\nnine", "seven eight nine"),
        ("o'ne", "one"),
        ("3.5", "three five"),
        ("٣", "three"),  # An Arabic figure is a figure.
        ("…", ""),
        ("drei", None),
        ("три", None),
    ],
)
def test_transcripts_are_read_by_the_stated_rule(text: str, words: str | None) -> None:
    codec = make_task(symbols=DIGITS, figures=DIGITS, max_symbols=9).codec
    if words is not None:
        assert codec.symbols.write([index for index in codec.encode([text]).tolist() if index >= 0]) == words
        return
    with pytest.raises(BadRecord, match="words that are none of them") as caught:
        codec.encode([text])
    assert text.strip() not in str(caught.value)


def test_characters_have_a_blank_between_words_and_accents_are_one() -> None:
    symbols = Symbols(("a", "é", "n", "'"), "characters")
    assert symbols.read("An  e\u0301'", 9) == [0, 2, 4, 1, 3]
    assert symbols.write([4, 0, 4, 4, 1, 3]) == "a é'"
    with pytest.raises(BadRecord):
        symbols.read("an b", 9)
    with pytest.raises(BadRecord, match="at most 3 symbols"):
        symbols.read("an a", 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"symbols": ["Yes", "no"]}, "lower case words"),
        ({"symbols": ["oh no"]}, "lower case words"),
        ({"unit": "characters"}, "single characters"),
        ({"figures": DIGITS}, "figures: expected words"),
        ({"head": {"bias": True}}, "`bias: false`"),
        ({"head": {"bias": False, "centre": True}}, "no `centre`"),
        ({"max_symbols": 0}, "max_symbols"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make_task(**settings)
