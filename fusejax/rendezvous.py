"""Before JAX's own start: the processes of a job meet at the coordinator's address and tell each other who they are.

So that a missing process, one too many, or one with another configuration is named in one line by all, which JAX's
runtime does not do: it ends the process. The port is free again when this is over, for JAX to take.
"""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from fusejax.errors import UserError

_RETRY_S = 0.2


def meet(address: str, n: int, process: int, timeout_s: float, about: dict[str, Any]) -> None:
    """Return when all `n` processes are there with the same `about`.

    address: HOST:PORT of process 0. Raises UserError, the same in every process that came, which names those that
    did not come within `timeout_s`, or what differs; and where the port is taken.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"distributed.coordinator: {address!r} should be HOST:PORT of process 0")
    hello = {"processes": n, "process": process, "host": socket.gethostname(), **about}
    deadline = time.monotonic() + timeout_s
    verdict = (
        _wait_for_all(int(port), n, hello, deadline) if process == 0 else _report(host, int(port), hello, deadline)
    )
    if verdict is None:
        raise UserError(
            f"process 0 of {n} did not answer at {address} within {timeout_s:g} s (this is process {process}); start "
            "all processes together, and see that distributed.coordinator is its address"
        )
    if verdict:
        raise UserError(verdict.replace("{timeout}", f"{timeout_s:g} s"))


def _wait_for_all(port: int, n: int, hello: dict[str, Any], deadline: float) -> str:
    came: dict[int, tuple[dict[str, Any], socket.socket]] = {}
    with _listening(port) as server:
        verdict = ""
        while len(came) < n - 1 and not verdict:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                other = json.loads(connection.makefile().readline())
            except TimeoutError:
                missing = [str(i) for i in range(1, n) if i not in came]
                verdict = f"process {', '.join(missing)} of {n} did not start within {{timeout}}"
                break
            except (OSError, ValueError):  # someone else's connection
                continue
            verdict = _differs(hello, other, came)
            came[int(other["process"])] = (other, connection)
        for _, connection in came.values():
            with closing(connection):
                _send(connection, {"verdict": verdict})
    return verdict


def _differs(hello: dict[str, Any], other: dict[str, Any], came: dict[int, Any]) -> str:
    who = f"process {other['process']} on {other['host']}"
    for key in hello:
        if key not in ("process", "host") and other.get(key) != hello[key]:
            return f"{who} has {key} {other.get(key)}, process 0 has {hello[key]}; they should be the same everywhere"
    if other["process"] in came or not 0 < other["process"] < hello["processes"]:
        return f"{who}: its number is taken already, or is not below {hello['processes']}"
    return ""


def _report(host: str, port: int, hello: dict[str, Any], deadline: float) -> str | None:
    """The verdict of process 0; None where it cannot be reached."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with closing(socket.create_connection((host, port), timeout=min(left, 5))) as connection:
                _send(connection, hello)
                connection.settimeout(left + 5)
                line = connection.makefile().readline()
            if line:
                return json.loads(line)["verdict"]
        except (OSError, ValueError):
            pass
        time.sleep(_RETRY_S)
    return None


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    try:
        server = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"distributed.coordinator: port {port} cannot be opened here ({error.strerror}); another job may have it: "
            "choose another port, the same for all processes"
        ) from None
    with server:
        yield server


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall((json.dumps(message) + "\n").encode())
