"""`torch`: the network as a program of `torch.export`, which torch alone loads and runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from common.files import write_atomic
from common.plugins import Plugin

if TYPE_CHECKING:
    from common.exports.parts.exported import Exported

_LOADER = '''"""Loads the exported network; needs torch only. Inputs and outputs are described in preprocessing.json."""

from pathlib import Path

import torch

network = torch.export.load(Path(__file__).parent / "model.pt2").module()

if __name__ == "__main__":
    {example}
    print(network({names}))
'''


@final
class TorchFormat(Plugin):
    """A `.pt2` file and the lines that load it."""

    kind: Literal["torch"] = "torch"
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    one_task: ClassVar[bool] = False
    library: ClassVar[str] = "pytorch"

    def write(self, exported: Exported, folder: Path) -> list[str]:
        """Writes `model.pt2` and `load.py`."""
        import io

        import torch

        from common.exports.parts.program import trace

        # Through memory: torch's own error where a disk is full is no sentence.
        content = io.BytesIO()
        torch.export.save(trace(exported), content)
        write_atomic(folder / "model.pt2", content.getvalue())
        examples = [
            f"{tensor.name} = torch.zeros({[2, *(8 if isinstance(axis, str) else axis for axis in tensor.shape)]}, "
            f"dtype=torch.{tensor.dtype})"
            for tensor in exported.raw.tensors
        ]
        names = ", ".join(tensor.name for tensor in exported.raw.tensors)
        loader = _LOADER.format(example="\n    ".join(examples), names=names)
        write_atomic(folder / "load.py", loader.encode())
        exported.write_readers(folder)
        outputs = ", ".join(exported.tasks)
        return [
            '`model.pt2`: `torch.export.load("model.pt2").module()` is a module from '
            f"`{names}` to the outputs of {outputs}; torch is all it needs.",
            "`python load.py` loads it, and runs it on two empty records; it takes no argument.",
            *(["`boxes.find_boxes(maps, stated)`: a picture's boxes; numpy is all it needs."] * exported.has_boxes),
            *(["`written.read_text(told, stated)`: a record's text and its confidence."] * exported.has_texts),
        ]
