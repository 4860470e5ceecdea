"""The model card: every number in it is the run's, what is unknown is said, and no name in it is interpreted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from common.events import AuditSummary, ByteCounts, Durations, SiteSummary, Summary
from common.exports.parts.card import CardSubject, bound_guess, find_pipeline, make_card
from common.exports.parts.exported import select
from common.exports.parts.facts import RunFacts
from common.exports.parts.markdown import escape, make_table, quote
from common.offers import make_offer
from common.run import ONLY_BACKBONE
from common.serving.folder import Metric, ModelConfig, describe_model
from common.serving.network import open_model
from common.types import BadInput, Unit
from tests.finished import MASKS, TASKS, write_finished, write_maps
from tests.tiny import backbone, run_config

PLACES = [
    ({"cells": MASKS}, "image-segmentation"),
    ({"cells": MASKS, **TASKS}, "image-segmentation"),
    (TASKS, "image-classification"),
]
HOSTILE = "</td><script>alert(1)</script> [x](http://evil.example) | `a` *b* www.evil.example\n# c"


def make_config(**changes: Any) -> ModelConfig:
    run, frozen = run_config(**changes), backbone()
    return describe_model(
        run,
        "tiny-1",
        {"colour": {}, "size": {}},
        {ONLY_BACKBONE: (frozen.digest, frozen.public_spec())},
        digest="ab" * 32,
        epsilon={"north": 1.0, "south": None},
        temperatures={"size": 1.5},
        metrics={"colour": {"accuracy": Metric(value=0.75, standard_error=0.0125), "auroc": Metric(value=None)}},
    )


def make_facts(**audit: Any) -> RunFacts:
    site = SiteSummary(status="completed", epsilon=1.0)
    summary = Summary(
        run="tiny",
        path=None,
        executor="deployment",
        rounds=2,
        status="completed",
        backbones={},
        tasks={},
        sites={"north": site},
        audit=AuditSummary(required=True, **audit),
        bytes=ByteCounts(down_per_site_round=None, up_per_site_round=None, backbone_per_site=None),
        seconds=Durations(total=1.0, features=0.0, training=1.0, baselines=0.0),
    )
    return RunFacts(summary, {"north": {"colour": 40, "size": 30}}, environment={"packages": {"torch": "9.9"}})


def card_of(config: ModelConfig, **more: Any) -> str:
    return make_card(CardSubject(config, ("colour", "size"), "torch", **more))


def test_hugging_face_reads_the_metadata() -> None:
    card = ModelCard(card_of(make_config(), pipeline="image-classification"))
    assert card.data.license == "other"
    assert card.data.pipeline_tag == "image-classification"
    assert {"headwater", "federated-learning", "differential-privacy"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-classification", "accuracy", 0.75)
    assert "0.0125" in result.metric_name


def test_a_card_says_unit_neighbours_delta_and_epsilon_of_each_site() -> None:
    text = card_of(make_config())
    assert "differ by one record" in text and "δ of the run: 1e-05" in text
    # e / (1 + e) = 73.106 %, rounded up.
    assert "| north | 1.00 | right in at most 73.11 % |" in text
    assert "| south | not known | not known |" in text
    patients = make_config(privacy={"unit": "patient", "delta": 1e-5, "noise_multiplier": 2.0})
    assert patients.privacy is not None and patients.privacy.unit == Unit.PATIENT
    assert "differ by all records of one patient" in card_of(patients)


def test_a_guess_is_bounded_by_epsilon_and_delta() -> None:
    assert bound_guess(0.0, 0.0) == 0.5
    assert bound_guess(math.log(3.0), 0.0) == pytest.approx(0.75)
    # The difference of the rates is at most (e^0 - 1 + 2 delta) / 2 = delta.
    assert bound_guess(0.0, 0.1) == pytest.approx(0.55)
    assert bound_guess(10_000.0, 1e-5) == 1.0 == bound_guess(math.inf, 1e-5)


def test_a_metric_is_shown_with_its_noise_and_who_computed_it() -> None:
    text = card_of(make_config())
    assert "| colour | accuracy | 0.750 ± 0.013 | not known |" in text
    assert "| colour | auroc | undefined | not known |" in text
    assert "released with noise" in text


def test_a_card_without_the_run_says_what_is_not_known() -> None:
    text = card_of(make_config())
    for sentence in (
        "How many units each declared is not known",
        "No audit is known",
        "not known: check before you publish",
        "| packages it was trained with | not known |",
    ):
        assert sentence in text
    assert "None are known" in make_card(CardSubject(make_config(), ("size",), "torch"))


def test_a_card_with_the_run_says_sizes_audit_and_versions() -> None:
    found = make_facts(passed=True, epsilon_claimed=1.0, epsilon_lower_99_9=0.25, reasons=())
    text = card_of(make_config(), facts=found)
    assert "| north | colour 40; size 30 | completed |" in text
    assert "**passed**: it shows an ε of at least 0.25 (99.9 % confidence), and 1.00 is claimed" in text
    assert "torch 9.9" in text
    failed = make_facts(passed=False, epsilon_claimed=1.0, epsilon_lower_99_9=3.0, reasons=("noise is missing",))
    assert "**FAILED**" in card_of(make_config(), facts=failed)
    assert "- noise is missing" in card_of(make_config(), facts=failed)


def test_a_run_without_privacy_is_called_so() -> None:
    text = card_of(make_config(privacy="non_private", solver={"kind": "sgd", "learning_rate": 1.0, "batch_size": 8}))
    assert "**Trained without privacy.**" in text and "**None.** The run was not private" in text
    assert "differential-privacy" not in text


def test_a_name_is_shown_and_never_interpreted() -> None:
    tasks = {
        "colour": {"kind": "classification", "labels": [HOSTILE, "b"]},
        "size": {"kind": "classification", "labels": ["small", "large"]},
    }
    config = make_config(tasks=tasks).model_copy(update={"run": HOSTILE})
    body = card_of(config).split("---\n", 2)[2]
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert "<script" not in html and "<a " not in html and "</td><script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [x](http://evil.example) | `a` *b* www.evil.example # c" in html
    assert ModelCard(card_of(config)).data.eval_results, "the metadata is still valid YAML"


@pytest.mark.parametrize("text", ["a|b", "``x`", "`", "plain", " a\nb "])
def test_a_code_span_shows_its_text_in_a_table(text: str) -> None:
    rows = make_table(("what", "value"), [("x", quote(text))])
    html = MarkdownIt("commonmark").enable("table").render("\n".join(rows))
    shown = " ".join(text.split())
    assert f"<td><code>{shown}</code></td>" in html


def test_an_address_in_a_name_is_no_link() -> None:
    assert escape("http://a.example www.b.example c@d.example") == "http\\://a.example www\\.b.example c\\@d.example"


def test_a_declared_licence_is_repeated() -> None:
    text = card_of(make_config(licences={"backbone": "BSD-3-Clause"}))
    assert "| BSD-3-Clause |" in text and "check before you publish" not in text
    with pytest.raises(BadInput, match="licences: expected some of backbone, got 'other'"):
        run_config(licences={"other": "MIT"})


def test_an_offer_without_licences_has_no_such_key() -> None:
    frozen = {ONLY_BACKBONE: backbone()}
    assert "licences" not in make_offer(run_config(), frozen)
    assert make_offer(run_config(licences={"backbone": "MIT"}), frozen)["licences"] == {"backbone": "MIT"}


@pytest.mark.parametrize(("tasks", "pipeline"), PLACES, ids=["mask", "mask and label", "label"])
def test_the_pipeline_of_maps_is_that_of_what_is_predicted(tasks: Any, pipeline: str, tmp_path: Path) -> None:
    model = open_model(write_finished(tmp_path / "model", write_maps(tmp_path), tasks))
    assert find_pipeline(select(model, (), (), one_task=False, name="torch")) == pipeline
