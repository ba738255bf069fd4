"""`phijax preflight` in which one process misbehaves: preflight_child.py SCENARIO FLAGS."""

import sys
import time

from phijax import preflight
from phijax.parallel import processes
from phijax.readiness import probes


def hangs_in_all_reduce():
    """As a host does whose chips are stuck: it comes to the check, and never out of it."""
    honest = probes.all_reduce

    def all_reduce(devices):
        if processes.announced("preflight at all-reduce") and "--process_id=1" in sys.argv:
            time.sleep(600)
        return honest(devices)

    probes.all_reduce = all_reduce


def never_comes_to_storage():
    honest = probes.all_reduce

    def all_reduce(devices):
        found = honest(devices)
        if "--process_id=1" in sys.argv:
            time.sleep(600)
        return found

    probes.all_reduce = all_reduce


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    preflight.entry()
