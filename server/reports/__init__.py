"""Views of a run's journal: summary, tables, progress, and the run's folder of results."""
