"""A process that sets clocks as an agent does: argv is the job's name and `UUID=MHZ` of each clock. It prints a line when they are set,
the pid of its guardian in it, and then waits."""

from __future__ import annotations

import json
import os
import sys
import time

from elastic.power.clocks import Clocks
from elastic.settings import clocks_directory, power_socket


def main() -> None:
    clocks = Clocks(sys.argv[1], clocks_directory(), power_socket())
    for word in sys.argv[2:]:
        uuid, _, mhz = word.partition("=")
        clocks.lock(uuid, int(mhz), [os.getpid()])
    guardian = clocks._guardian
    print(json.dumps({"guardian": None if guardian is None else guardian.pid}), flush=True)
    for line in sys.stdin:
        if line.strip() == "close":
            print(json.dumps(clocks.close()), flush=True)
            return
        if clocks.lost:
            clocks.renew()
            print(json.dumps({"guardian": clocks._guardian.pid if clocks._guardian else None, "restored": clocks.restored}), flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main()
