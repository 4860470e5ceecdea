"""The coordinator: the only code that sees many sites; it cannot import a data reader."""
