"""Parts that several kinds of backbone share."""
