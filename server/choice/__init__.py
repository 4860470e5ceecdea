"""The choice of a backbone at the coordinator: what was chosen of which candidates, and its table."""
