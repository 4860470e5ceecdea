"""A site's steps in secure sums, and what it keeps of them on its disk."""
