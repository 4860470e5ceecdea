"""Federations on one machine: a run, a partition of a data set into sites, and an executor."""
