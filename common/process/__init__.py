"""Shared parts of the programs of both sides: progress, error sentences, health, threads."""
