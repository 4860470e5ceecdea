"""The whole private run beside what users would otherwise write: Flower on Ray with Opacus in the client.

    python -m benchmarks.flower_opacus

All ways begin in a cold process, with 10 sites x 1000 images (`--images`), 3 x 96 x 96, mobilenet_v3_small, a linear
head of 8 classes, 10 rounds of 16 steps on Poisson samples of 125. Ours is `python -m simulations run` with nothing
cached.

The reference is written after Flower's own example with Opacus, with care for time: the backbone is frozen, in eval
mode and without autograd; Opacus wraps the head alone; inputs are decoded once and stay in memory; two actors share two
cores, one thread each, which Ray chooses itself. With `cached`, each client keeps its features on disk and encodes
in the first round only. It has no ledger, and its noise is a given number: nothing is accounted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import stated
from benchmarks.workload import CLASSES, POISSON, ROUNDS, SITES, STEPS, simulation

REFERENCE = """
import sys, time, warnings
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

folder, images, sites, rounds, steps, classes, cached = sys.argv[1], *map(int, sys.argv[2:8])
client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    import torch
    from opacus import PrivacyEngine
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from safetensors.torch import load_file
    from torchvision import models
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    site = int(context.node_config["partition-id"])
    net = models.mobilenet_v3_small(weights=None)
    net.load_state_dict(load_file(folder + "/net.safetensors"))
    net.classifier = nn.Identity()
    net.eval().requires_grad_(False)
    kept = Path(folder) / f"features-{site}.npy"
    own = slice(site * images, (site + 1) * images)
    labels = torch.from_numpy(np.load(folder + "/labels.npy")[own])
    if cached and kept.exists():
        inputs = torch.from_numpy(np.load(kept))
    else:
        pixels = torch.from_numpy(np.load(folder + "/pixels.npy", mmap_mode="r")[own])
        inputs = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)
        if cached:
            with torch.no_grad():
                inputs = torch.cat([net(part) for part in inputs.split(100)])
            np.save(kept, inputs.numpy())
    head = nn.Linear(576, classes)
    head.load_state_dict(message.content["head"].to_torch_state_dict())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=max(1, images // 8))
    head, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=head, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    done = 0
    while done < steps:
        for batch, truth in loader:
            optimizer.zero_grad()
            if not cached:
                with torch.no_grad():
                    batch = net(batch)
            nn.functional.cross_entropy(head(batch), truth).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return Message(RecordDict({"head": ArrayRecord(head._module.state_dict())}), reply_to=message)

@server.main()
def main(grid, context):
    import torch
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.1)
    head = torch.nn.Linear(576, classes).state_dict()
    for number in range(rounds):
        content = RecordDict({"head": ArrayRecord(head)})
        sent = [Message(content, node, "train", group_id=str(number)) for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(sent))
        assert len(replies) == sites and not any(reply.has_error() for reply in replies), replies[0]
        states = [reply.content["head"].to_torch_state_dict() for reply in replies]
        head = {name: torch.stack([state[name] for state in states]).mean(0) for name in head}
    Path(folder, "done").write_text("yes")

run_simulation(server, client, num_supernodes=sites, backend_config={
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"include_dashboard": False}})
"""


def seconds_of(command: list[str], folder: Path) -> float:
    """Returns the seconds of a cold process, its imports included."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **quiet, "FLWR_HOME": str(folder)}
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, timeout=900, capture_output=True)
    return time.perf_counter() - started


def reference(folder: Path, images: int, *, cached: bool) -> float:
    """Seconds of Flower's engine with Opacus in its clients."""
    for left in folder.glob("features-*.npy"):
        left.unlink()
    (folder / "done").unlink(missing_ok=True)
    numbers = [images, SITES, ROUNDS, STEPS, CLASSES, int(cached)]
    seconds = seconds_of([sys.executable, "-c", REFERENCE, str(folder), *map(str, numbers)], folder)
    assert (folder / "done").exists(), "the reference did not finish"
    return seconds


def ours(folder: Path) -> float:
    """Seconds of our command, with a new cache each time."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        changed = ["--set", f"cache_dir={place}/cache", "--set", f"runs_dir={place}/runs"]
        command = [sys.executable, "-m", "simulations", "run", str(folder / "simulation.yaml"), *changed]
        return seconds_of(command, folder)


def main() -> None:
    """Both references, one after the other, ours before and after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="of each site")
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulation(folder, images, POISSON)
        with np.load(folder / "images.npz") as arrays:
            np.save(folder / "pixels.npy", arrays["train_x"])
            np.save(folder / "labels.npy", np.unique(arrays["train_y"], return_inverse=True)[1])
        note = f"cold processes; 10 sites x {images} images, 10 rounds x 16 steps"
        for what, cached, target in (("cached features", True, 1 / 3), ("whole model in the client", False, 1 / 15)):
            first = ours(folder)
            theirs = reference(folder, images, cached=cached)
            seconds = (first + ours(folder)) / 2
            stated(
                f"private run / Flower + Opacus, {what}", seconds, theirs, target=round(target, 4), repeats=1, note=note
            )


if __name__ == "__main__":
    main()
