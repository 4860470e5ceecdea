"""The privacy audit: attacks on a solver's real code, with synthetic records."""
