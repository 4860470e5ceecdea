"""Programs that are copied into what is exported; they import nothing of Headwater and need no type."""
