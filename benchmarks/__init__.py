"""Each claim of speed as a script that times its reference in the same run.

A package of its own: opacus installs another `benchmarks`, which would stand before a folder without this file.
"""
