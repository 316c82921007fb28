"""SIGKILL at random moments, inside a save too: what is there is whole, and the run ends with the same bits."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from environment import on_cpus

from fusejax import alignment, config, metrics, sources

RUN = "import sys; from fusejax import cli; cli.main(sys.argv[1:])"
TRIES = 10


def start(path, output):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, "train", str(path), f"output={output}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=on_cpus(),
    )  # fmt: skip


def weights(folder):
    """The bytes of the exported weights: they are those of the last checkpoint."""
    return (folder / "export" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_ten_times_equals_undisturbed(make_job, tmp_path):
    made = make_job(
        "prepared",
        batch={"sequences": 2, "steps": 120},
        checkpoint={"every": 1},
        optimizer={"learning_rate": 3e-3},
        evaluation={"clm": False},
    )
    sources.run(made)
    alignment.run(made)
    path = tmp_path / "job.yaml"
    path.write_text(config.dump(made))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(made.folder, folder)
    process = start(path, whole)
    assert process.communicate(timeout=300)[0].endswith("\n")
    assert process.returncode == 0

    draw, inside_saves, kills = random.Random(0), 0, 0
    for attempt in range(TRIES):
        before = len(metrics.read(killed))
        process = start(path, killed)
        deadline = time.monotonic() + 200
        while len(metrics.read(killed)) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        while attempt % 2 and process.poll() is None and not unfinished(killed):
            assert time.monotonic() < deadline
        inside_saves += unfinished(killed)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= TRIES // 2
    assert inside_saves >= 2
    process = start(path, killed)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    assert "goes on from step" in out
    assert metrics.read(killed) == metrics.read(whole)
    for folder in (whole, killed):
        subprocess.run([sys.executable, "-c", RUN, "export", str(path), f"output={folder}"], check=True, timeout=200)
    assert weights(killed) == weights(whole)


def unfinished(folder):
    return any("tmp" in entry.name for entry in (folder / "checkpoints").glob("*"))
