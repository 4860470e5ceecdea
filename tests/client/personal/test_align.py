"""A site adapts the final heads of a run, or of a model that it only holds, to its own domain; nothing leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from client.__main__ import app
from client.aligners import SourceMoments, open_aligners
from client.aligners.parts.head import AlignedHead
from client.data.units import TaskRecords
from client.personal.align import SERVED, MixUnknown, align_head, make_discriminant_head, read_source
from client.personal.evaluate import adapt, compare
from client.personal.personal_heads import (
    AT_HOME,
    NEVER_LEAVES,
    list_head_parameters,
    load_personal_heads,
    open_personal_head,
)
from client.protocol.site import PERSONAL_HEADS, Site, joined_run
from common import messages
from common.events import FEDERATED, PERSONAL, PERSONAL_UNIFORM
from common.model.class_moments import ClassMoments
from common.privacy.noise import os_entropy
from common.tasks import open_task
from common.types import BadInput
from common.yaml import write_yaml
from tests.server.rounds.test_moments import MEASURED, run_once
from tests.tiny import DIM, site_config

SHARES = {"means": 0.1, "counts": 0.1, "classes": 0.3, "scatter": 0.3}
CHAIN = open_aligners([{"kind": "mean_std"}, {"kind": "coral_em"}], "aligners")


def world(seed: int, shift: float, mix: list[float], labelled: int = 50, count: int = 600) -> tuple[Any, ...]:
    """Released moments of three classes, and records of a site whose features lie elsewhere."""
    rng = np.random.default_rng(seed)
    means_CD = 0.4 * np.eye(3, 12)
    source = SourceMoments(means_CD, 0.01 * np.eye(12), np.full(3, 1 / 3))
    labels_R = rng.choice(3, size=count, p=mix)
    rows_RD = means_CD[labels_R] + 0.1 * rng.normal(size=(count, 12))
    rows_RD = rows_RD * (1.0 + shift * rng.uniform(0.0, 0.8, size=12)) + shift * 0.4 * rng.normal(size=12)
    mask_R = torch.zeros(count, dtype=torch.bool)
    mask_R[:labelled] = True
    features_RD, labels = torch.from_numpy(rows_RD.astype(np.float32)), torch.from_numpy(labels_R)
    records = TaskRecords.of(features_RD, labels, mask_R, torch.arange(count), count)
    return source, records, features_RD[labelled:], labels[labelled:]


def accuracy(head: torch.nn.Module, features: torch.Tensor, labels: torch.Tensor) -> float:
    return float((head(features).argmax(dim=1) == labels).float().mean())


# --- the head --------------------------------------------------------------------------------------------------------


def test_a_shifted_site_with_a_mix_of_its_own_is_brought_back() -> None:
    gains = []
    for seed in range(6):
        source, records, features, labels = world(seed, shift=1.0, mix=[0.7, 0.25, 0.05])
        head = make_discriminant_head(source)
        adapted = align_head(head, source, records, CHAIN)
        assert accuracy(adapted.head, features, labels) > 0.9
        gains.append(accuracy(adapted.head, features, labels) - accuracy(head, features, labels))
        np.testing.assert_allclose(adapted.mix_C, [0.7, 0.25, 0.05], atol=0.15)
    assert np.mean(gains) > 0.1


def test_a_declared_mix_serves_a_site_without_a_label() -> None:
    mix = [0.7, 0.25, 0.05]
    source, records, features, labels = world(7, shift=1.0, mix=mix, labelled=0)
    with pytest.raises(MixUnknown, match="two classes at least, got no label; declare"):
        align_head(make_discriminant_head(source), source, records, CHAIN)
    adapted = align_head(make_discriminant_head(source), source, records, CHAIN, np.array(mix))
    assert adapted.aligner == "mean_std" and accuracy(adapted.head, features, labels) > 0.9


def test_labels_of_one_class_only_are_refused_in_one_sentence() -> None:
    source, records, _, _ = world(8, shift=0.0, mix=[1.0, 0.0, 0.0])
    with pytest.raises(MixUnknown, match="got labels of one class only"):
        align_head(make_discriminant_head(source), source, records, CHAIN)


def test_labels_at_home_veto_an_alignment_that_does_harm() -> None:
    """The declared mix is far from the true one, so that every class is moved onto another."""
    source, records, features, labels = world(9, shift=0.0, mix=[0.05, 0.05, 0.9])
    head, wrong_C = make_discriminant_head(source), np.array([0.9, 0.05, 0.05])
    without = align_head(
        head,
        source,
        TaskRecords.of(records.features_RD, records.labels, records.mask_R & False, records.unit_R, 600),
        CHAIN,
        wrong_C,
    )
    assert accuracy(without.head, features, labels) < 0.6 < accuracy(head, features, labels)
    guarded = align_head(head, source, records, CHAIN, wrong_C)
    assert guarded.aligner == SERVED
    torch.testing.assert_close(guarded.head(features), head(features))


def turned_world(seed: int) -> tuple[Any, ...]:
    """A site whose features are turned: no moments tell which class is which, but labels do."""
    source, records, _, labels = world(seed, shift=0.0, mix=[0.5, 0.3, 0.2], labelled=80)
    turned_RD = records.features_RD.roll(1, dims=1).contiguous()
    return source, replace(records, features_RD=turned_RD), turned_RD[80:], labels


def test_labels_fit_the_head_where_that_is_better_for_labels_that_it_was_not_fitted_to() -> None:
    task = open_task({"kind": "classification", "labels": ["a", "b", "c"]}, "t")
    source, records, features, labels = turned_world(12)
    head = make_discriminant_head(source)
    without = align_head(head, source, records, CHAIN)
    adapted = align_head(head, source, records, CHAIN, task=task)
    assert accuracy(without.head, features, labels) < 0.7
    assert adapted.aligner.endswith("then fit") and adapted.head.aligner == adapted.aligner
    assert accuracy(adapted.head, features, labels) > 0.9
    mix = torch.from_numpy(np.log(adapted.mix_C)).float()
    torch.testing.assert_close(adapted.head(features), adapted.head.compute_uniform(features) + mix)
    opened = open_personal_head(list_head_parameters(adapted.head), task, 12)
    assert torch.equal(opened(features), adapted.head(features))


def test_labels_that_say_nothing_new_leave_the_head_as_it_is() -> None:
    task = open_task({"kind": "classification", "labels": ["a", "b", "c"]}, "t")
    source, records, _, _ = world(13, shift=0.5, mix=[0.5, 0.3, 0.2])
    assert align_head(make_discriminant_head(source), source, records, CHAIN, task=task).aligner == "mean_std"


def test_an_aligned_head_is_read_back_to_the_bit() -> None:
    task = open_task({"kind": "classification", "labels": ["a", "b", "c"], "head": {"prior": True}}, "t")
    source, records, features, _ = world(10, shift=1.0, mix=[0.5, 0.3, 0.2])
    head = task.head(12)
    torch.nn.init.normal_(next(iter(head.parameters())))
    for kind, aligner in CHAIN.items():
        adapted = align_head(head, source, records, {kind: aligner}, np.array([0.5, 0.3, 0.2]), temperature=1.7).head
        opened = open_personal_head(list_head_parameters(adapted), task, 12)
        assert torch.equal(opened(features), adapted(features))
        assert isinstance(opened, AlignedHead)
        assert torch.equal(opened.compute_uniform(features), adapted.compute_uniform(features))


def test_noise_alone_makes_no_class_frequent_and_no_mean_long() -> None:
    """Counts that differ by less than their noise are taken for equal."""
    rng = np.random.default_rng(11)
    counts_C, units = 200.0 + 40.0 * rng.normal(size=8), 1600.0
    sums_CD = 200.0 * 0.5 * np.eye(8, 20)
    scatter_DD = units * 0.05 * np.eye(20)
    source = read_source(ClassMoments(counts_C, sums_CD, scatter_DD, 40.0, 4.0, 4.0, units), "t", 20)
    assert np.abs(source.shares_C - 1 / 8).max() < 0.5 * np.abs(counts_C / counts_C.sum() - 1 / 8).max()
    assert source.noise_C is not None
    np.testing.assert_allclose(source.noise_C, 4.0 / (source.shares_C * counts_C.sum()), rtol=1e-6)


def test_moments_of_another_backbone_are_refused_in_one_sentence() -> None:
    moments = ClassMoments(np.ones(2), np.zeros((2, 3)), np.eye(3), 0.0, 0.0, 0.0, 2.0)
    with pytest.raises(BadInput, match="task t: expected moments of 5 features, got 3: they are of another backbone"):
        read_source(moments, "t", 5)


# --- a run -----------------------------------------------------------------------------------------------------------


def after_a_run(folder: Path, *, moments: dict[str, float] = SHARES, **changes: Any) -> Site:
    """A site after a run of two sites without noise worth mentioning."""
    sites = [site_config(folder, name, split={"test_fraction": 0.3}) for name in ("east", "north")]
    privacy = {"unit": "example", "delta": 1e-5, "noise_multiplier": 0.3}
    run_once(folder, sites, moments=moments, privacy=privacy, **changes)
    return Site(sites[0].model_copy(update={"personal": "adapt"}), os_entropy)


def test_a_site_adapts_the_heads_of_a_run_and_nothing_is_sent_or_spent(tmp_path: Path) -> None:
    site = after_a_run(tmp_path)
    before, journal = site.ledger().lines(), (site.config.state_dir / "site.jsonl").read_bytes()
    result = compare(site)
    assert site.ledger().lines() == before and (site.config.state_dir / "site.jsonl").read_bytes() == journal
    for own in result.tasks.values():
        assert list(own)[:3] == [FEDERATED, PERSONAL, PERSONAL_UNIFORM]
        assert "balanced_accuracy" in own[PERSONAL_UNIFORM]
        assert float(own[PERSONAL]["accuracy"].value or 0.0) > 0.8
    folder = joined_run(site, "run-1").folder
    assert (folder / PERSONAL_HEADS).read_bytes().splitlines()[0].decode() == NEVER_LEAVES
    kept = load_personal_heads(folder, purpose=AT_HOME)
    assert kept.mode == "adapt" and not kept.may_leave
    opened = open_personal_head(kept.heads["size"], open_task(MEASURED["tasks"]["size"], "t"), DIM)
    assert isinstance(opened, AlignedHead)
    with pytest.raises(BadInput, match="never leaves"):
        load_personal_heads(folder, purpose="export")


def test_a_run_without_such_moments_is_refused_in_one_sentence(tmp_path: Path) -> None:
    bare = after_a_run(tmp_path / "a", moments={"means": 0.2, "counts": 0.2})
    with pytest.raises(BadInput, match="task colour: expected a run that released the moments of classes"):
        adapt(bare)
    halves = after_a_run(tmp_path / "b", moments={"means": 0.2, "counts": 0.2, "classes": 0.2})
    with pytest.raises(BadInput, match="released products of features .`moments.scatter`"):
        adapt(halves)


def with_mix(site: Site, mix: dict[str, float]) -> Site:
    tasks = {**site.config.tasks, "size": site.config.tasks["size"].model_copy(update={"mix": mix})}
    return Site(site.config.model_copy(update={"tasks": tasks}), os_entropy)


def test_a_declared_mix_is_that_of_the_heads_and_has_to_name_the_tasks_labels(tmp_path: Path) -> None:
    site = after_a_run(tmp_path)
    heads = adapt(with_mix(site, {"small": 0.5, "large": 0.5}))
    assert isinstance(heads["size"], AlignedHead)
    if not torch.equal(heads["size"].log_mix_C, heads["size"].log_shares_C):
        np.testing.assert_allclose(heads["size"].log_mix_C.exp(), [0.5, 0.5], rtol=1e-5)
    with pytest.raises(BadInput, match=r"tasks.size.mix: expected labels of the task, got 'smal' .nearest: 'small'"):
        adapt(with_mix(site, {"smal": 0.5, "large": 0.5}))


@pytest.mark.parametrize(
    ("mix", "words"),
    [({"small": 0.5, "large": 0.4}, "add up to 1, got 0.9"), ({"small": 1.5, "large": -0.5}, "tasks.size.mix")],
)
def test_a_mix_that_is_none_is_refused_with_the_file(tmp_path: Path, mix: dict[str, float], words: str) -> None:
    path, config = tmp_path / "site.yaml", site_config(tmp_path, "east")
    tasks = {**config.tasks, "size": config.tasks["size"].model_copy(update={"mix": mix})}
    write_yaml(path, config.model_copy(update={"tasks": tasks}))
    refused = CliRunner().invoke(app, ["adapt", str(path)])
    assert refused.exit_code == 2 and words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_of_another_kind_of_task_is_refused(tmp_path: Path) -> None:
    task = {"kind": "multilabel", "labels": ["small", "large"], "head": MEASURED["tasks"]["size"]["head"]}
    columns = {"source": "records", "label": ["size", "size"], "missing": "refuse", "public_size": 40}
    values = {"size": {"small": "1", "large": "0"}}
    sites = [site_config(tmp_path, "east", tasks={"both": {**columns, "values": values}})]
    run_once(tmp_path, sites, tasks={"both": task}, moments={"means": 0.2, "counts": 0.2})
    with pytest.raises(BadInput, match="expected a task of kind classification, got multilabel"):
        adapt(Site(sites[0].model_copy(update={"personal": "adapt"}), os_entropy))


def test_the_updates_of_an_adapting_site_are_those_of_any_other_to_the_bit(tmp_path: Path) -> None:
    """Also in a run after it has adapted: what it sends are sums of features as the backbone gives them."""
    sent = []
    for personal in ("none", "adapt"):
        folder = tmp_path / personal
        split = {"test_fraction": 0.3}
        sites = [site_config(folder, name, personal=personal, split=split) for name in ("east", "north")]
        run_once(folder, sites, moments=SHARES)
        if personal == "adapt":
            for config in sites:
                adapt(Site(config, os_entropy))
        run_once(folder, sites, "run-2", moments=SHARES)
        states = [config.state_dir / "runs" for config in sites]
        sent.append([read_arrays(path) for state in states for path in sorted(state.glob("*/replies/*"))])
    assert len(sent[0]) > 8 and sent[0] == sent[1]


def read_arrays(path: Path) -> dict[str, bytes]:
    """Returns all numbers of a stored reply that follow from records."""
    records = messages.from_bytes(path.read_bytes())
    try:
        groups = messages.decode(records, messages.TrainReply).delta.heads
    except BadInput:
        groups = messages.decode(records, messages.MomentsReply).sums
    found = {f"{group}/{name}": array.tobytes() for group, own in groups.items() for name, array in own.items()}
    assert found
    return found
