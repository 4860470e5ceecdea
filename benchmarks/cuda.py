"""On a GPU: images a second of extraction beside the plain eager loop and a bare forward pass; a private step's time.

    python -m benchmarks.cuda

Prints why and ends where there is no GPU. It has never been run on one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.features import backbone_of
from benchmarks.heads import labelled, private, units_of
from benchmarks.measure import Work, compare
from client.data.units import Units
from common.tasks import open_task

MODELS, COUNT, SIDE = ("mobilenet_v3_small", "resnet50", "vit_b_16"), 2048, 224


def eager(module: torch.nn.Module, items: torch.Tensor) -> Work:
    """The plain loop: one batch after the other from ordinary memory."""

    def work() -> None:
        with torch.inference_mode():
            for part in items.split(256):
                module(part.cuda()).cpu()

    return work


def main() -> None:
    """Extraction of three models, one private step."""
    if not torch.cuda.is_available():
        print("cuda: skipped, no GPU here", file=sys.stderr)
        return
    items = torch.randn(COUNT, 3, SIDE, SIDE)
    with tempfile.TemporaryDirectory() as name:
        for model in MODELS:
            moved = backbone_of(Path(name), model, SIDE).to(torch.device("cuda"))
            for precision, target in (("float32", 1.0), ("bfloat16", 0.6)):
                fast = moved.at(precision)  # type: ignore[arg-type]

                def encode(fast=fast) -> None:  # type: ignore[no-untyped-def]
                    for part in items.split(256):
                        fast.encode(part.pin_memory())

                compare(
                    f"{model} {precision} / eager on a GPU",
                    encode,
                    eager(moved.module, items),
                    target=target,
                    repeats=5,
                )
    x, y = labelled(1024, 1280, 100)
    task = open_task({"kind": "classification", "labels": [str(number) for number in range(100)]}, "task")
    records = units_of(x, y).tasks["task"]
    on_gpu = Units(1024, {"task": type(records)(*(value.cuda() for value in vars(records).values()))})
    head = task.head(1280)
    step, cpu = (
        private(on_gpu, {"task": task}, {"task": head.cuda()}),
        private(units_of(x, y), {"task": task}, {"task": task.head(1280)}),
    )
    compare("private step on a GPU / on the CPU, B 1024 D 1280 K 100", step, cpu, target=1.0, repeats=5)


if __name__ == "__main__":
    main()
