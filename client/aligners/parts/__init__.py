"""Parts that several aligners and the adaptation of heads share."""
