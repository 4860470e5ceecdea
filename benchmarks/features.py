"""Encoding records once: the site's way beside the plain eager loop and onnxruntime, and what a restart reads.

    python -m benchmarks.features

A pass has 4000 images, 3 x 96 x 96, mobilenet_v3_small. The network's weights are random: no time depends on them.
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchvision import models

from benchmarks.measure import Work, compare, seconds_of
from client.data.feature_store import FeatureStore
from client.data.sources import SourceRecord
from common.model.backbones import Backbone, open_pretrained
from common.process.threads import kept_memory, one_thread

COUNT, SIDE = 4000, 96
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ready:
    """A source of images that are inputs already: loading and preprocessing are the same for all ways."""

    items: torch.Tensor
    name: str = "ready"

    def digest(self) -> str:
        """Not of the content: each store here is new."""
        return self.name

    def index(self) -> list[SourceRecord]:
        """One record for each image."""
        return [SourceRecord(row + 1, self.name, str(row), None, None, {}) for row in range(len(self.items))]

    def load(self, position: int) -> Any:
        """The image."""
        return self.items[position]


@dataclass(frozen=True)
class AsTheyAre:
    """A backbone whose inputs come ready."""

    inner: Backbone

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def to(self, device: torch.device) -> AsTheyAre:
        """On a device."""
        return AsTheyAre(self.inner.to(device))

    def at(self, precision: Any) -> AsTheyAre:
        """In a precision."""
        return AsTheyAre(self.inner.at(precision))

    def preprocess(self, item: torch.Tensor) -> torch.Tensor:
        """The item."""
        return item


def backbone_of(folder: Path, model: str = "mobilenet_v3_small", side: int = SIDE) -> Backbone:
    """A torchvision backbone with random weights from a file."""
    path = folder / f"{model}.safetensors"
    torch.manual_seed(0)
    save_file(models.get_model(model, weights=None).state_dict(), path)
    preprocess = {"resize": side, "crop": None, "mean": [0.5] * 3, "std": [0.25] * 3}
    spec = {"kind": "torchvision", "model": model, "weights": str(path), "preprocess": preprocess}
    return open_pretrained(spec, "backbone")


def eager(backbone: Backbone, items: torch.Tensor, batch: int = 100) -> Work:
    """The plain loop: the module as it is, NCHW, float32, in its best batch, on all cores or one, as is faster."""

    def work() -> None:
        with torch.inference_mode():
            for part in items.split(batch):
                backbone.module(part)

    def alone() -> None:
        with one_thread():
            work()

    return min(work, alone, key=lambda way: min(seconds_of(way) for _ in range(3)))


def store(backbone: Backbone, items: torch.Tensor, folder: Path, precision: Any = "float32") -> Work:
    """A site's pass: a new store, the memory-mapped file included."""

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            FeatureStore(Path(place)).open_or_encode(
                Ready(items),
                AsTheyAre(backbone),
                device=CPU,
                precision=precision,  # type: ignore[arg-type]
            )

    return work


def run_onnx(backbone: Backbone, items: torch.Tensor) -> Work:
    """Exports the network once and returns its pass by onnxruntime on one thread."""
    import onnxruntime

    exported = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(backbone.module, (items,), exported, input_names=["items"], dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(exported.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"items": items.numpy()})


def compare_onnx(folder: Path) -> None:
    """A batch of 8 pictures of 224 x 224 pixels on one thread, in seconds of the processor."""
    items = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for model in ("mobilenet_v2", "resnet18", "vit_b_16"):
        backbone = backbone_of(folder, model, 224)
        reference = run_onnx(backbone, items)
        with one_thread(), kept_memory():
            compare(
                f"batch of {model} / onnxruntime",
                lambda backbone=backbone: backbone.encode_items(items),  # type: ignore[misc]
                reference,
                target=1.2,
                repeats=5,
                clock=time.process_time,
            )


def main() -> None:
    """Both precisions, the features' difference, another runtime, and a restart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = backbone_of(folder)
        items = torch.randn(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        reference, passes = eager(backbone, items), store(backbone, items, folder)
        backbone.encode(items[:4])
        note = f"relative difference of features {backbone.error:.1e}"
        compare("feature pass float32 / eager NCHW", passes, reference, target=0.6, repeats=5, note=note)
        compare_onnx(folder)
        half = backbone.at("bfloat16")
        half.encode(items[:4])
        note = f"relative difference of features {half.error:.1e}"
        compare(
            "feature pass bfloat16 / eager NCHW",
            store(backbone, items, folder, "bfloat16"),
            reference,
            target=0.45,
            repeats=5,
            note=note,
        )
        kept = FeatureStore(folder / "kept")
        source, ready = Ready(items), AsTheyAre(backbone)

        def restart() -> None:
            kept.open_or_encode(source, ready, device=CPU).features_ND.sum()  # type: ignore[arg-type]

        restart()
        compare("restart / feature pass", restart, passes, target=0.02, repeats=3)


if __name__ == "__main__":
    main()
