"""Parts that several aggregators share."""
