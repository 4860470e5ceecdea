"""Privacy in every room: accounting, the lattice of exact sums, and noise."""
