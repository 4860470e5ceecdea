"""A trunk below several tasks' heads: its private step against a loop over single units with plain autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import Tensor, nn

from client.data.units import TaskRecords, Units
from client.solvers import open_solver
from client.solvers.parts.private_step import compute_conv2d_gradients, hook_record_gradients
from common.backbones import Divided, Projection
from common.backbones.parts.boundary import Trunk, count_depths, list_trainable
from common.backbones.parts.projection import ProjectionLayer
from common.backbones.transformers import Transformers
from common.model.backbones import open_pretrained
from common.model.parameters import parameters
from common.model.trunks import cut, stand_in
from common.privacy.noise import NoiseStream
from common.run import Trainable
from common.tasks import Task, open_task
from common.types import BadInput, Plan, Unit

KEY = bytes(32)
TRUNK = "backbone.trunk"
WIDTH = 5
TASKS: dict[str, Task] = {
    "apart": open_task({"kind": "regression", "range": [-1, 1]}, "apart"),
    "findings": open_task({"kind": "multilabel", "labels": ["x", "y"], "scale": 2.0}, "findings"),
    "grade": open_task({"kind": "classification", "labels": ["a", "b", "c"], "head": {"hidden": 4}}, "grade"),
}
SIZES = {"apart": 10, "findings": 20, "grade": 30, TRUNK: 30}


class SilentStream(NoiseStream):
    """Real coins, no noise."""

    def rounded_gaussian(self, count: int, log2_deviation: int) -> np.ndarray:
        return np.zeros(count, np.int64)


def convolutions() -> tuple[Trunk, Tensor]:
    """A trunk with all that is delicate: frozen BatchNorm, ReLUs in place, a depthwise convolution, a residual sum."""
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y += x
            return self.relu(y)

    above = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(inplace=True),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(inplace=True),
        Residual(),
        nn.Dropout(0.5),
        nn.GroupNorm(2, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, WIDTH),
    )
    for part in above.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.3, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 2.0)
    layer = ProjectionLayer(Projection(normalize=True), WIDTH)
    trunk = Trunk(Divided(nn.Identity(), above, (2, 6, 6)), torch.tensor(1.7), layer)
    trunk.open(list_trainable(above))
    generator = torch.Generator().manual_seed(4)
    return trunk.train(), 2.0 * torch.randn(12, 72, generator=generator)


def bert(folder: Path) -> tuple[Trunk, Tensor]:
    """The last layer of a text encoder, on texts of different lengths."""
    example = Transformers.example(folder)
    backbone = open_pretrained(example.settings, "backbone")
    parts = cut(backbone, Trainable(**{"from": "encoder.layer.1"}), TRUNK, "trainable", seed=0)
    rows = parts.below.encode([backbone.preprocess(item) for item in example.items])
    return parts.trunk.train(), rows.repeat(3, 1)


def adapters(folder: Path) -> tuple[Trunk, Tensor]:
    """Adapters that are not zero any more, in both layers of a text encoder."""
    example = Transformers.example(folder)
    backbone = open_pretrained(example.settings, "backbone")
    lora = {"rank": 2, "alpha": 4, "targets": ["query", "dense"]}
    asked = Trainable(**{"from": "encoder.layer.0", "lora": lora})
    parts = cut(backbone, asked, TRUNK, "trainable", seed=0)
    generator = torch.Generator().manual_seed(6)
    for parameter in parts.trunk.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    rows = parts.below.encode([backbone.preprocess(item) for item in example.items])
    return parts.trunk.train(), rows.repeat(3, 1)


@pytest.fixture(params=["convolutions", "bert", "adapters"])
def trunk_and_rows(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Trunk, Tensor]:
    if request.param == "convolutions":
        return convolutions()
    return bert(tmp_path) if request.param == "bert" else adapters(tmp_path)


def heads_on(trunk: Trunk, rows: Tensor) -> dict[str, nn.Module]:
    with torch.no_grad():
        width = trunk(rows[:1]).shape[1]
    generator = torch.Generator().manual_seed(2)
    made = {name: task.head(7 if name == "apart" else width) for name, task in TASKS.items()}
    for head in made.values():
        for parameter in head.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return {**made, TRUNK: trunk}


def site(rows: Tensor) -> Units:
    """Six patients with up to three records; two tasks pass the trunk with other records, one does not pass it."""
    generator = torch.Generator().manual_seed(1)
    tasks = {}
    for name, task in TASKS.items():
        chosen = torch.randperm(12, generator=generator)[:9]
        features_RD = torch.randn(9, 7, generator=generator) if name == "apart" else rows[chosen]
        labels = {
            "apart": torch.rand(9, generator=generator),
            "findings": torch.randint(0, 2, (9, 2), generator=generator).float(),
            "grade": torch.randint(0, 3, (9,), generator=generator),
        }[name]
        mask_R = torch.rand(9, generator=generator) >= 0.3
        unit_R = torch.tensor([5, 0, 1, 0, 2, 3, 0, 1, 3])
        trunk = None if name == "apart" else TRUNK
        tasks[name] = TaskRecords.of(features_RD, labels, mask_R, unit_R, 6, trunk=trunk)
        assert task.losses is not None
    return Units(6, tasks)


def one_at_a_time(modules: dict[str, nn.Module], units: Units, clip_norm: float) -> dict[str, dict[str, np.ndarray]]:
    """The clipped sum by its definition: one unit after the other, each record alone through trunk and head."""
    names = {name: [n for n, p in modules[name].named_parameters() if p.requires_grad] for name in modules}
    trainable = [p for name in modules for p in modules[name].parameters() if p.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in trainable]
    for unit in range(units.num_units):
        loss = torch.zeros(())
        for name, records in units.tasks.items():
            own = (records.unit_R == unit).nonzero().squeeze(1).tolist()
            for row in own:
                if records.mask_R[row]:
                    x = records.features_RD[row : row + 1]
                    x = x if records.trunk is None else modules[TRUNK](x)
                    example = TASKS[name].losses(modules[name](x), records.labels[row : row + 1])[0]
                    loss = loss + TASKS[name].scale * example / len(own)
        if not loss.requires_grad:
            continue
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True, materialize_grads=True)
        norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
        for part, gradient in zip(total, gradients, strict=True):
            part += gradient * min(1.0, clip_norm / max(norm, 1e-12))
    flat = iter(total)
    return {name: {key: next(flat).numpy() for key in names[name]} for name in modules}


@pytest.mark.parametrize("clip_norm", [0.2, 3.0, 1e6])
def test_the_private_sum_is_that_of_a_loop_over_units(trunk_and_rows: tuple[Trunk, Tensor], clip_norm: float) -> None:
    trunk, rows = trunk_and_rows
    modules, units = heads_on(trunk, rows), site(rows)
    solver = open_solver(
        {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 1, "clip_norm": clip_norm, "learning_rate": 1.0}, "solver"
    )
    plan = Plan(1.0, 1, clip_norm, 1.0, Unit.PATIENT)
    delta = solver.solve(modules, TASKS, units, plan=plan, public_sizes=SIZES, stream=SilentStream(KEY))
    expected = one_at_a_time(modules, units, clip_norm)
    assert delta.heads.keys() == expected.keys()
    for name, params in expected.items():
        assert delta.heads[name].keys() == params.keys(), "only what trains is released"
        for key, value in params.items():
            # The delta is a difference of float32 weights: what is small beside them is rounded.
            assert -delta.heads[name][key] * SIZES[name] == pytest.approx(value, abs=5e-5, rel=1e-4)
    assert any(np.abs(value).max() > 1e-3 for value in expected[TRUNK].values())


def test_without_clipping_and_noise_it_is_plain_sgd_with_the_trunks_own_rates(
    trunk_and_rows: tuple[Trunk, Tensor],
) -> None:
    trunk, rows = trunk_and_rows
    modules, units = heads_on(trunk, rows), site(rows)
    rates = {"learning_rate": 0.3, "weight_decay": 0.01, "momentum": 0.5}
    own = {"learning_rate": 0.02, "weight_decay": 0.2}
    common = {"sampling_rate": 0.6, "steps": 4, **rates, "trunk": own}
    private = open_solver({"kind": "dp_sgd", "clip_norm": 1e6, **common}, "solver").solve(
        modules, TASKS, units, plan=Plan(0.6, 4, 1e6, 1.0, Unit.PATIENT), public_sizes=SIZES, stream=SilentStream(KEY)
    )
    plain = open_solver({"kind": "sgd", **common}, "solver").solve(
        modules, TASKS, units, plan=Plan(0.6, 4, None, 0.0, Unit.PATIENT), public_sizes=SIZES, stream=SilentStream(KEY)
    )
    for name in modules:
        for key, value in plain.heads[name].items():
            assert private.heads[name][key] == pytest.approx(value, abs=2e-5, rel=1e-4)


@pytest.mark.parametrize("kind", ["dp_sgd", "sgd"])
def test_each_group_moves_by_its_own_rate_and_decay(kind: str) -> None:
    """Nobody has a record: a step is decay alone, weights * learning rate * decay."""
    trunk, rows = convolutions()
    modules = heads_on(trunk, rows)
    nobody = site(rows)
    nobody = replace(
        nobody,
        tasks={name: replace(own, mask_R=torch.zeros(9, dtype=torch.bool)) for name, own in nobody.tasks.items()},
    )
    spec = {"kind": kind, "sampling_rate": 1.0, "steps": 1, "learning_rate": 0.5, "weight_decay": 0.1}
    spec |= {"trunk": {"learning_rate": 0.25, "weight_decay": 0.8}}
    spec |= {"clip_norm": 1.0} if kind == "dp_sgd" else {}
    plan = Plan(1.0, 1, 1.0, 1e-3, Unit.PATIENT) if kind == "dp_sgd" else Plan(1.0, 1, None, 0.0, Unit.PATIENT)
    delta = open_solver(spec, "solver").solve(
        modules, TASKS, nobody, plan=plan, public_sizes=SIZES, stream=SilentStream(KEY)
    )
    for name, module in modules.items():
        moved = 0.25 * 0.8 if name == TRUNK else 0.5 * 0.1
        for key, value in parameters(module).items():
            assert delta.heads[name][key] == pytest.approx(-moved * value, abs=1e-6)


@pytest.mark.parametrize("kind", ["dp_sgd", "sgd"])
def test_with_a_layer_decay_each_block_moves_less_than_the_one_above_it(
    trunk_and_rows: tuple[Trunk, Tensor], kind: str
) -> None:
    trunk, rows = trunk_and_rows
    modules, units = heads_on(trunk, rows), site(rows)
    depths = count_depths(trunk)
    assert depths.keys() == parameters(trunk).keys()

    def solve(**trunk_rates: float) -> dict[str, np.ndarray]:
        spec: dict[str, Any] = {"kind": kind, "sampling_rate": 1.0, "steps": 1, "learning_rate": 0.5}
        spec |= {"trunk": {"learning_rate": 0.25, **trunk_rates}} | ({"clip_norm": 0.5} if kind == "dp_sgd" else {})
        plan = Plan(1.0, 1, 0.5, 1.0, Unit.PATIENT) if kind == "dp_sgd" else Plan(1.0, 1, None, 0.0, Unit.PATIENT)
        delta = open_solver(spec, "solver").solve(
            modules, TASKS, units, plan=plan, public_sizes=SIZES, stream=SilentStream(KEY)
        )
        return {f"{group}/{name}": each for group, own in delta.heads.items() for name, each in own.items()}

    plain, layered = solve(), solve(layer_decay=0.5)
    for name, change in plain.items():
        group, _, key = name.partition("/")
        factor = 0.5 ** depths[key] if group == TRUNK else 1.0
        assert layered[name] == pytest.approx(factor * change, abs=1e-6, rel=1e-3)


def test_blocks_are_counted_from_the_features_down(tmp_path: Path) -> None:
    depths = count_depths(convolutions()[0])
    # Norms and what has no weights count to the convolution before them.
    expected = {"above.0": 3, "above.3": 2, "above.5": 1, "above.7": 1, "above.10": 0}
    for name, depth in depths.items():
        assert depth == next(each for part, each in expected.items() if name.startswith(f"{part}."))
    layers = {int(name.split(".")[2]): depth for name, depth in count_depths(adapters(tmp_path)[0]).items()}
    assert layers == {0: 1, 1: 0}


@pytest.mark.parametrize("kind", ["dp_sgd", "sgd"])
def test_layers_cannot_be_told_apart_in_a_trunk_of_one_block(kind: str) -> None:
    trunk = stand_in(7, 3)
    spec: dict[str, Any] = {"kind": kind, "sampling_rate": 1.0, "steps": 1, "learning_rate": 0.5}
    spec |= {"clip_norm": 0.5} if kind == "dp_sgd" else {}
    open_solver({**spec, "trunk": {"learning_rate": 0.1}}, "solver").check_modules({TRUNK: trunk})
    layered = open_solver({**spec, "trunk": {"learning_rate": 0.1, "layer_decay": 0.9}}, "solver")
    with pytest.raises(BadInput, match="layer_decay: expected a trunk in which several blocks train"):
        layered.check_modules({TRUNK: trunk})
    layered.check_modules({TRUNK: convolutions()[0]})


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradients_of_grouped_convolutions_are_those_of_opacus(groups: int) -> None:
    """Which forms all products between groups, and keeps those within."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=groups)
    x = torch.randn(5, 6, 9, 8)
    slope = torch.randn(layer(x).shape)
    expected = compute_conv_grad_sample(layer, [x], slope)
    found = compute_conv2d_gradients(layer, [x], slope)
    for parameter in (layer.weight, layer.bias):
        torch.testing.assert_close(found[parameter], expected[parameter], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_layer_norms_are_those_of_one_record_at_a_time(bias: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(4, bias=bias)
    nn.init.normal_(norm.weight)
    x_RTF = torch.randn(3, 5, 4)
    hooked = hook_record_gradients({"norm": norm})
    norm(x_RTF.requires_grad_()).square().sum().backward()
    found = {name: parameter.grad_sample for name, parameter in norm.named_parameters()}
    plain = nn.LayerNorm(4, bias=bias)
    plain.load_state_dict(norm.state_dict())
    for row, x_TF in enumerate(x_RTF.detach()):
        plain.zero_grad()
        plain(x_TF[None]).square().sum().backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-4, atol=1e-5)
    assert len(list(hooked.parameters())) == 1 + bias


def test_batch_norms_stay_frozen_and_travel_nowhere(trunk_and_rows: tuple[Trunk, Tensor]) -> None:
    trunk, _ = trunk_and_rows
    named = dict(trunk.named_modules())
    frozen = [name for name, part in named.items() if isinstance(part, nn.BatchNorm2d)]
    assert not [key for key in parameters(trunk) if key.rpartition(".")[0] in frozen]
    assert not any(named[name].training for name in frozen)
    assert not any(part.training for part in named.values() if isinstance(part, nn.Dropout))


def test_units_pass_a_trunk_once_for_each_input(trunk_and_rows: tuple[Trunk, Tensor]) -> None:
    trunk, rows = trunk_and_rows
    units = site(rows)
    shared = replace(units.tasks["grade"], features_RD=units.tasks["findings"].features_RD)
    units = replace(units, tasks={**units.tasks, "grade": shared})
    passed = units.passed({TRUNK: trunk})
    with torch.no_grad():
        expected = trunk(units.tasks["findings"].features_RD)
    torch.testing.assert_close(passed.tasks["findings"].features_RD, expected, rtol=1e-5, atol=1e-6)
    assert passed.tasks["grade"].features_RD is passed.tasks["findings"].features_RD
    assert passed.tasks["apart"].features_RD is units.tasks["apart"].features_RD
    assert {records.trunk for records in passed.tasks.values()} == {None}


def test_a_trunk_whose_layer_keeps_buffers_beside_its_weights_is_refused_before_it_is_charged() -> None:
    """Such as Swin's attention: Opacus has no gradients of single records for it."""

    class Shifted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(7, WIDTH)
            self.register_buffer("index", torch.arange(WIDTH))

    trunk = Trunk(Divided(nn.Identity(), Shifted(), (7,)), torch.tensor(1.0), ProjectionLayer(None, WIDTH))
    trunk.open(list_trainable(trunk.above))
    solver = open_solver(
        {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}, "solver"
    )
    with pytest.raises(BadInput, match="backbone.trunk cannot be trained privately"):
        solver.check_modules({TRUNK: trunk})


def test_a_site_without_records_passes_a_trunk_as_any_other(trunk_and_rows: tuple[Trunk, Tensor]) -> None:
    """A failure would tell the coordinator that nobody is held out."""
    trunk, rows = trunk_and_rows
    with torch.no_grad():
        width = trunk(rows[:1]).shape[1]
    nobody = torch.zeros(0, dtype=torch.long)
    records = TaskRecords.of(rows[:0], nobody, nobody.bool(), nobody, 0, trunk=TRUNK)
    assert Units(0, {"grade": records}).passed({TRUNK: trunk}).tasks["grade"].features_RD.shape == (0, width)


def test_the_closed_form_solver_refuses_a_trunk_and_says_which_one_trains_it() -> None:
    trunk, rows = convolutions()
    linear = {name: head for name, head in heads_on(trunk, rows).items() if name in ("findings", TRUNK)}
    solver = open_solver(
        {"kind": "dp_gd", "sampling_rate": 1.0, "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0}, "solver"
    )
    with pytest.raises(BadInput, match="no part of a backbone; kind dp_sgd"):
        solver.check_modules(linear)
