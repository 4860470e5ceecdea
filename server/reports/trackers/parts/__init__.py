"""Parts that all trackers share: the points of a journal, and the thread that follows it."""
