"""From a source's records to rows of features: batches of one shape, and an array that is written block by block."""
