"""Any network in an ONNX file as a backbone: features are one of its tensors, whose others are never computed.

The graph travels as bytes among the weights. What may stand in it is a fixed list of operators, checked here and again
at each site (`common.backbones.parts.graphs.onnx_graph`); onnxruntime runs it with one thread, record by record, always
the same.

# Shapes: B records, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field

from common.backbones import Architecture, Example, Pretrained, Projection
from common.backbones.parts.graphs.reads import Reads
from common.plugins import Frozen, LocalPath, Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor


class GraphSize(Frozen):
    """Sizes of a graph; read by `resolved`, never written by hand.

    Attributes:
        num_bytes: length of the graph, which travels with the weights.
        width: number of features.
    """

    num_bytes: Annotated[int, Field(ge=1, lt=2 << 30)]
    width: Annotated[int, Field(ge=1, le=1 << 24)]


@final
class Onnx(Plugin):
    """Settings of an ONNX network.

    Attributes:
        weights: the file; weights beside it are read from its own folder.
        reads: what it reads, and how a record becomes its input.
        output: name of the tensor that holds the features; null for the file's first output.
        axis: axis of that tensor, counted with that of records, that holds features: 1 of a map B x C x H x W, -1 of
            frames B x T x D; means are taken over all others. Null keeps all numbers.
        fill: further inputs, such as a first state, and the number that each is filled with.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
        graph: sizes of the graph; filled in for the sites, never written by hand.
    """

    kind: Literal["onnx"] = "onnx"
    weights: LocalPath | None = None
    reads: Reads
    output: str | None = None
    axis: Annotated[int, Field(ge=-8, le=8)] | None = None
    fill: dict[str, float] = Field(default_factory=dict)
    projection: Projection | None = None
    graph: GraphSize | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a small convolutional graph in a file, and random series."""
        import onnx
        from onnx import helper, numpy_helper

        rng = np.random.default_rng(0)
        kernel = numpy_helper.from_array(rng.normal(size=(8, 2, 5)).astype(np.float32), "kernel")
        nodes = [
            helper.make_node("Conv", ["series", "kernel"], ["filtered"]),
            helper.make_node("Relu", ["filtered"], ["features"]),
            helper.make_node("Softmax", ["features"], ["answer"]),
        ]
        values = [helper.make_tensor_value_info("series", onnx.TensorProto.FLOAT, ["records", 2, 24])]
        answer = [helper.make_tensor_value_info("answer", onnx.TensorProto.FLOAT, ["records", 8, 20])]
        graph = helper.make_graph(nodes, "example", values, answer, [kernel])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = folder / "example.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        reads = {"series": {"length": 24, "channels": 2}}
        items = [rng.normal(size=(30, 2)).cumsum(axis=0) for _ in range(5)]
        return Example({"kind": "onnx", "weights": str(path), "reads": reads, "output": "features", "axis": 1}, items)

    def resolved(self) -> Onnx:
        """Returns settings with the graph's sizes, and without what only the file is asked for."""
        if self.graph is not None:
            return self
        gone: dict[str, Any] = {"weights": None, "output": None, "fill": {}}
        return self.model_copy(update={**gone, "graph": self._measure()})

    def architecture(self) -> Architecture:
        """Returns a network whose graph comes with the weights."""
        from common.backbones.parts.graphs.onnx_graph import OnnxNetwork

        size = self.graph or self._measure()
        return Architecture(OnnxNetwork(size.num_bytes, size.width, self.axis, self.reads.windows), size.width)

    def pretrained(self) -> Pretrained:
        """Returns the file's graph."""
        return self._hold(self._read())

    def random(self) -> Pretrained:
        """Returns the graph with random weights."""
        import torch

        from common.backbones.parts.graphs.onnx_graph import draw_graph
        from common.backbones.parts.weights import load_strict, scale_random_weights

        architecture = self.architecture()
        load_strict(architecture.module, self._hold(draw_graph(self._read())).state, "weights")
        classifier = torch.nn.Linear(architecture.feature_dim, 1)
        return scale_random_weights(architecture, classifier.weight, self.reads.draw(4))

    def preprocess(self, item: Any) -> Tensor:
        """Returns a picture, recording or series as an input. Raises BadRecord."""
        return self.reads.apply(item)

    def _read(self) -> bytes:
        from common.backbones.parts.graphs.onnx_graph import read_graph

        if self.weights is None:
            raise BadInput("weights: expected an ONNX file, got nothing")
        return read_graph(self.weights, self.output, self.fill)

    def _measure(self) -> GraphSize:
        import torch

        from common.backbones.parts.graphs.onnx_graph import measure_width

        data = self._read()
        # Callers that only ask for shapes build networks without memory.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            width = measure_width(data, self.axis, self.reads.windows, self.reads.draw(1))
        return GraphSize(num_bytes=len(data), width=width)

    @staticmethod
    def _hold(data: bytes) -> Pretrained:
        import torch

        return Pretrained({"graph": torch.frombuffer(bytearray(data), dtype=torch.uint8)})
