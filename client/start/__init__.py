"""First heads for a new site or a new task: from a finished model, a few labelled records at home, and names alone."""
