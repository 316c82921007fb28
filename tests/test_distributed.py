import socket
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fusejax import config, distributed, keeper, rendezvous
from fusejax.config import DistributedConfig
from fusejax.errors import UserError


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(*processes, timeout_s=5.0):
    """What each (n, process, about) says: None, or its error."""
    address, said = f"127.0.0.1:{free_port()}", {}

    def one(i, n, process, about):
        try:
            rendezvous.meet(address, n, process, timeout_s, about)
            said[i] = None
        except UserError as error:
            said[i] = str(error)

    threads = [threading.Thread(target=one, args=(i, *told)) for i, told in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [said[i] for i in range(len(processes))]


def test_all_meet():
    assert meet(*((3, i, {"configuration": "x"}) for i in (2, 0, 1))) == [None] * 3


def test_the_missing_are_named_by_all():
    said = meet((4, 0, {}), (4, 2, {}), timeout_s=1.0)
    assert said == ["process 1, 3 of 4 did not start within 1 s"] * 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((3, 1, {"configuration": "x"}), "has processes 3, process 0 has 2"),
        ((2, 1, {"configuration": "y"}), "has configuration y, process 0 has x"),
        ((2, 5, {"configuration": "x"}), "number is taken already, or is not below 2"),
    ],
)
def test_what_differs_is_said_by_both(other, message):
    said = meet((2, 0, {"configuration": "x"}), other)
    assert said[0] == said[1]
    assert message in said[0]


def test_no_first_process_and_a_taken_port():
    assert "process 0 of 2 did not answer at" in meet((2, 1, {}), timeout_s=0.5)[0]
    with socket.create_server(("", 0)) as other, pytest.raises(UserError, match=r"port \d+ cannot be opened"):
        rendezvous.meet(f"127.0.0.1:{other.getsockname()[1]}", 2, 0, 1.0, {})
    with pytest.raises(UserError, match="should be HOST:PORT"):
        rendezvous.meet("somewhere", 2, 0, 1.0, {})


def test_someone_elses_connection_is_no_process():
    port = free_port()
    said = []

    def first():
        try:
            rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 1.5, {})
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    for _ in range(50):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n")
            break
        except OSError:
            threading.Event().wait(0.02)
    thread.join(30)
    assert said == ["process 1 of 2 did not start within 1.5 s"]


def test_compiled_programs_are_kept(tmp_path):
    job = config.validate(
        {"target": "t", "corpus": {"path": "c"}, "output": "o", "compilation_cache": str(tmp_path / "programs")}
    )
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    try:
        distributed.start(job)
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    assert any("lambda" in file.name for file in (tmp_path / "programs").iterdir())


SLURM = {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
OWN = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "5"}


@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, {}, None),
        (OWN, {}, ("h:1", 8, 5, "as told")),
        (OWN, {"process": 0, "processes": 2, "coordinator": "g:2"}, ("g:2", 2, 0, "as told")),
        (SLURM, {}, (None, 2, 1, "Slurm")),
        (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
        (SLURM | OWN, {}, ("h:1", 8, 5, "as told")),
        (OPEN_MPI, {}, (None, 4, 3, "Open MPI")),
    ],
)
def test_where_a_process_stands(environment, settings, expected):
    assert distributed.find(DistributedConfig(**settings), environment) == expected


def test_half_told_is_an_error():
    with pytest.raises(UserError, match=r"distributed.process \(or JAX_PROCESS_ID\): not set"):
        distributed.find(DistributedConfig(coordinator="h:1", processes=2), {})
    with pytest.raises(UserError, match=r"distributed.process: 2 should be below"):
        distributed.find(DistributedConfig(coordinator="h:1", processes=2, process=2), {})
    with pytest.raises(UserError, match=r"JAX_NUM_PROCESSES: 'two'"):
        distributed.find(DistributedConfig(), {"JAX_NUM_PROCESSES": "two"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "UNAVAILABLE: tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have crashed.",
            "process 1, 3 is",
        ),
        ("F1 fatal DEADLINE\n\nRPC: /xla.coordination.CoordinationService/RegisterTask", "not all processes came"),
        ("F1 fatal DEADLINE\n\nRPC: /xla.coordination.CoordinationService/Heartbeat", "process 0 is gone (it does not"),
        ("Either the leader task was preempted", "process 0 is gone"),
    ],
)
def test_the_runtimes_last_words(text, expected):
    assert expected in keeper.cause(text)
