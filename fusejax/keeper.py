"""Keeps the log of one process of a job: `python -m fusejax.keeper LOG PROCESS PROCESSES`, its input being the log.

Everything goes to the file LOG; process 0's lines go on to the terminal too, and of the others' the errors. When JAX's
runtime ends the process, because another one died, its pages of text stay in the file and one line says who it was.
It lives as long as its process: signals to the whole group do not end it.
"""

import re
import signal
import sys
from pathlib import Path

_FATAL = "Terminating process because the JAX distributed service detected fatal errors"
# What the runtime itself writes: lines of its log, of its stack traces and of its status messages.
_NOISE = re.compile(r"[EWF]\d{4} |\[Gloo\] |\*\*\* Check failure|    @ |RPC: |Additional GRPC error|:UNKNOWN:|\d+$")


def main(path: str, process: str, processes: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    text: list[str] = []
    dying = False
    with Path(path).open("a", encoding="utf-8", buffering=1) as log:
        for raw in sys.stdin.buffer:
            line = raw.decode("utf-8", "replace")
            log.write(line)
            dying = dying or "coordination_service" in line or "preemption_sync_manager" in line or _FATAL in line
            if dying:
                text.append(line)
            elif not _NOISE.match(line) and (process == "0" or line.startswith(("error:", "warning:", "Traceback"))):
                sys.stderr.write(line)
                sys.stderr.flush()
    if any(_FATAL in line for line in text):
        why = cause("".join(text))
        sys.stderr.write(
            f"error: process {process} of {processes} ends: {why}; the same command goes on from the last checkpoint "
            f"(whole log: {path})\n"
        )


def cause(text: str) -> str:
    """What the runtime's last words mean."""
    lost = re.search(r"stopped sending heartbeats\):\n((?:\S*\d+\n)+)", text)
    if lost:
        names = ", ".join(re.findall(r"(\d+)\n", lost[1]))
        return f"process {names} is gone (it sends no signs of life any more)"
    if "RegisterTask" in text:
        return "not all processes came in time"
    if "CoordinationService/Heartbeat" in text:  # its host is off, or the network to it
        return "process 0 is gone (it does not answer any more)"
    if "leader task" in text or "Socket closed" in text:
        return "process 0 is gone (its connection is closed)"
    return "another process failed"


if __name__ == "__main__":
    main(*sys.argv[1:])
