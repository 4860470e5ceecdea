"""A small decoder of texts, its vocabulary, and how it is decoded."""
