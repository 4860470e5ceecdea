"""The projection made from public weights: directions, shift in closed form, normalisation, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from common.backbones import Kernel, Projection
from common.backbones.parts.projection import (
    ProjectionLayer,
    compute_clipped_mean,
    compute_projection,
    find_top_directions,
    predict_shift,
)
from common.backbones.parts.weights import load_strict
from common.model.backbones import load_blob, open_pretrained
from common.plugins import resolve
from common.types import BadInput


def random_classifier(classes: int = 12, dim: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed))


def test_directions_are_the_leading_eigenvectors_of_the_class_scatter() -> None:
    classifier = random_classifier()
    matrix = find_top_directions(classifier, 4).double().numpy()
    scatter = np.cov(classifier.double().numpy(), rowvar=False)
    eigenvalues, eigenvectors = np.linalg.eigh(scatter)
    for column, eigenvector in zip(matrix.T, eigenvectors[:, ::-1].T, strict=False):
        assert abs(column @ eigenvector) == pytest.approx(1.0, abs=1e-5)
    assert eigenvalues[-1] == pytest.approx(matrix[:, 0] @ scatter @ matrix[:, 0], rel=1e-5)


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_directions_do_not_depend_on_the_order_or_offset_of_classes(seed: int) -> None:
    classifier = random_classifier(seed=seed)
    order = torch.randperm(len(classifier), generator=torch.Generator().manual_seed(seed))
    moved = classifier[order] + torch.linspace(-2, 2, classifier.shape[1])
    # Neighbouring singular values may be close, then their directions are only jointly determined: the first is enough.
    torch.testing.assert_close(find_top_directions(classifier, 1), find_top_directions(moved, 1), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_directions_do_not_depend_on_the_number_of_threads() -> None:
    classifier_KD = torch.randn(1000, 640, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(find_top_directions(classifier_KD, 64))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_each_directions_largest_entry_is_positive() -> None:
    for sign in (1, -1):
        matrix = find_top_directions(sign * random_classifier(), 5)
        assert torch.all(matrix.gather(0, matrix.abs().argmax(0, keepdim=True)) > 0)
    torch.testing.assert_close(
        find_top_directions(random_classifier(), 5), find_top_directions(-random_classifier(), 5)
    )


def test_more_directions_than_the_centred_classifier_has_are_refused_by_key() -> None:
    assert find_top_directions(random_classifier(classes=5), 4).shape == (9, 4)
    with pytest.raises(BadInput, match=r"projection\.dim: expected at most 4"):
        find_top_directions(random_classifier(classes=5), 5)


@pytest.mark.parametrize("cap", [6.0, math.inf])
@settings(deadline=None)
@given(mean=st.floats(-8, 12), std=st.floats(0.05, 5))
def test_the_clipped_mean_is_the_integral_it_stands_for(cap: float, mean: float, std: float) -> None:
    top = min(cap, mean + 12 * std)
    density = stats.norm(mean, std)
    # P(X > x) integrated from 0 to the cap: another formula for the same mean.
    expected = integrate.quad(density.sf, 0.0, top, points=[mean] if 0 < mean < top else None)[0] if top > 0 else 0.0
    assert compute_clipped_mean(np.array([mean]), np.array([std]), cap)[0] == pytest.approx(expected, abs=1e-6)


def test_a_channel_without_spread_is_clipped_itself() -> None:
    means = compute_clipped_mean(np.array([-1.0, 2.0, 9.0]), np.zeros(3), 6.0)
    assert means.tolist() == [0.0, 2.0, 6.0]


def test_the_shift_is_the_mean_activation_after_a_batch_norm_and_its_relu6() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.5, 0.3, -1.0]))
    encoder = nn.Sequential(norm, nn.ReLU6())
    measured = encoder(torch.randn(64, 3, 50, 50)).mean((0, 2, 3)).detach()
    shift = predict_shift(encoder)
    assert shift is not None
    torch.testing.assert_close(shift, measured, rtol=0, atol=0.02)


@pytest.mark.parametrize("last", [nn.SiLU(), nn.Hardswish(), nn.GELU()])
def test_an_encoder_that_does_not_end_in_a_relu_has_no_shift(last: nn.Module) -> None:
    assert predict_shift(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), last)) is None
    assert predict_shift(nn.Sequential(nn.LayerNorm(3), nn.ReLU())) is None


def test_the_layer_shifts_then_projects_then_normalises() -> None:
    asked = Projection(dim=2, shift="batch_norm", normalize=True)
    classifier, shift = random_classifier(), torch.linspace(0, 1, 9)
    layer = ProjectionLayer(asked, 9)
    load_strict(layer, compute_projection(asked, 9, classifier, shift), "test")
    features = torch.randn(5, 9)
    expected = (features.numpy() - shift.numpy()) @ find_top_directions(classifier, 2).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(layer(features).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert layer.out_dim == 2


def test_normalising_keeps_a_vector_of_zeros() -> None:
    layer = ProjectionLayer(Projection(normalize=True), 3)
    assert layer(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    assert layer.out_dim == 3


def test_products_of_random_features_are_a_gaussian_kernel_of_the_normalised_features() -> None:
    asked = Projection(dim=4, normalize=True, kernel=Kernel(width=0.7, dim=20_000))
    classifier = random_classifier()
    layer = ProjectionLayer(asked, 9)
    load_strict(layer, compute_projection(asked, 9, classifier, None), "test")
    features = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    found = layer(features)
    unit = nn.functional.normalize(features @ find_top_directions(classifier, 4), dim=1).double()
    expected = torch.exp(-(torch.cdist(unit, unit) ** 2) / (2 * 0.7**2))
    assert layer.out_dim == found.shape[1] == 20_000
    # A product's standard deviation is at most 1 / sqrt(R).
    torch.testing.assert_close((found @ found.T).double(), expected, rtol=0, atol=5 / math.sqrt(20_000))


def test_a_kernel_is_part_of_the_backbone_that_is_sent() -> None:
    settings = {"kind": "identity", "dim": 3, "projection": {"normalize": True, "kernel": {"width": 0.5, "dim": 7}}}
    kind = resolve("common.backbones", settings, "backbone")
    opened = open_pretrained(kind, "backbone")
    received = load_blob(opened.blob())
    features = torch.randn(2, 3)
    assert received.feature_dim == 7
    assert torch.equal(received.encode(features), opened.encode(features))
    assert opened.digest == open_pretrained(kind, "backbone").digest
    wider = resolve("common.backbones", {**settings, "projection": {"normalize": True}}, "backbone")
    assert open_pretrained(wider, "backbone").digest != opened.digest


def test_what_the_weights_do_not_allow_is_refused_by_key() -> None:
    with pytest.raises(BadInput, match=r"^projection\.dim: expected null"):
        compute_projection(Projection(dim=2, normalize=False), 9, None, None)
    with pytest.raises(BadInput, match=r"^projection\.shift: expected 'none'"):
        compute_projection(Projection(shift="batch_norm", normalize=False), 9, random_classifier(), None)
