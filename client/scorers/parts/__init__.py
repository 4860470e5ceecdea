"""Shared parts of scorers: rows from records, and the vote of a site."""
