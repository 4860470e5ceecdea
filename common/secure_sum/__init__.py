"""Secure sums: a coordinator learns the sum of its sites' vectors and nothing else. See docs/secure-sum.md."""
