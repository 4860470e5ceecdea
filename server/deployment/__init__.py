"""A federation folder and the runs in it: admitted sites, certificates, startup kits, the queue of runs."""
