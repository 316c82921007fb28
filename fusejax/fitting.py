"""The change of configuration with which a stage fits a machine: which there are, which is best, which must fail.

Only compiling says what a program needs, and takes minutes. So candidates are sorted by an estimate of their speed,
those whose arguments and least temporaries are too much by themselves are left out, and of the others the quickest one
is compiled that should fit by how often that least earlier compilations under the same remat needed.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fusejax import aot, flops, models, sharding
from fusejax.aot import Call, DoesNotFitError, Program
from fusejax.config import CacheConfig, Config, MeshConfig
from fusejax.errors import UserError
from fusejax.training.runs import run_config, runs

_USUAL_FACTOR = 1.5  # of a remat not compiled so far; steps of 7B models on TPUs needed 1.25 to 1.6 under `full`
_BANDWIDTH = 1e11  # bytes a second that a device sends; a round number, only to sort candidates by


@dataclass(frozen=True)
class Stage:
    """A part of a job that is one program.

    name: `train`, or the source's label. program: equal for stages that are the same program. call: the program and its
    arguments under a configuration. arguments: their bytes on each device. least: those that its temporaries cannot do
    without. variants: other configurations, the quickest first.
    """

    name: str
    program: Any
    shape: models.DecoderConfig
    call: Callable[[Config], Call]
    arguments: Callable[[Config], int]
    least: Callable[[Config], int]
    tokens: Callable[[Config], float]
    variants: Callable[[Config], list[Config]]


@dataclass(frozen=True)
class Outcome:
    """What compiling a stage under a configuration said; program None where it was refused, then with the reason."""

    config: Config
    fits: bool
    needed: int | None  # bytes on each device
    program: Program | None
    reason: str = ""


class Candidate(NamedTuple):
    """A configuration, and bytes on each device of the arguments and of the least temporaries."""

    config: Config
    arguments: int
    least: int


def try_one(stage: Stage, config: Config, available: int) -> Outcome:
    """Compile a stage for devices of `available` bytes."""
    try:
        program = stage.call(config).compile()
    except DoesNotFitError as error:
        return Outcome(config, False, error.needed, None, str(error))
    return Outcome(config, program.peak <= available, program.peak, program)


def verdict(outcome: Outcome) -> str:
    """Whether a program fits, and if not why, in the compiler's words where it has any."""
    if outcome.reason or outcome.needed is None:
        return outcome.reason or "does not fit"
    if not outcome.fits or outcome.program is None:
        return f"does not fit: needs {outcome.needed / (1 << 30):.2f} GiB"
    return f"fits, with {outcome.needed / (1 << 30):.2f} GiB at the peak; compiled in {outcome.program.seconds:.0f} s"


def search(
    stage: Stage, failed: Outcome, available: int, tries: int, seconds: float, say: Callable[[str], None]
) -> Outcome | None:
    """The first variant found that fits; None where none does by shapes alone, or in so many tries or so much time."""
    began, factors = time.monotonic(), {failed.config.remat: _factor(stage, failed)}
    candidates = [
        Candidate(config, stage.arguments(config), stage.least(config))
        for config in stage.variants(failed.config)
        if config != failed.config
    ]
    may_fit = [candidate for candidate in candidates if candidate.arguments + candidate.least <= available]
    say(f"{stage.name}: of {len(candidates)} other configurations {len(may_fit)} may fit by their shapes")

    def expected(candidate: Candidate) -> float:
        return candidate.arguments + factors.get(candidate.config.remat, _USUAL_FACTOR) * candidate.least

    for _ in range(tries):
        if not may_fit or time.monotonic() - began > seconds:
            return None
        chosen = next_candidate(may_fit, expected, available)
        may_fit.remove(chosen)
        config = chosen.config
        say(f"{stage.name}: compiling with {' '.join(changes(failed.config, config))}")
        outcome = try_one(stage, config, available)
        say(f"{stage.name}: {verdict(outcome)}")
        if outcome.fits:
            return outcome
        factors[config.remat] = max(factors.get(config.remat, 1.0), _factor(stage, outcome))
    return None


def next_candidate(
    candidates: Sequence[Candidate], expected: Callable[[Candidate], float], available: int
) -> Candidate:
    """The first, so the quickest, that should fit by its `expected` bytes; if none, that of the fewest."""
    fitting = [candidate for candidate in candidates if expected(candidate) <= available]
    return fitting[0] if fitting else min(candidates, key=expected)


def _factor(stage: Stage, outcome: Outcome) -> float:
    """How often the least temporaries a program needed, at least 1."""
    if outcome.needed is None:
        return 1.0
    beyond = outcome.needed - stage.arguments(outcome.config)
    return max(1.0, beyond / max(stage.least(outcome.config), 1))


def changes(old: Config, new: Config) -> list[str]:
    """The overrides that make `new` of `old`."""
    found = []
    if new.mesh != old.mesh:
        found += [f"mesh.{axis}={size}" for axis, size in new.mesh.model_dump().items()]
    for section, key in (("batch", "microbatch"), ("cache", "batch_tokens"), ("cache", "mesh")):
        value = getattr(getattr(new, section), key)
        if value != getattr(getattr(old, section), key):
            found.append(f"{section}.{key}={value}")
    return found + ([f"remat={new.remat}"] if new.remat != old.remat else [])


def other_optimizers(stage: Stage, config: Config) -> list[tuple[str, int]]:
    """(override, bytes on each device that the arguments are less by) of the optimizers that hold less."""
    held = stage.arguments(config)
    found = []
    for kind in ("lion", "adafactor"):
        optimizer = config.optimizer.model_copy(update={"kind": kind})
        less = held - stage.call(config.model_copy(update={"optimizer": optimizer})).argument_bytes
        if less > 0:
            found.append((f"optimizer.kind={kind}", less))
    return found


def training(config: Config, shapes: dict[str, models.DecoderConfig], devices: Sequence[Any]) -> Stage:
    """The stage `train` on these devices, of several fused runs the first. shapes: by the models' names."""
    shape = shapes[config.target.model]
    run = runs(config)[0]
    tables = [shapes[source.model].vocab_size for source in run_config(config, run).sources]

    def call(config: Config) -> Call:
        return aot.train_call(run_config(config, run), shape, devices, source_vocabularies=tables)

    @functools.cache
    def held(mesh: MeshConfig) -> tuple[int, int]:
        """(bytes of the arguments, of the trained parameters), whatever the microbatch and remat."""
        arguments = call(config.model_copy(update={"mesh": mesh})).arguments
        return aot.shard_bytes(arguments), aot.shard_bytes(arguments[0]["params"])

    def least(config: Config) -> int:
        """The gradients, of microbatches their sum too, and what the layers leave for the backward pass."""
        mesh = sharding.job_mesh(config, shape, devices)
        rows = config.batch.microbatch or config.batch.sequences
        gradients = held(config.mesh)[1] * (1 if rows == config.batch.sequences else 2)
        kept = _kept_per_token(config, shape, mesh.shape["tensor"])
        return gradients + rows // sharding.batch_shards(mesh) * config.max_length * shape.n_layers * kept

    def tokens(config: Config) -> float:
        return config.batch.sequences * config.max_length / len(devices)

    def variants(config: Config) -> list[Config]:
        found = list(_training_variants(config, shape, len(devices), sharding.slices_of(devices)[0]))
        return sorted(found, key=lambda other: _seconds(other, shape, devices))

    return Stage("train", "train", shape, call, lambda config: held(config.mesh)[0], least, tokens, variants)


def _kept_per_token(config: Config, shape: models.DecoderConfig, tensor: int) -> int:
    """Bytes of a layer's activations that the backward pass needs of a token."""
    width = 2 if config.precision.compute == "bfloat16" else 4
    if config.remat in ("full", "offload_dots_with_no_batch_dims"):
        return width * shape.d_model
    heads = shape.head_dim * (2 * shape.n_heads + 2 * shape.n_kv_heads)
    return width * (2 * shape.d_model + (heads + (3 if shape.gated_mlp else 2) * shape.d_mlp) // tensor)


def _training_variants(config: Config, shape: models.DecoderConfig, n: int, slices: int) -> Iterator[Config]:
    """Meshes, microbatches and remat that differ from the configuration's and that the model's shape allows."""
    sequences = config.batch.sequences
    for data, fsdp, tensor in sharding.mesh_shapes(n):
        shards = data * fsdp
        if sequences % shards or data % slices or shape.d_model % fsdp or shape.n_kv_heads % tensor:
            continue
        mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        for micro in (i for i in range(shards, sequences + 1, shards) if sequences % i == 0):
            batch = config.batch.model_copy(update={"microbatch": None if micro == sequences else micro})
            for remat in dict.fromkeys((config.remat, "full")):
                yield config.model_copy(update={"mesh": mesh, "batch": batch, "remat": remat})


def _seconds(config: Config, shape: models.DecoderConfig, devices: Sequence[Any]) -> float:
    """A rough time of a step, to sort by: arithmetic at half the peak, then what goes over the wires."""
    mesh, sequences = config.mesh, config.batch.sequences
    tokens, parameters = sequences * config.max_length, models.count_parameters(shape)
    peak = flops.peak(devices[0].device_kind) or 1e14
    again = 4 / 3 if config.remat == "full" else 1.0
    arithmetic = again * tokens * flops.training_per_token(shape, config.max_length) / (0.5 * peak * len(devices))
    passes = sequences // (config.batch.microbatch or sequences)
    # Weights for the forward and backward pass in 2 bytes and gradients in 4; then those of the copies.
    sent = passes * 8 * parameters / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp
    sent += 8 * parameters / (mesh.fsdp * mesh.tensor) * (mesh.data - 1) / mesh.data
    own = tokens / (mesh.data * mesh.fsdp)
    sent += 4 * 2 * 2 * own * shape.d_model * shape.n_layers * (mesh.tensor - 1) / mesh.tensor
    return arithmetic + sent / _BANDWIDTH


def source(
    config: Config,
    label: str,
    shapes: dict[str, models.DecoderConfig],
    devices: Sequence[Any],
    own: Sequence[Any],
) -> Stage:
    """The forward pass of a source on these devices, or under `cache.mesh: process` on a process' own."""
    model = next(source for source in config.sources if source.label == label)
    shape = shapes[model.model]

    def call(config: Config) -> Call:
        return aot.source_call(config, model, shape, devices, own)

    def least(config: Config) -> int:
        """The states of a batch, twice."""
        ids = call(config).arguments[1]
        tokens = ids.sharding.shard_shape(ids.shape)[0] * config.max_length
        return 2 * tokens * shape.d_model * (2 if config.precision.compute == "bfloat16" else 4)

    def tokens(config: Config) -> float:
        ids = call(config).arguments[1]
        return ids.size / ids.sharding.mesh.size

    def variants(config: Config) -> list[Config]:
        found: list[CacheConfig] = []
        for mesh in dict.fromkeys((config.cache.mesh, "job")):
            tokens = config.cache.batch_tokens or 0
            while tokens > config.max_length:
                tokens //= 2
                found.append(config.cache.model_copy(update={"batch_tokens": tokens, "mesh": mesh}))
        return [config.model_copy(update={"cache": cache}) for cache in found]

    def arguments(config: Config) -> int:
        return call(config).argument_bytes

    return Stage(label, (shape, model.top_k), shape, call, arguments, least, tokens, variants)


def checked_mesh(config: Config, shape: models.DecoderConfig, devices: Sequence[Any], name: str) -> MeshConfig:
    """The mesh of a job on all of a machine's devices; UserError where the configuration's takes another number."""
    rows = config.batch.microbatch or config.batch.sequences
    mesh = sharding.resolve(config.mesh, devices, rows, shape)
    taken = mesh.data * mesh.fsdp * mesh.tensor
    if taken != len(devices):
        raise UserError(
            f"mesh: data x fsdp x tensor = {mesh.data} x {mesh.fsdp} x {mesh.tensor} takes {taken} devices, {name} has "
            f"{len(devices)}: add mesh=auto, or numbers whose product is {len(devices)}"
        )
    return mesh
