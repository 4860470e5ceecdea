"""Arguments and output that several verbs of the coordinator share."""
