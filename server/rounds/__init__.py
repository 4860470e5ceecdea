"""One run, seen from the coordinator: join, rounds, evaluation, final heads."""
