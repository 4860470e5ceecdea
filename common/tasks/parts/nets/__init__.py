"""Networks of heads that are more than one layer."""
