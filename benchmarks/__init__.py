"""Each claim of speed as a script that times its reference in the same run."""
