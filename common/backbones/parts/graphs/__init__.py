"""Networks that come as graphs in a file: what they read, which of their steps are allowed, and how they are run."""
