"""Times the accounting of a run.

python -m benchmarks.accounting
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.measure import stated
from benchmarks.sites import simulation
from common.privacy.accounting import Mechanism
from common.privacy.filters import calibrate_noise_multiplier, choose_filter
from simulations.experiment import run

SITES, ROUNDS, DIM, CLASSES = 10, 10, 576, 8


def main() -> None:
    """Every composition and calibration of a run, again from nothing, beside the whole run."""
    with tempfile.TemporaryDirectory() as name:
        config = simulation(Path(name), SITES, ROUNDS, dim=DIM, classes=CLASSES)
        run(config)  # Imports are not accounting.
        started = time.perf_counter()
        run(config)
        whole = time.perf_counter() - started
    started = time.perf_counter()
    charge = Mechanism("gaussian", calibrate_noise_multiplier(3.0, 1e-5, 1.0, 2 * ROUNDS), 1.0, 2, 1.0)
    for _ in range(SITES):
        for done in range(ROUNDS + 1):
            choose_filter(charge, None, 10.0, 1e-5).covers([charge] * done)
    spent = time.perf_counter() - started
    stated("accounting / whole run", spent, whole, target=0.01, repeats=1, note="10 sites, 10 rounds, full batch")


if __name__ == "__main__":
    main()
