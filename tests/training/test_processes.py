"""Jobs of two local processes: equal to one process, named when missing, resumable on another number."""

import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from environment import on_cpus

from fusejax import alignment, config, metrics, sources
from fusejax.store import Store

STEPS = 150
RUN = "import sys; from fusejax import cli; cli.main(sys.argv[1:])"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(path, *overrides, devices=4, command="train", output=None, process=None, processes=2, port=None, code=""):
    """One process of a job in the background, its text in pipes; `code` comes before the command."""
    told = []
    if process is not None:
        told = [f"distributed.coordinator=127.0.0.1:{port}", f"distributed.processes={processes}"]
        told += [f"distributed.process={process}", "distributed.timeout_s=30"]
    output = [] if output is None else [f"output={output}"]
    return subprocess.Popen(
        [sys.executable, "-c", code + RUN, command, str(path), *told, *output, *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=on_cpus(devices),
    )  # fmt: skip


def both(path, *overrides, **options):
    """(status, text) of two processes that run together."""
    port = free_port()
    running = [start(path, *overrides, process=i, port=port, **options) for i in range(2)]
    return [(p.communicate(timeout=240)[0], p.returncode)[::-1] for p in running]


def one(path, *overrides, **options):
    process = start(path, *overrides, **options)
    out = process.communicate(timeout=240)[0]
    return process.returncode, out


@pytest.fixture
def job(make_job, tmp_path):
    """(path of the configuration, a function that copies the prepared folder and returns the copy)."""
    made = make_job(
        "prepared",
        batch={"sequences": 8, "steps": STEPS},
        optimizer={"learning_rate": 3e-3},
        loss={"weight_clm": 0.5},
        checkpoint={"every": 5},
        evaluation={"clm": False},
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
    )
    sources.run(made.model_copy(update={"mesh": config.MeshConfig()}))
    alignment.run(made)
    path = tmp_path / "job.yaml"
    path.write_text(config.dump(made))

    def copy(name):
        shutil.copytree(made.folder, tmp_path / name)
        return tmp_path / name

    return path, copy


def losses(folder):
    return np.array([row["loss"] for row in metrics.read(folder)])


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on_after_kill_and_sigterm_on_any_number(job):
    path, copy = job
    whole, two = copy("whole"), copy("two")
    code, out = one(path, devices=8, output=whole)
    assert code == 0, out

    port = free_port()
    running = [start(path, process=i, port=port, output=two) for i in range(2)]
    wait_for_step(two, 6, running)
    running[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    out = running[0].communicate(timeout=100)[0]
    assert time.monotonic() - began < 80  # distributed.timeout_s is 30
    assert running[0].returncode != 0
    assert "process 1" in out.splitlines()[-1]
    assert "the same command goes on" in out.splitlines()[-1]
    assert "Traceback" not in out

    done = len(metrics.read(two))
    port = free_port()
    running = [start(path, process=i, port=port, output=two) for i in range(2)]
    wait_for_step(two, done + 2, running)
    for process in running:
        process.send_signal(signal.SIGTERM)
    outs = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [75, 75], outs
    assert "SIGTERM at step" in outs[0]
    assert "process 0 of 2 (as told), 8 cpu devices (4, 4 by process)" in outs[0]
    assert "process 1 of 2" in (two / "logs" / "process-1.log").read_text()

    code, out = one(path, "mesh={data: 2, fsdp: 1, tensor: 1}", devices=2, output=two)
    assert code == 0, out
    assert "goes on from step" in out
    assert len(losses(two)) == len(losses(whole)) == STEPS
    np.testing.assert_allclose(losses(two), losses(whole), rtol=1e-4)

    results = both(path, "seed=5", output=two)
    assert [code for code, _ in results] == [2, 2], results
    for _, out in results:  # what process 0 found, from both
        assert f"{two}/training.json" in out.splitlines()[-1]
        assert "seed" in out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "devices"), [("process", 4), ("job", 8)])
def test_sources_of_two_processes_equal_those_of_one(job, mesh, devices):
    """Each process over its own share of the shards; or all together, a source laid out over the devices of both."""
    path, copy = job
    apart = copy("apart")
    shutil.rmtree(apart / "sources")
    # Small shards, so that both processes write some.
    code = (
        "import fusejax.sources as s; s.shard_records = lambda *_: 3; load = s.models.load\n"
        "s.models.load = lambda *a, **b: (print('over', b['mesh'].size, 'devices'), load(*a, **b))[1]\n"
    )
    results = both(path, f"cache.mesh={mesh}", command="sources", output=apart, code=code)
    assert [code for code, _ in results] == [0, 0], results
    assert f"over {devices} devices" in results[0][1]
    for label in ("coarse", "fine"):
        here, there = Store(apart / "sources" / label), Store(config.load(path).folder / "sources" / label)
        assert here.inputs == there.inputs
        assert here.n_shards == 4
        for a, b in zip(here, there, strict=True):
            assert a.keys() == b.keys()
            np.testing.assert_array_equal(a["ids"], b["ids"])
            np.testing.assert_allclose(a["logprobs"], b["logprobs"], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(a["ce"], b["ce"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_mistakes_are_one_line(job):
    path, copy = job
    results = both(path, "mesh={data: 4, fsdp: 1, tensor: 1}", output=copy("a"))
    assert all(code == 2 for code, _ in results), results
    assert "takes 4 of the 8 devices of 2 processes; it should take all" in results[0][1]
    results = both(path, "distributed.devices=16", output=copy("b"))
    assert all(code == 2 for code, _ in results), results
    assert "16 are expected, here are 8 on 2 processes" in results[0][1]
    code, out = one(path, process=0, port=free_port(), output=copy("c"))
    assert code == 2
    assert out == "error: process 1 of 2 did not start within 30 s\n"


def wait_for_step(folder, step, running, timeout=200):
    deadline = time.monotonic() + timeout
    while len(metrics.read(folder)) < step:
        ended = [process.communicate()[0] for process in running if process.poll() is not None]
        logs = {path.name: path.read_text()[-2000:] for path in (folder / "logs").glob("*")}
        assert not ended, (ended, logs)
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)
