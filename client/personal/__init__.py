"""What stays at a site: heads it trains alone, and how the federated ones compare."""
