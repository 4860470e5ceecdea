"""Everything that happens to a deployment in hospitals, done to three real sites and a real coordinator on loopback.

    python -m benchmarks.faults [--keep FOLDER] [ROW ...]

One federation serves all rows; each row does one thing to a run and looks at the end of it. After each: no traceback in
a log, every reply that left is charged, the heads of every run that ended replay from the replies that the sites keep.
"""

from benchmarks.faults import clocks, copies, disks, files, network, processes, strangers
from benchmarks.faults.parts import ROWS

__all__ = ["ROWS", "clocks", "copies", "disks", "files", "network", "processes", "strangers"]
