"""`python -m tuner.sweep.reaper MARK`: wait until standard input ends, with whoever holds its other end; then end every
process of this machine that has TUNER_SWEEP=MARK in its environment.

The sweep starts it, in a session of its own, beside launchers that have worker processes. It outlives a sweep that is
killed with -9, and the workers don't.
"""

import sys
import time

import psutil

from tuner.sweep import MARK


def marked(mark: str) -> list[psutil.Process]:
    """The processes that carry a mark, but for Python's resource trackers: these tidy up and end after the others."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and "resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended, or is another user's
            continue
    return found


def reap(mark: str, grace: float) -> None:
    """Ask the marked processes to end, and after `grace` seconds make them."""
    asked: set[int] = set()
    deadline = time.monotonic() + grace
    while (processes := marked(mark)) and time.monotonic() < deadline + 10:  # some can't be killed
        for process in processes:
            try:
                if time.monotonic() > deadline:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
            except psutil.Error:
                continue
        time.sleep(0.1)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    reap(sys.argv[1], grace=2.0)
