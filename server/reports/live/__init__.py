"""A run while it goes on: its progress from its journal, and the screen that shows it."""
