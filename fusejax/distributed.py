"""Many processes, one job: JAX's multi-controller runtime, started the same way by `train.py` and every heavy command.

Where a job has several processes each runs the same command, over devices that together make one mesh. How many there
are is read, in this order, from `distributed` in the configuration, the environment (JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID), Slurm (`srun`), Open MPI (`mpirun`) and Cloud TPU. The output folder lies on
storage that all of them see.

Process 0 alone prepares, evaluates and reports; the others wait (`alone`). Each process keeps its log in
OUTPUT/logs/process-I.log. A process that dies ends the others within `distributed.timeout_s`, with one line naming it.
"""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

from fusejax import outputs, paths, rendezvous
from fusejax.config import Config, DistributedConfig
from fusejax.errors import Resumable, UserError
from fusejax.progress import say

_RETRY_S = 0.2
_ROLL_CALL_MS = 5000
_PARTING_S = 10.0
_SEEN_WITHIN_S = 30.0  # shared file systems show a new file to other hosts after a while


class Place(NamedTuple):
    """Which process this is; address None where JAX finds the coordinator by itself."""

    address: str | None
    processes: int
    process: int
    found_in: str


def start(config: Config) -> None:
    """Join the other processes of the job, if there are any; call it before anything else of JAX.

    Raises UserError, one line, where processes are missing or differ, the port is taken, the output folder is not
    shared, or there are not as many devices as the configuration expects.
    """
    keep_programs(config)
    wanted = config.distributed
    place = find(wanted, os.environ)
    if place is not None and place.processes > 1:
        _keep_log(config.folder, place)
        _initialize(config, place)
        shares = [str(d.process_index) for d in jax.devices()]
        per_process = ", ".join(str(shares.count(str(i))) for i in range(jax.process_count()))
        say(
            f"process {jax.process_index()} of {jax.process_count()} ({place.found_in}), {jax.device_count()} "
            f"{jax.devices()[0].device_kind} devices ({per_process} by process)"
        )
        _check_shared(config.folder)
    _check_counts(wanted)


def keep_programs(config: Config) -> None:
    """Compiled programs go to the folder `compilation_cache`, if there is one, and come from there again."""
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(paths.at(config.compilation_cache).expanduser()))


def find(wanted: DistributedConfig, environment: Any) -> Place | None:
    """Where this process stands, by configuration or environment; None for a job of one process."""
    coordinator = wanted.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    processes = wanted.processes or _number(environment, "JAX_NUM_PROCESSES")
    process = wanted.process if wanted.process is not None else _number(environment, "JAX_PROCESS_ID")
    if coordinator is not None and processes is not None and process is not None:
        if process >= processes:
            raise UserError(f"distributed.process: {process} should be below distributed.processes, {processes}")
        return Place(coordinator, processes, process, "as told")
    cluster = _cluster(environment)
    told = {
        "coordinator (or JAX_COORDINATOR_ADDRESS)": coordinator,
        "processes (or JAX_NUM_PROCESSES)": processes,
        "process (or JAX_PROCESS_ID)": process,
    }
    missing = [f"distributed.{key}" for key, value in told.items() if value is None]
    if cluster is None and len(missing) < len(told):
        raise UserError(
            f"{' and '.join(missing)}: not set, though other settings of several processes are; set all three, or none"
        )
    return cluster


def _cluster(environment: Any) -> Place | None:
    """Slurm, Open MPI or Cloud TPU, as JAX tells them; it also finds their coordinator."""
    for name, tell_tale, size, rank in (
        ("Slurm", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
        ("Open MPI", "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        if tell_tale in environment and size in environment:
            n = _number(environment, size) or 1
            return Place(None, n, _number(environment, rank) or 0, name) if n > 1 else None
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if hosts.count(",") and importlib.util.find_spec("libtpu"):
        return Place(None, hosts.count(",") + 1, _number(environment, "TPU_WORKER_ID") or 0, "Cloud TPU")
    return None


def _number(environment: Any, name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"{name}: {text!r} in the environment should be a whole number")
    return int(text)


def _initialize(config: Config, place: Place) -> None:
    wanted = config.distributed
    if place.address is not None:
        about = {"configuration": outputs.fingerprint(_common(config)), "jax": jax.__version__}
        rendezvous.meet(place.address, place.processes, place.process, wanted.timeout_s, about)
    told: dict[str, Any] = {}
    if place.address is not None:
        told = {
            "coordinator_address": place.address,
            "num_processes": place.processes,
            "process_id": place.process,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **told,
            local_device_ids=list(wanted.local_devices) if wanted.local_devices is not None else None,
            initialization_timeout=int(wanted.timeout_s),
            heartbeat_timeout_seconds=int(wanted.timeout_s),
            shutdown_timeout_seconds=int(wanted.timeout_s),
        )
    except (RuntimeError, ValueError, OSError) as error:
        line = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"the processes of the job could not be connected ({place.found_in}): {line}") from None


def _common(config: Config) -> dict[str, Any]:
    """The configuration without what differs between processes."""
    values = config.model_dump(mode="json")
    for key in ("process", "local_devices"):
        values["distributed"].pop(key)
    return values


def _keep_log(folder: Path, place: Place) -> None:
    """From here on what this process writes goes through a keeper: see `fusejax.keeper`."""
    # What grows line by line stays on this machine where the output is in a bucket.
    logs = Path("logs", str(folder).partition("://")[2]) if paths.is_remote(folder) else folder / "logs"
    path = outputs.make_folder(logs) / f"process-{place.process}.log"
    command = [sys.executable, "-m", "fusejax.keeper", str(path), str(place.process), str(place.processes)]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert keeper.stdin is not None
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(keeper.stdin.fileno(), 1)
    os.dup2(keeper.stdin.fileno(), 2)
    keeper.stdin.close()
    _keepers.append(keeper)


_keepers: list[subprocess.Popen[bytes]] = []


def _check_counts(wanted: DistributedConfig) -> None:
    if wanted.devices is not None and jax.device_count() != wanted.devices:
        raise UserError(
            f"distributed.devices: {wanted.devices} are expected, here are {jax.device_count()} on "
            f"{jax.process_count()} processes ({jax.local_device_count()} on process {jax.process_index()}, "
            f"{socket.gethostname()})"
        )
    if wanted.processes is not None and jax.process_count() != wanted.processes:
        raise UserError(f"distributed.processes: {wanted.processes} are expected, here are {jax.process_count()}")


def _check_shared(folder: Path) -> None:
    """UserError unless every process sees the same output folder."""
    marker = outputs.make_folder(folder) / ".shared"
    token = f"{time.time_ns()}" if jax.process_index() == 0 else ""
    if token:
        outputs.write_atomically(marker, token)
    token = tell("output folder", token)
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not marker.is_file() or marker.read_text() != token:
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder}: process {jax.process_index()} on {socket.gethostname()} does not see what process 0 wrote "
                "there; `output` should be on storage that all processes share"
            )
        time.sleep(_RETRY_S)


_calls: dict[str, int] = {}


def tell(name: str, text: str) -> str:
    """`text` of process 0, in every process; waits for it however long it takes, as long as process 0 lives."""
    if jax.process_count() == 1:
        return text
    client, key = _client(), f"fusejax/{name}/{_count(name)}"
    if jax.process_index() == 0:
        client.key_value_set(key, text)
        return text
    return _wait(client, key)


def _count(name: str) -> int:
    """Which call of this name it is: every process makes the same ones."""
    _calls[name] = _calls.get(name, 0) + 1
    return _calls[name]


def _wait(client: Any, key: str) -> str:
    """A key's value, once it is there. A process that is gone meanwhile ends this one, in time."""
    while True:
        try:
            return client.blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE" not in str(error):
                raise lost(error) from None


def barrier(name: str) -> None:
    """Wait for all processes, however long they work, as long as they live."""
    if jax.process_count() == 1:
        return
    client, key = _client(), f"fusejax/{name}/{_count(name)}"
    client.key_value_set(f"{key}/{jax.process_index()}", "here")
    for i in range(jax.process_count()):
        _wait(client, f"{key}/{i}")


def lost(error: Exception) -> Resumable:
    """What a failed exchange between processes means to the user."""
    names = re.search(r"timed out task names:\n((?:\S*\d+\n)+)", str(error))
    numbers = re.findall(r"(\d+)\n", names[1]) if names else []
    who = f"process {', '.join(numbers)}" if numbers else "another process"
    return Resumable(
        f"{who} of {jax.process_count()} is gone or hangs (see logs/ in the output folder); the same command goes on "
        "from the last checkpoint"
    )


def find_lost(error: Exception) -> Resumable | None:
    """Who is missing, after an operation over all processes failed; None where that is not what `error` is about."""
    if not re.search(r"[Gg]loo|NCCL|[Cc]onnection|[Ss]ocket|UNAVAILABLE", str(error)):
        return None
    try:
        _client().wait_at_barrier("fusejax/who is there", _ROLL_CALL_MS)
    except jax.errors.JaxRuntimeError as missing:
        return lost(missing)
    return None


def alone(name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns (as JSON has it) in process 0, which alone does it; the others wait until it is done.

    If it fails, so do they, with a line.
    """
    if jax.process_count() == 1:
        return work()
    if jax.process_index() > 0:
        outcome = json.loads(tell(name, ""))
        if "failed" in outcome:
            raise UserError(outcome["failed"])
        return outcome["result"]
    try:
        result = work()
    except BaseException as error:
        line = str(error).partition("\n")[0]
        tell(name, json.dumps({"failed": f"{name}: process 0 failed: {line}"}))
        raise
    tell(name, json.dumps({"result": result}))
    return result


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`outputs.locked` for a job of any number of processes."""
    with ExitStack() as held:
        alone("output folder", lambda: held.enter_context(outputs.locked(folder)) and None)
        yield


def several() -> bool:
    """Whether this is one of several processes."""
    return bool(_keepers)


def leave(status: int) -> NoReturn:
    """End this process of several at once: the others see it by their closed connections, and nothing waits.

    But for a mistake (2), which all of them see: JAX's runtime would abort those that have not said so when process 0
    ends, so it goes last, if the others take no longer than some seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 2 and _client() is not None:
        with suppress(jax.errors.JaxRuntimeError):
            _go_last()
    os._exit(status)


def _go_last() -> None:
    if jax.process_index() > 0:
        _client().key_value_set(f"fusejax/left/{jax.process_index()}", "now")
        return
    deadline = time.monotonic() + _PARTING_S
    for i in range(1, jax.process_count()):
        _client().blocking_key_value_get(f"fusejax/left/{i}", max(1, int(1000 * (deadline - time.monotonic()))))
    time.sleep(0.5)


def _client() -> Any:
    from jax._src import distributed  # the key-value store and the barrier have no public name yet

    return distributed.global_state.client
