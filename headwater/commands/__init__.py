"""The verbs of `headwater` that belong to no room: one file is one verb, found by its name."""
