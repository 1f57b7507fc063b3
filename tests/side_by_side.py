"""Runs all tests that are not long, in two processes: python -m tests.side_by_side [OPTION OF PYTEST...]

Tests that start processes (`slow`) wait most of the time, and leave half of two processors idle. The others compute meanwhile, at lowest
priority, so that they change no times. Their output comes at the end. The status is the first one that is not 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

QUICK, SLOW = "not long and not slow", "not long and slow"


def main(options: list[str]) -> int:
    """Returns the status of both runs."""
    command = [sys.executable, "-m", "pytest", *options]
    quick_only = [*command, "-m", QUICK, "-p", "no:cacheprovider"]  # the other run keeps the cache
    with tempfile.TemporaryFile() as output:
        quick = subprocess.Popen(quick_only, stdout=output, stderr=subprocess.STDOUT, preexec_fn=lambda: os.nice(19))
        try:
            slow = subprocess.run([*command, "-m", SLOW], check=False)
            print("\nThe tests that start no processes, which ran beside these:", flush=True)
            quick.wait()
        finally:
            quick.kill()
            quick.wait()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return slow.returncode or quick.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
