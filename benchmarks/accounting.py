"""Times the accounting of a run.

python -m benchmarks.accounting
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.measure import stated
from benchmarks.sites import simulation
from common.privacy import accounting
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
    accounting._calibrated.cache_clear()
    accounting._loose_epsilon.cache_clear()
    accounting._epsilon.cache_clear()
    started = time.perf_counter()
    sigma = accounting.calibrate_noise_multiplier(3.0, 1e-5, 1.0, 2 * ROUNDS)
    charge = accounting.Mechanism("gaussian", sigma, 1.0, 2, 1.0)
    for _ in range(SITES):
        for done in range(ROUNDS + 1):
            accounting.is_covered([charge] * done, 1e-5, 10.0)
    spent = time.perf_counter() - started
    stated("accounting / whole run", spent, whole, target=0.01, repeats=1, note="10 sites, 10 rounds, full batch")


if __name__ == "__main__":
    main()
