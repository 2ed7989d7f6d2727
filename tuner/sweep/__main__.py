"""`python -m tuner.sweep` is `tuner sweep`."""

import sys

from tuner.__main__ import run

run("sweep", sys.argv[1:])
