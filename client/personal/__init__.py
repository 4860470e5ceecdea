"""Heads that a site trains alone and never sends, and their comparison with the federated ones."""
