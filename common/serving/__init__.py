"""A finished model as files: heads, the backbone below them, and what a user must know of both; free of Flower."""
