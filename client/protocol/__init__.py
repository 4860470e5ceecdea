"""The answers of a site, from the offer of a run to its final heads: join, prepare, train, evaluate."""
