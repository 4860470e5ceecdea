"""Experiments on one machine. `simulations.run(config)` runs one from Python."""

from simulations.experiment import run

__all__ = ["run"]
