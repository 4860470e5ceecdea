"""Accounting, clipping and noise, which every room shares."""
