"""Parts that several kinds of source share."""
