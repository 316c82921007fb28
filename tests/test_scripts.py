"""scripts/slurm.sh with stand-ins for Slurm's commands: what it runs, and when it has the job queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/slurm.sh"
SRUN = """#!/bin/bash
echo "srun $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES" >> "$CALLS"
trap 'exit 75' TERM
echo $$ > "$CALLS.pid"
[ -z "$STATUS" ] || exit "$STATUS"
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo node7 && exit
echo "scontrol $*" >> "$CALLS"
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$CALLS"
kill -TERM "$(cat "$CALLS.pid")"
"""


def run(tmp_path, status="", number=None, **more):
    """(exit status, the commands that it called)."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "STATUS": status,
        "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "16", **more,
    }  # fmt: skip
    process = subprocess.Popen(["bash", str(SCRIPT), "job.yaml"], env=environment)
    deadline = time.monotonic() + 20
    while number is not None and not (tmp_path / "calls.pid").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number is not None:
        process.send_signal(number)
    return process.wait(20), calls.read_text().splitlines()


QUEUED = "scontrol requeue 42"
SAVED = "scancel --signal=TERM 42.0"


@pytest.mark.parametrize(
    ("status", "more", "wanted"),
    [
        ("0", {}, []),
        ("2", {}, []),
        ("1", {}, []),
        ("75", {}, [QUEUED]),
        ("75", {"SLURM_RESTART_COUNT": "10"}, []),
        ("137", {}, [QUEUED]),
        ("134", {"SLURM_RESTART_COUNT": "10"}, []),
    ],
)
def test_what_is_queued_again(tmp_path, status, more, wanted):
    code, calls = run(tmp_path, status, **more)
    assert code == int(status)
    assert calls == ["srun node7:20042 16", *wanted]


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGUSR1, [SAVED, QUEUED]), (signal.SIGTERM, [SAVED])])
def test_a_signal_saves_and_only_the_end_of_its_time_queues_again(tmp_path, number, wanted):
    code, calls = run(tmp_path, number=number, SLURM_RESTART_COUNT="99")
    assert code == 75
    assert calls[1:] == wanted
