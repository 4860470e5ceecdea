"""Transcripts of recordings: texts as symbols, and symbols from the outputs of frames."""
