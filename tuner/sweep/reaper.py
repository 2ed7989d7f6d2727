"""End the worker processes of a sweep that is gone: `python -m tuner.sweep.reaper MARK`.

The sweep starts it in a session of its own, beside launchers with worker processes, and holds its standard input open.
When that closes, because the sweep has ended or was killed with -9, it ends every process of this machine that has
TUNER_SWEEP=MARK in its environment.
"""

import sys
import time

import psutil

from tuner.sweep import MARK


def marked_processes(mark: str) -> list[psutil.Process]:
    """The processes with a mark, except Python's resource trackers: they clean up and then end by themselves."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and "resource_tracker" not in " ".join(process.cmdline()):
                processes.append(process)
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return processes


def end_processes(mark: str, grace: float) -> None:
    """Terminate the marked processes, and kill those that still run after `grace` seconds."""
    terminated: set[int] = set()
    deadline = time.monotonic() + grace
    while (processes := marked_processes(mark)) and time.monotonic() < deadline + 10:  # some can't be killed
        for process in processes:
            try:
                if time.monotonic() > deadline:
                    process.kill()
                elif process.pid not in terminated:
                    terminated.add(process.pid)
                    process.terminate()
            except psutil.Error:
                continue
        time.sleep(0.1)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_processes(sys.argv[1], grace=2.0)
