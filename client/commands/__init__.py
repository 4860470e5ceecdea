"""The verbs of a site: one file is one verb, found by its name."""
