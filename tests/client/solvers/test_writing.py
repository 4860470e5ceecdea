"""Heads with a decoder in them: each record's gradient is its own, and only what trains of a decoder travels."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from client.solvers import open_solver
from client.solvers.parts.objective import copy_trainable, sum_losses
from client.solvers.parts.private_step import hook_record_gradients
from common.backbones import DecoderLanguage
from common.model.backbones import Backbone, open_pretrained
from common.model.parameters import load_parameters, parameters
from common.privacy.noise import NoiseStream
from common.run import Privacy
from common.tasks import open_task, predict_outputs
from common.tasks.parts.transcripts.generating import write_texts
from common.tasks.parts.transcripts.writing import WritingHead
from common.tasks.seq2seq import Seq2seq
from common.types import Unit
from tests.encoder_decoders import CROSS, SYMBOLS, WRITERS, make_items

TEXTS = ["two zero one", "one", "zero zero zero two two", "two one"]


@pytest.fixture(scope="module", params=sorted(WRITERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backbone(name: str, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return open_pretrained(WRITERS[name](tmp_path_factory.mktemp(name)), "backbone")


def make_task(backbone: Backbone, name: str, part: str, **settings: Any) -> Seq2seq:
    lora = {"rank": 2, "alpha": 4, "targets": CROSS[name]}
    decoder = {"lora": lora if part in ("lora", "both") else None, "last": part in ("last", "both")}
    own = {"kind": "seq2seq", "max_tokens": 6, "rates": "transcript", "symbols": SYMBOLS, "decoder": decoder}
    task = open_task({**own, **settings}, "task")
    assert isinstance(task, Seq2seq) and backbone.language is not None
    return task.open_on(backbone.language)


def make_head(task: Seq2seq, backbone: Backbone, seed: int = 1) -> nn.Module:
    """A head that has begun to train: adapters of zero have no say."""
    torch.manual_seed(seed)
    head = task.head(backbone.feature_dim)
    task.start_head(head)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return head


def make_units(task: Seq2seq, backbone: Backbone, name: str) -> Units:
    features = backbone.encode([backbone.preprocess(item) for item in make_items(name)])
    labels = torch.stack([task.codec.encode([text]) for text in TEXTS])
    mask, unit = torch.ones(4, dtype=torch.bool), torch.arange(4)
    return Units(4, {"said": TaskRecords.of(features, labels, mask, unit, 4)})


@pytest.mark.parametrize("part", ["lora", "both"])
def test_gradients_of_records_are_those_of_each_alone(backbone: Backbone, name: str, part: str) -> None:
    task = make_task(backbone, name, part)
    head, units = make_head(task, backbone), make_units(task, backbone, name)
    copies = copy_trainable({"said": head})
    hook_record_gradients(copies)
    records = units.tasks["said"]
    features = records.features_RD.clone().requires_grad_()

    batch = Units(4, {"said": TaskRecords.of(features, records.labels, records.mask_R, records.unit_R, 4)})
    loss = sum_losses(copies, {"said": task}, batch)
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    found = {key: each.grad_sample for key, each in copies["said"].named_parameters() if each.requires_grad}
    assert len(found) > 1
    for row in range(4):
        alone = copy.deepcopy(head)
        # At its own length: nothing of padding has a part in it.
        own = int((records.features_RD[row, :, -1] > 0).sum())
        given = records.features_RD[row : row + 1, :own]
        task.losses(task.force(alone, given, records.labels[row : row + 1]), records.labels[row : row + 1]).backward()
        for key, parameter in alone.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                torch.testing.assert_close(found[key][row], parameter.grad, rtol=1e-3, atol=1e-5)
                assert parameter.grad.any()


def test_only_what_trains_travels_and_a_site_completes_it(backbone: Backbone, name: str) -> None:
    task = make_task(backbone, name, "lora")
    head = make_head(task, backbone)
    sent = parameters(head)
    adapters = [key for key in sent if key.startswith("decoder.")]
    assert len(sent) == len(adapters) + 1 and all(key.endswith(".up.weight") for key in adapters)
    # Six layers of 16 outputs and rank 2; the rows of three symbols and of the end, of 16 features and a mark.
    assert sum(values.size for values in sent.values()) == 6 * 16 * 2 + 4 * 17
    other = task.head(backbone.feature_dim)
    load_parameters(other, sent)
    features = make_units(task, backbone, name).tasks["said"].features_RD
    with torch.no_grad():
        assert torch.equal(predict_outputs(task, other, features), predict_outputs(task, head, features))


def test_writing_with_what_was_trained_finds_the_most_probable_text(backbone: Backbone, name: str) -> None:
    """By brute force: every text's probability, told behind its own tokens all at once."""
    task = make_task(backbone, name, "both")
    head = make_head(task, backbone, seed=3)
    row_1PD, language = make_units(task, backbone, name).tasks["said"].features_RD[:1], task.language
    tokens = [token for token in range(4) if token != language.end]
    texts = [list(text) for length in range(4) for text in itertools.product(tokens, repeat=length)]
    labels = torch.full((len(texts), 6), -1)
    for row, text in enumerate(texts):
        labels[row, : len(text) + 1] = torch.tensor([*text, language.end])
    with torch.no_grad():
        costs = task.losses(task.force(head, row_1PD.expand(len(texts), -1, -1), labels), labels)
        assert isinstance(head, WritingHead) and isinstance(language, DecoderLanguage)
        through = language.write_through(head.decoder)  # type: ignore[unreachable]
        written = write_texts(through, head.last, row_1PD, 1000)
        said = [int(token) - 1 for token in written[0, :, -1] if token]
        label = torch.full((1, 6), -1)
        label[0, : len(said)] = torch.tensor(said)
        own = float(task.losses(task.force(head, row_1PD, label), label))
    # Longer texts than those were tried too.
    assert own <= float(costs.min()) + 1e-4
    if len(said) <= 4:
        assert said == [*texts[int(costs.argmin())], language.end]
    assert -np.log(float(task.serve(written))) == pytest.approx(own, abs=1e-4)


def test_a_private_step_moves_what_trains_and_nothing_else(backbone: Backbone, name: str) -> None:
    task = make_task(backbone, name, "lora")
    head, units = make_head(task, backbone), make_units(task, backbone, name)
    before: dict[str, Tensor] = {key: value.clone() for key, value in head.state_dict().items()}
    settings = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 0.5, "learning_rate": 0.1}
    solver = open_solver(settings, "solver")
    plan = solver.plan(Privacy(unit=Unit.EXAMPLE, delta=1e-5, target_epsilon=8.0), Unit.EXAMPLE, 1)
    solver.check_modules({"said": head})
    stream = NoiseStream(bytes(range(32)))
    delta = solver.solve({"said": head}, {"said": task}, units, plan=plan, public_sizes={"said": 4}, stream=stream)
    assert set(delta.heads["said"]) == set(parameters(head))
    assert all(np.any(change != 0.0) for change in delta.heads["said"].values())
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
