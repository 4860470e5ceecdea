"""Arguments and output that several verbs of the simulator share."""
