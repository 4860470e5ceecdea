"""Parts that several formats share, and files that are copied into what is exported."""
