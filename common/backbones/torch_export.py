"""Any network that torch.export has saved as a backbone: one's own architecture, without a file of Python at the sites.

The graph travels as a list of torch's own operators, its weights as plain numbers, both among the weights. What may
stand in it is a fixed list of operators, checked here and again at each site (`common.backbones.parts.graphs.program`);
nothing is unpickled, evaluated or imported, and torch runs the operators one after the other, record by record.

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


class ProgramSize(Frozen):
    """Sizes of a program; read by `resolved`, never written by hand.

    Attributes:
        program_bytes: length of the list of operators.
        tensor_bytes: length of the tensors that they read.
        width: number of features.
    """

    program_bytes: Annotated[int, Field(ge=1, lt=1 << 28)]
    tensor_bytes: Annotated[int, Field(ge=1, lt=2 << 30)]
    width: Annotated[int, Field(ge=1, le=1 << 24)]


@final
class TorchExport(Plugin):
    """Settings of an exported network.

    Attributes:
        weights: the file (`.pt2`), saved by `torch.export.save`.
        reads: what it reads, and how a record becomes its one input; its batch is one record, or free.
        output: name of the value that holds the features, as the printed graph has it; null for the first output.
        axis: axis of that value, counted with that of records, that holds features: 1 of a map B x C x H x W, -1 of
            positions B x T x D; means are taken over all others. Null keeps all numbers.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
        graph: sizes of the program; filled in for the sites, never written by hand.
    """

    kind: Literal["torch_export"] = "torch_export"
    weights: LocalPath | None = None
    reads: Reads
    output: str | None = None
    axis: Annotated[int, Field(ge=-8, le=8)] | None = None
    projection: Projection | None = None
    graph: ProgramSize | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a small recurrent net of series, exported with random weights, and random series."""
        import torch
        from torch import nn

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv1d(2, 8, 5), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Conv1d(8, 6, 3))
            path = folder / "example.pt2"
            program = torch.export.export(net.eval(), (torch.randn(1, 2, 24),))
            torch.export.save(program, path)
        rng = np.random.default_rng(0)
        reads = {"series": {"length": 24, "channels": 2}}
        items = [rng.normal(size=(30, 2)).cumsum(axis=0) for _ in range(5)]
        return Example({"kind": "torch_export", "weights": str(path), "reads": reads, "axis": 1}, items)

    def resolved(self) -> TorchExport:
        """Returns settings with the program's sizes, and without what only the file is asked for."""
        if self.graph is not None:
            return self
        return self.model_copy(update={"weights": None, "output": None, "graph": self._measure()})

    def architecture(self) -> Architecture:
        """Returns a network whose program comes with the weights."""
        from common.backbones.parts.graphs.program import ProgramNetwork

        size = self.graph or self._measure()
        windows = self.reads.windows
        network = ProgramNetwork(size.program_bytes, size.tensor_bytes, size.width, self.axis, windows=windows)
        return Architecture(network, size.width)

    def pretrained(self) -> Pretrained:
        """Returns the file's program and tensors."""
        return _hold(*self._read())

    def random(self) -> Pretrained:
        """Returns the program with random tensors."""
        import torch

        from common.backbones.parts.graphs.exported import draw_tensors
        from common.backbones.parts.weights import load_strict, scale_random_weights

        program, tensors = self._read()
        architecture = self.architecture()
        load_strict(architecture.module, _hold(program, draw_tensors(program, tensors)).state, "weights")
        classifier = torch.nn.Linear(architecture.feature_dim, 1)
        return scale_random_weights(architecture, classifier.weight, self.reads.draw(4))

    def preprocess(self, item: Any) -> Tensor:
        """Returns a picture, recording, series or scan as an input. Raises BadRecord."""
        return self.reads.apply(item)

    def _read(self) -> tuple[bytes, Tensor]:
        from common.backbones.parts.graphs.exported import read_exported

        if self.weights is None:
            raise BadInput("weights: expected a file that torch.export.save wrote, got nothing")
        return read_exported(self.weights, self.output)

    def _measure(self) -> ProgramSize:
        import torch

        from common.backbones.parts.graphs.program import ProgramNetwork

        # Callers that only ask for shapes build networks without memory.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            program, tensors = self._read()
            network = ProgramNetwork(len(program), len(tensors), 0, self.axis, windows=self.reads.windows)
            network.load_state_dict(dict(_hold(program, tensors).state))
            width = int(network(self.reads.draw(1)).shape[1])
        return ProgramSize(program_bytes=len(program), tensor_bytes=len(tensors), width=width)


def _hold(program: bytes, tensors: Tensor) -> Pretrained:
    import torch

    return Pretrained({"program": torch.frombuffer(bytearray(program), dtype=torch.uint8), "tensors": tensors})
