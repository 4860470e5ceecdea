"""The law of released noise: real draws pass, and noise that is repeated, bent, shared or not rounded is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.audit.attack import AuditedRun
from client.audit.audit import audit
from client.audit.noise import find_noise_problems, find_repetition, judge_noise, observe_noise
from client.solvers.parts import compiled_step
from common.privacy.lattice import Lattice
from common.privacy.noise import NoiseStream, os_entropy
from tests.client.audit import bugs
from tests.client.audit.bugs import LINEAR, Bend, bend_noise, break_solver, make_run

KINDS = ["dp_gd", "dp_sgd"]


def find_problems(run: AuditedRun) -> str:
    observed = observe_noise(run.solver, run.plan, run.tasks, run.public_sizes, run.entropy)
    return "; ".join(judge_noise(run.plan, observed))


def make(kind: str = "dp_gd") -> AuditedRun:
    return make_run(tasks=LINEAR, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_the_real_code_with_the_system_s_keys_has_its_law(kind: str) -> None:
    assert find_problems(replace(make(kind), entropy=os_entropy)) == ""


@pytest.mark.parametrize("log2_deviation", [20, 42, 48])
def test_independent_draws_of_any_deviation_conform(log2_deviation: int) -> None:
    for seed in range(3):
        stream = NoiseStream(bytes([seed]) * 32)
        noises = [stream.rounded_gaussian(count, log2_deviation) for count in (70_000, 70_000, 3)]
        assert list(find_noise_problems(noises, log2_deviation)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_noise_keyed_by_the_round_s_number_repeats_itself(kind: str) -> None:
    assert "released noise repeats itself" in find_problems(replace(make(kind), entropy=bugs.key_by_round))


def test_a_key_that_depends_on_run_and_round_repeats_itself_when_a_round_is_asked_again() -> None:
    run = replace(make(), entropy=lambda purpose: bugs.key_by_round(purpose.replace("/", "-")))
    assert "released noise repeats itself" in find_problems(run)


BENT: dict[str, tuple[Bend, str]] = {
    "repeated every 16,384 values": (bugs.repeat_every_16384, "released noise repeats itself"),
    "a draw made of its first third three times": (bugs.repeat_first_third, "released noise repeats itself"),
    "the same values backward with other signs": (bugs.repeat_with_other_signs, "released noise repeats itself"),
    "no rounding to the lattice": (bugs.leave_fractions, "not rounded to its lattice"),
    "drawn in single precision": (bugs.draw_in_float32, "lowest digits"),
    "neighbours that share a little": (bugs.mix_neighbours, "neighbouring values"),
    "no tails": (bugs.cut_tails, "not normal"),
    "three per cent too little": (lambda noise: np.rint(0.97 * noise).astype(np.int64), "0.97"),
    "all of one size": (lambda noise: np.where(noise < 0, -(2**42), 2**42), "repeats itself"),
}


@pytest.mark.parametrize("bug", BENT)
def test_bent_noise_is_named(bug: str) -> None:
    bend, sentence = BENT[bug]
    assert sentence in find_problems(break_solver(make(), stream=bend_noise(bend)))


STREAMS: dict[str, tuple[Callable[[NoiseStream], NoiseStream], str]] = {
    "one key, begun at another place": (bugs.start_anew_somewhere, "released noise repeats itself"),
    "releases that share a part of their noise": (bugs.share_a_part, "correlated with that of another"),
    "a generator of the solver's own": (bugs.seed_every_call_alike, "not every released sum passes"),
}


@pytest.mark.parametrize("bug", STREAMS)
def test_noise_of_another_source_is_named(bug: str) -> None:
    stream, sentence = STREAMS[bug]
    assert sentence in find_problems(break_solver(make(), stream=stream))


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_that_leaves_its_lattice_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Lattice.release

    def release(self: Lattice, total: torch.Tensor, noise: np.ndarray, stream: NoiseStream) -> torch.Tensor:
        released = right(self, total, noise, stream)
        return released + torch.rand(released.shape, dtype=torch.double) * self.spacing

    monkeypatch.setattr(compiled_step, "open_library", lambda: None)  # It releases by itself.
    monkeypatch.setattr(Lattice, "release", release)
    assert "whole steps of the lattice" in find_problems(make(kind))


def test_a_release_with_noise_of_its_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Lattice.release

    def release(self: Lattice, total: torch.Tensor, noise: np.ndarray, stream: NoiseStream) -> torch.Tensor:
        right(self, total.clone(), noise, stream)
        return torch.randn(total.shape, dtype=torch.double) * 2.0**self.log2_deviation * self.spacing

    monkeypatch.setattr(compiled_step, "open_library", lambda: None)  # It releases by itself.
    monkeypatch.setattr(Lattice, "release", release)
    assert "not the sum that passed" in find_problems(make())


@pytest.mark.parametrize("distance", [4, 1000, 16_384, 65_539])
def test_four_values_that_occur_again_at_any_distance_are_a_repetition(distance: int) -> None:
    for log2_deviation in (20, 42):
        noise = NoiseStream(bytes(32)).rounded_gaussian(80_000, log2_deviation)
        assert not find_repetition(noise, log2_deviation)
        noise[distance : distance + 4] = -noise[:4] - 1
        assert find_repetition(noise, log2_deviation)


def test_the_whole_audit_names_what_was_tried_and_fails_for_each() -> None:
    run = replace(make(), num_canaries=50)
    result = audit(run)
    assert result.passed and any("noise values of" in sentence for sentence in result.tried)
    for bend in (bugs.repeat_every_16384, bugs.repeat_first_third, bugs.leave_fractions):
        assert not audit(break_solver(run, stream=bend_noise(bend))).passed
    assert not audit(replace(run, entropy=bugs.key_by_round)).passed
