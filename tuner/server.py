"""Serve a database of studies to workers that do not reach it: `python -m tuner.server --storage URL`."""

import logging
import os
import socket
import threading
import warnings

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, run_grpc_proxy_server

from tuner import InputError, arguments, terminal
from tuner.rules import POSITIVE
from tuner.sweep import passwords, storage

log = logging.getLogger("tuner.server")
PORTS = 65535


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    args = arguments.server().parse_args()
    POSITIVE.check("--every", args.every)
    if not 1 <= args.port <= PORTS:
        raise InputError(f"--port {args.port} must be from 1 to {PORTS}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec = storage.resolve(args.storage)
    if spec is None or spec.startswith(storage.JOURNAL):
        raise InputError(f"--storage {args.storage} is no database, which Optuna's proxy needs")
    where = f"grpc://{args.host}:{args.port}"
    try:
        socket.create_server((args.host, args.port)).close()  # gRPC would share a port that is taken
    except OSError as error:
        raise InputError(f"cannot listen at {where}: {error}; choose another --host or --port") from error
    store = storage.connect(spec)
    ended = threading.Event()
    threading.Thread(target=_tell, args=(store, where, ended, args.every), daemon=True).start()
    try:
        log.info("serving %s at %s", passwords.redacted(spec), where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # the user chose it by name
            run_grpc_proxy_server(store, host=args.host, port=args.port)
    except KeyboardInterrupt:
        os._exit(terminal.INTERRUPTED)  # gRPC's threads may wait for a client, and Python for them
    finally:
        ended.set()


def _tell(store: BaseStorage, where: str, ended: threading.Event, seconds: float) -> None:
    """Log how the database is, again and again."""
    while not ended.wait(seconds):
        try:
            count = len(store.get_all_studies())
        except Exception as error:  # noqa: BLE001 - whatever the database raises: it is told, and asked again
            log.warning("%s: the database does not answer: %s", where, error)
        else:
            log.info("%s: the database answers; %d stud%s", where, count, "y" if count == 1 else "ies")


if __name__ == "__main__":
    terminal.command(main)
