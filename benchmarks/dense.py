"""One private step of a 1x1-convolution head on feature maps beside a non-private one and Opacus' hooks.

    python -m benchmarks.dense

The task is a plug-in as a user would write it: a class for each place of a B x D x H x W map, mean cross entropy.

# Shapes: B examples, D features, K classes, H x W places.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.heads import RATE, STEPS, private
from benchmarks.measure import Work
from client.data.units import TaskRecords, Units
from common.plugins import Plugin
from common.process.threads import one_thread
from common.tasks import Task, open_task
from common.tasks.detection import Detection

compare = partial(measure.compare, clock=time.process_time)
"""In seconds of the processor: what else runs on a machine counts less."""

SHAPES = [(64, 96, 2, 14), (64, 96, 10, 14), (32, 576, 10, 7), (128, 576, 2, 7)]


class PerPixel(Plugin):
    """A class for each place of a feature map; the head is one 1x1 convolution."""

    kind: Literal["per_pixel"] = "per_pixel"
    classes: int
    scale: float = 1.0

    def head(self, feature_dim: int) -> nn.Module:
        """maps B x D x H x W -> logits B x K x H x W."""
        return nn.Conv2d(feature_dim, self.classes, kernel_size=1)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the places of each example."""
        return nn.functional.cross_entropy(outputs, labels, reduction="none").mean(dim=(1, 2))


def maps(B: int, D: int, K: int, side: int) -> tuple[Tensor, Tensor]:
    """Random maps, channels last, and a class for each place."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, D, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    return features, torch.randint(0, K, (B, side, side), generator=generator)


def closed_form(features: Tensor, labels: Tensor, K: int) -> Work:
    """Non-private gradient descent without autograd: all places of all examples as rows of one matrix."""
    D = features.shape[1]
    rows_ND = features.permute(0, 2, 3, 1).reshape(-1, D)
    onehot_NK = nn.functional.one_hot(labels.reshape(-1), K).float()

    def work() -> Tensor:
        weight_KD, bias_K = torch.zeros(K, D), torch.zeros(K)
        with torch.no_grad():
            for _ in range(STEPS):
                delta_NK = torch.softmax(torch.addmm(bias_K, rows_ND, weight_KD.T), 1).sub_(onehot_NK)
                weight_KD.addmm_(delta_NK.T, rows_ND, alpha=-RATE / len(rows_ND))
                bias_K.sub_(delta_NK.sum(dim=0), alpha=RATE / len(rows_ND))
        return weight_KD

    return work


def main() -> None:
    """Every shape against both."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for B, D, K, side in SHAPES:
            features, labels = maps(B, D, K, side)
            task = PerPixel(classes=K)
            mask, unit_R = torch.ones(B, dtype=torch.bool), torch.arange(B)
            units = Units(B, {"map": TaskRecords.of(features, labels, mask, unit_R, B)})
            step, oracle = (private(units, {"map": task}, {"map": task.head(D)}, kind) for kind in ("dp_gd", "dp_sgd"))
            shape = f"B {B} D {D} K {K} {side}x{side}"
            name = f"private dense step / non-private closed form, {shape}"
            compare(name, step, closed_form(features, labels, K), target=1.15, repeats=7, note="16 steps each")
            compare(f"private dense step / Opacus, {shape}", step, oracle, target=0.2, repeats=3, note="16 steps each")
        of_kinds()


def of_kinds() -> None:
    """Segmentation and detection as a run has them."""
    for B, D, K, side in ((16, 48, 2, 64), (64, 96, 10, 14)):
        features, labels = maps(B, D, K, side)
        names = [str(k) for k in range(K)]
        cells = open_task({"kind": "segmentation", "labels": names, "side": side}, "cells")
        compare_kind(cells, features, labels.to(torch.uint8), closed_form(features, labels, K), f"K {K}")
    features, labels = maps(32, 96, 5, 32)
    example = Detection.example()
    boxes = open_task(dict(example.settings), "boxes")
    coded = torch.stack([boxes.codec.encode(cells) for cells in example.cells])[torch.arange(32) % len(example.cells)]
    outputs = boxes.head(96)(torch.zeros(1, 1, 1, 96)).shape[-1]
    compare_kind(boxes, features, coded, closed_form(features, labels % outputs, outputs), f"outputs {outputs}")


def compare_kind(task: Task, features: Tensor, labels: Tensor, reference: Work, outputs: str) -> None:
    """A private step of a kind's own head beside a softmax regression on the same places."""
    B, D, side, _ = features.shape
    rows = features.permute(0, 2, 3, 1).contiguous()
    records = TaskRecords.of(rows, labels, torch.ones(B, dtype=torch.bool), torch.arange(B), B)
    step = private(Units(B, {"task": records}), {"task": task}, {"task": task.head(D)})
    name = f"private {task.kind} step / non-private closed form, B {B} D {D} {outputs} {side}x{side}"
    compare(name, step, reference, target=1.15, repeats=7, note="16 steps each")


if __name__ == "__main__":
    main()
