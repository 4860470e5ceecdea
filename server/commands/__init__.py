"""The verbs of the coordinator: one file is one verb, found by its name."""
