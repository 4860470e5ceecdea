"""Tables of spreadsheet programs, and numbers as they write them."""
