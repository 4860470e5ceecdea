"""The contract: what coordinator and site must agree on. Imports nothing of the other rooms."""
