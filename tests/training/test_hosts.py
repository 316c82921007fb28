"""Two hosts, each a network namespace with a name of its own and one cable between them (Linux, as root)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from environment import on_cpus

from fusejax import alignment, config, metrics, sources

RUN = "import sys; from fusejax import cli; cli.main(sys.argv[1:])"
ADDRESSES = ["10.213.0.1", "10.213.0.2"]
TIMEOUT_S = 20


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def hosts(tmp_path):
    """The two namespaces' names; the first one's end of the cable is `cable`."""
    names = [f"fusejax-{os.getpid()}-{i}" for i in range(2)]
    tables = [Path("/etc/netns", name) for name in names]
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        if "not permitted" not in error.stderr and "denied" not in error.stderr:  # anything else is a fault
            raise
        pytest.skip(f"a container without the right to make network namespaces: {error.stderr}")
    try:
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address, table in zip(names, ADDRESSES, tables, strict=True):
            table.mkdir(parents=True)
            (table / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"{a} host-{i}\n" for i, a in enumerate(ADDRESSES))
            )
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name, table in zip(names, tables, strict=True):
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=20)
            shutil.rmtree(table, ignore_errors=True)


def start(hosts, process, path, output):
    """Process `process` of the job, on its host, with two devices."""
    told = {
        "JAX_COORDINATOR_ADDRESS": f"{ADDRESSES[0]}:12345", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process),
    }  # fmt: skip
    named = ["unshare", "--uts", "sh", "-c", f'hostname host-{process} && exec "$@"', "sh"]
    command = [sys.executable, "-c", RUN, "train", str(path), f"output={output}", f"distributed.timeout_s={TIMEOUT_S}"]
    return subprocess.Popen(
        ["ip", "netns", "exec", hosts[process], *named, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=on_cpus(2, **told),
    )  # fmt: skip


@pytest.mark.slow
def test_two_hosts_equal_one_and_a_cut_cable_ends_both(hosts, make_job, tmp_path):
    made = make_job(
        "prepared",
        batch={"sequences": 4, "steps": 150},
        checkpoint={"every": 5},
        evaluation={"clm": False},
        mesh={"data": 2, "fsdp": 2},
    )
    sources.run(made.model_copy(update={"mesh": config.MeshConfig()}))
    alignment.run(made)
    path = tmp_path / "job.yaml"
    path.write_text(config.dump(made))
    whole, two = tmp_path / "whole", tmp_path / "two"
    for folder in (whole, two):
        shutil.copytree(made.folder, folder)
    subprocess.run(
        [sys.executable, "-c", RUN, "train", str(path), f"output={whole}"], check=True, timeout=240, env=on_cpus(4)
    )

    running = [start(hosts, i, path, two) for i in range(2)]
    deadline = time.monotonic() + 200
    while not metrics.read(two):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in running), [p.communicate()[0] for p in running]
        time.sleep(0.05)
    ip("-n", hosts[0], "link", "set", "cable", "down")
    began = time.monotonic()
    outs = [process.communicate(timeout=3 * TIMEOUT_S)[0] for process in running]
    assert time.monotonic() - began < 1.5 * TIMEOUT_S
    assert all(process.returncode != 0 for process in running)
    assert "process 1 is gone" in outs[0].splitlines()[-1]
    assert "process 0 is gone" in outs[1].splitlines()[-1]

    ip("-n", hosts[0], "link", "set", "cable", "up")
    running = [start(hosts, i, path, two) for i in range(2)]
    outs = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outs
    losses = [np.array([row["loss"] for row in metrics.read(folder)]) for folder in (whole, two)]
    assert len(losses[0]) == len(losses[1]) == 150
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
