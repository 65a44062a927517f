"""The other processes of a run: when one of them ends before its time, this one ends too, with a line.

Devices wait for those of a dead process until JAX misses its heartbeats, for 100 seconds, and aborts. The operating
system is faster: it closes the connections of a process in the moment in which that dies. So each process holds one to
the first, on the port behind the coordinator's.
"""

import atexit
import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax

_BYE = b"."
"""What a process sends that ends in its time."""
_JOINING, _AGAIN = 60.0, 0.1
"""Seconds: in which all must have a connection, after they have joined; from one try to the next."""
_FAREWELL = 2.0
"""Seconds that the first process stays after an error: with it goes what JAX holds the others by, and they abort."""
_connections: list[socket.socket] = []
_leaving = threading.Lock()


def watch(line: Callable[[], str]) -> None:
    """From now on this process ends with a line as soon as another one dies, or leaves with an error.

    Args:
      line: what to print; asked for in that moment.

    Raises:
      ValueError: the port is taken, or the first process cannot be reached there.
    """
    if jax.process_count() == 1:
        return
    host, _, number = os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")
    port = int(number) + 1
    try:
        _connections.extend(_accepted(port) if jax.process_index() == 0 else [_connected(host, port)])
    except OSError as error:
        what = f"processes watch each other on port {port} of {host}, one above JAX_COORDINATOR_ADDRESS"
        raise ValueError(f"{what}: {error}") from error
    atexit.register(_say_goodbye)
    threading.Thread(target=_listen, args=(line,), daemon=True).start()


def leave(code: int, line: str = "") -> None:
    """Ends this process at once, with a line, where it is one of several; does nothing where it is alone.

    An orderly end waits for the others, and they cannot come where one of them is dead or waits for this one.
    """
    if not jax.distributed.is_initialized():
        return
    _leaving.acquire()  # for ever: who comes second has nothing to add
    print(line, end="\n" if line else "", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with contextlib.suppress(Exception):  # whatever is broken, this process ends
        for one in _connections:
            one.shutdown(socket.SHUT_RDWR)
        time.sleep(_FAREWELL if jax.process_index() == 0 else 0)
    os._exit(code)


def _accepted(port: int) -> list[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
        server.settimeout(_JOINING)
        return [server.accept()[0] for _ in range(jax.process_count() - 1)]


def _connected(host: str, port: int) -> socket.socket:
    until = time.monotonic() + _JOINING
    while True:
        try:
            return socket.create_connection((host.strip("[]"), port), timeout=_JOINING)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(_AGAIN)


def _listen(line: Callable[[], str]) -> None:
    open_ = list(_connections)
    while open_:
        for one in select.select(open_, [], [])[0]:
            if _received(one) != _BYE:
                leave(1, line())
            open_.remove(one)


def _received(one: socket.socket) -> bytes:
    try:
        return one.recv(1)
    except OSError:
        return b""


def _say_goodbye() -> None:
    for one in _connections:
        with contextlib.suppress(OSError):
            one.sendall(_BYE)
