"""Brain MRI from the start of a process to its summary, beside the least that such a script can do.

    python -m benchmarks.cold

Five sites of 64 pictures, MobileNetV2 at 128 pixels, two tasks, ten rounds, nothing cached. The floor imports torch and
torchvision, reads the same arrays and weights, encodes in batches of 32 and trains one head with plain SGD; it has no
settings, privacy, messages or files of its own. It needs the data and weights of HEADWATER_ASSETS.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import compare
from benchmarks.memory import EXAMPLES, measure

TURNS = 3
DATA, WEIGHTS = "data/brain_mri_4class/brain_mri_128.npz", "backbones/mobilenet_v2/model.safetensors"

FLOOR = """
import sys
import numpy as np, torch, torchvision
from safetensors.torch import load_file

with np.load(sys.argv[1]) as arrays:
    train, test = torch.from_numpy(arrays["train_images"]), torch.from_numpy(arrays["test_images"])
    train_y, test_y = (torch.from_numpy(arrays[f"{part}_labels"]).long() for part in ("train", "test"))
network = torchvision.models.mobilenet_v2(weights=None)
network.load_state_dict(load_file(sys.argv[2]))
network.classifier = torch.nn.Identity()
network.eval()
mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

@torch.no_grad()
def encode(pictures):
    pictures = pictures if pictures.dim() == 4 else pictures.unsqueeze(-1).expand(*pictures.shape, 3)
    batches = (batch.permute(0, 3, 1, 2).float() / 255 for batch in pictures.split(32))
    return torch.cat([network((batch - mean) / std) for batch in batches])

features, held_out = encode(train), encode(test)
head = torch.nn.Linear(features.shape[1], 4)
for _ in range(10):
    heads = []
    for site in range(5):
        own = torch.nn.Linear(features.shape[1], 4)
        own.load_state_dict(head.state_dict())
        steps = torch.optim.SGD(own.parameters(), lr=0.1)
        for _ in range(4):
            steps.zero_grad()
            torch.nn.functional.cross_entropy(own(features[site::5]), train_y[site::5]).backward()
            steps.step()
        heads.append(own.state_dict())
    head.load_state_dict({name: torch.stack([each[name] for each in heads]).mean(0) for name in heads[0]})
print("accuracy", (head(held_out).argmax(1) == test_y).float().mean().item())
"""


def main() -> None:
    """Both in turns, after one of each that does not count."""
    assets = os.environ.get("HEADWATER_ASSETS")
    if assets is None:
        print("cold: left out without HEADWATER_ASSETS", file=sys.stderr)
        return
    given = [str(Path(assets) / DATA), str(Path(assets) / WEIGHTS)]
    sizes = [f"tasks.{task}.public_size=64" for task in ("tumour_type", "tumour")]
    changed = ["run.rounds=10", "partition.num_sites=5", "baselines=[]", *sizes]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            places = [f"cache_dir={folder}/cache", f"runs_dir={folder}/runs"]
            settings = [word for value in (*changed, *places) for word in ("--set", value)]
            measure(["-m", "simulations", "run", str(EXAMPLES / "brain_mri.yaml"), *settings])

    compare(
        "brain MRI from process start to summary / hand-written floor",
        ours,
        lambda: measure(["-c", FLOOR, *given]),
        target=1.3,
        repeats=TURNS,
        note="5 sites x 64 pictures of 128 pixels, 10 rounds, 2 tasks; the floor has one",
    )


if __name__ == "__main__":
    main()
