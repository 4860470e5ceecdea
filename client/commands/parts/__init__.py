"""Arguments and output that several verbs of a site share."""
