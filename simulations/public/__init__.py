"""Parts of a backbone that are made of public records, before any run."""
