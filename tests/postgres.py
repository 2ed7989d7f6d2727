"""A server of PostgreSQL for tests of sweeps."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Server:
    """PostgreSQL on loopback, with a data folder of its own."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        made = subprocess.check_output(["runuser", "-u", "postgres", "--", "mktemp", "-d"], text=True)
        self.data = Path(made.strip())
        self.control("initdb", "--auth=trust", "--no-locale", "--encoding=UTF8")

    def control(self, program: str, *arguments: str) -> None:
        command = ["runuser", "-u", "postgres", "--", str(POSTGRES[-1] / program), "-D", str(self.data), *arguments]
        clean = {"PATH": os.environ["PATH"]}  # it is not a process of the toy
        subprocess.run(command, check=True, cwd="/", env=clean, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.data}"
        self.control("pg_ctl", "-w", "-o", options, "-l", f"{self.data}/log", "start")

    def stop(self) -> None:
        self.control("pg_ctl", "-m", "immediate", "stop")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres:secret@127.0.0.1:{self.port}/postgres"


@pytest.fixture
def server():
    if not POSTGRES or not shutil.which("runuser"):
        pytest.skip("needs Debian's package postgresql, which .ci/run installs")
    it = Server()
    it.start()
    yield it
    it.stop()
    shutil.rmtree(it.data)


@pytest.fixture
def postgresql(server):
    """URL of a server."""
    return server.url
