"""One site: the only code that may see a record."""
