"""Measure what opening each file of a folder costs: python tests/opening_cost.py FOLDER

Prints a JSON object: for each name, the exit code, the seconds on a core and the resident memory in megabytes of a
process of its own. This script is one too, because forking a process that has loaded PyTorch takes up to a second.
"""

import json
import os
import sys
from pathlib import Path

from images import BadImage, open_picture


def opening_cost(content: bytes) -> tuple[int, float, float]:
    """Exit code, seconds on a core and megabytes of opening a file in a process of its own."""
    if not (child := os.fork()):
        try:
            open_picture(content).tobytes()
            open_picture(content, whole=True)
            os._exit(0)
        except BadImage:
            os._exit(0)
        finally:
            os._exit(1)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


if __name__ == "__main__":
    costs = {path.name: opening_cost(path.read_bytes()) for path in sorted(Path(sys.argv[1]).iterdir())}
    json.dump(costs, sys.stdout)
