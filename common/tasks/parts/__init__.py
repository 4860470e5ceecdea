"""Parts that several kinds of task share."""
