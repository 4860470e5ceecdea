"""The verbs of the simulator: one file is one verb, found by its name."""
