"""`fusejax plan CONFIG --topology MACHINE`: a job's programs compiled for a machine that is not here.

For each source's forward pass and for training: does it fit, what does a device hold, what goes over the wires, and, by
an estimate at a stated share of the chips' peak, how fast and how long. What does not fit is compiled with other
meshes, microbatches and remat until something does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fusejax import aot, fitting, flops, models, outputs, plan, sharding
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.fitting import Outcome, Stage
from fusejax.models import files
from fusejax.plan_command import Options
from fusejax.progress import console, say

Json = dict[str, Any]


def show(config: Config, options: Options) -> None:
    """Print the plan. Raises UserError where a stage does not fit and no change was found with which it does."""
    devices = aot.topology(options.topology, options.slices)
    shapes = model_shapes(config, options.shape)
    target = shapes[config.target.model]
    config = config.model_copy(update={"mesh": fitting.checked_mesh(config, target, devices, options.topology)})
    available = aot.usable_memory(devices)
    compiled = aot.without_cudnn(config, devices)
    if compiled.attention != config.attention:
        say("attention: XLA's is compiled, since cuDNN, which the machine would take, is not installed here")
    config = compiled
    pool = f" ({aot.POOL} changes it)" if devices[0].device_kind.startswith("NVIDIA") else ""
    say(f"{options.topology}: a program can have {_gib(available)} of each device's memory{pool}")
    say(f"mesh: {sharding.described(sharding.make_mesh(config.mesh, devices))}")
    tokens, known_by = plan.corpus_tokens(config)
    if tokens != tokens:
        say(f"tokens of the corpus: {known_by}")
    found: list[Json] = []
    outcomes: dict[Any, tuple[Outcome, Outcome | None]] = {}
    own = aot.one_process(options.topology, devices)
    for stage in _stages(config, shapes, devices, own, options.only):
        if stage.program in outcomes:
            say(f"{stage.name}: the same program as one before")
        else:
            outcomes[stage.program] = _compile(stage, config, available, options)
        first, fitted = outcomes[stage.program]
        found.append(describe(stage, config, first, fitted, devices, available, tokens, options.mfu))
    about = {
        "topology": options.topology, "slices": options.slices, "devices": len(devices),
        "device": devices[0].device_kind, "available_bytes": available, "mesh": config.mesh.model_dump(),
        "assumed_mfu": options.mfu, "tokens": None if tokens != tokens else tokens, "stages": found,
    }  # fmt: skip
    _print(found, options.mfu)
    if options.json:
        outputs.write_atomically(options.json, json.dumps(about, indent=1) + "\n", outputs.ANOTHER_PATH)
    lost = [f"{stage['name']} ({stage['reason']})" for stage in found if not (stage["fits"] or stage["change"])]
    if lost:
        raise UserError(f"{options.topology}: no configuration that fits was found for {', '.join(lost)}")


def model_shapes(config: Config, given: Sequence[str] = ()) -> dict[str, models.DecoderConfig]:
    """The shape of each model of a job, by name: from NAME=LIKE, what is here, published sizes, or the hub.

    Raises UserError for a NAME that the job does not have, and where nothing says a model's shape.
    """
    everyone = (config.target, *config.sources)
    likes = _given_likes(everyone, given)
    return {model.model: _shape(model, likes.get(model.model)) for model in everyone}


def _given_likes(everyone: Sequence[ModelConfig], given: Sequence[str]) -> dict[str, str]:
    names = {name: model.model for model in everyone for name in (model.model, model.label)}
    likes = {}
    for option in given:
        name, equals, like = option.partition("=")
        if not equals or name not in names:
            raise UserError(f"--shape {option}: should be NAME=LIKE, NAME one of {', '.join(sorted(names))}")
        likes[names[name]] = like
    return likes


def _shape(model: ModelConfig, like: str | None) -> models.DecoderConfig:
    if like is not None:
        path = Path(like).expanduser()
        if path.is_file():
            return models.decoder_config(files.read_json(path), like)
        return _shape(ModelConfig(model=like), None)
    shape, _ = plan.known_shape(model)
    if shape is not None:
        return shape
    try:
        return models.read_config(model.model, model.revision)[1]
    except UserError as error:
        raise UserError(f"{error}; or name its config.json, or a model like it: --shape {model.model}=LIKE") from None


def _stages(
    config: Config,
    shapes: dict[str, models.DecoderConfig],
    devices: Sequence[Any],
    own: Sequence[Any],
    only: Sequence[str],
) -> list[Stage]:
    stages = [fitting.source(config, source.label, shapes, devices, own) for source in config.sources]
    stages.append(fitting.training(config, shapes, devices))
    names = [stage.name for stage in stages]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: the job's stages are {', '.join(names)}")
    return [stage for stage in stages if not only or stage.name in only]


def _compile(stage: Stage, config: Config, available: int, options: Options) -> tuple[Outcome, Outcome | None]:
    """(what the configuration as it is comes to, what fits: itself, another one, or None)."""
    say(f"{stage.name}: compiling for {options.topology}, which may take minutes")
    first = fitting.try_one(stage, config, available)
    say(f"{stage.name}: {fitting.verdict(first)}")
    if first.fits:
        return first, first
    fitted = fitting.search(stage, first, available, options.tries, 60 * options.minutes, say)
    if fitted is None and stage.name == "train":
        less = [f"{change} ({_gib(size)} less to hold)" for change, size in fitting.other_optimizers(stage, config)]
        say(f"train: not tried, since they train otherwise: {', '.join([*less, 'lora', 'optimizer.frozen'])}")
    return first, fitted


def describe(
    stage: Stage,
    config: Config,
    first: Outcome,
    fitted: Outcome | None,
    devices: Sequence[Any],
    available: int,
    tokens: float,
    mfu: float,
) -> Json:
    """All numbers of a stage, those of the program that fits."""
    result: Json = {
        "name": stage.name,
        "fits": first.fits,
        "needed_bytes": first.needed,
        "short_bytes": None if first.fits or first.needed is None else first.needed - available,
        "reason": first.reason,
        "change": fitting.changes(config, fitted.config) if fitted else [],
    }
    if fitted is not None and fitted.program is not None:
        program = fitted.program
        result["memory"] = {
            "arguments": program.arguments,
            "temporaries": program.temporaries,
            "peak": program.peak,
            "spare": available - program.peak,
        }
        result["collectives"] = {kind: traffic._asdict() for kind, traffic in program.collectives.items()}
        result["compile_s"] = program.seconds
    result |= _speed(stage, config, devices, tokens, mfu)
    if fitted is not None and fitted.program is not None:
        seconds = stage.tokens(fitted.config) * len(devices) / result["estimated_tokens_per_s"]
        result["estimated_sent_bytes_per_s"] = sum(sent.bytes for sent in fitted.program.collectives.values()) / seconds
    return result


def _speed(stage: Stage, config: Config, devices: Sequence[Any], tokens: float, mfu: float) -> Json:
    """FLOPs by the formula of `fusejax.flops`; tokens/s and hours are what they come to at `mfu` of the peak."""
    trains = stage.name == "train"
    count = flops.training_per_token if trains else flops.forward_per_token
    per_token = count(stage.shape, config.max_length)
    speed = mfu * (flops.peak(devices[0].device_kind) or 0.0) * len(devices) / per_token
    if trains and config.batch.steps:
        tokens = float(config.batch.steps * config.batch.sequences * config.max_length)
    elif trains:
        tokens *= config.batch.epochs
    result: Json = {"flops_per_token": per_token, "estimated_tokens_per_s": speed}
    if tokens == tokens:
        result["estimated_hours"] = tokens / speed / 3600
        if not trains:
            source = next(source for source in config.sources if source.label == stage.name)
            result["cache_bytes"] = tokens * plan.cached_bytes(config, source, stage.shape.vocab_size)
    return result


def _print(stages: Sequence[Json], mfu: float) -> None:
    memory = Table("stage", "fits", "arguments", "temporaries", "peak", "spare", title="memory of each device")
    sent = Table("stage", "collective", "times", "bytes", title="sent by each device, in a pass or step")
    title = f"an estimate, at {mfu:.0%} of the peak"
    time = Table("stage", "FLOP/token", "tokens/s", "sent", "hours", "cache", title=title)
    for stage in stages:
        fits = "yes" if stage["fits"] else f"with {' '.join(stage['change'])}" if stage["change"] else "no"
        held = stage.get("memory", {})
        sizes = [_gib(held.get(key)) for key in ("arguments", "temporaries", "peak", "spare")]
        memory.add_row(stage["name"], fits, *sizes)
        for kind, traffic in stage.get("collectives", {}).items():
            sent.add_row(stage["name"], kind, f"{traffic['times']:,}", plan.readable_bytes(traffic["bytes"]))
        if not held:
            continue
        hours, disk = stage.get("estimated_hours"), stage.get("cache_bytes")
        time.add_row(
            stage["name"],
            f"{stage['flops_per_token']:.3g}",
            f"{stage['estimated_tokens_per_s']:,.0f}",
            f"{plan.readable_bytes(stage['estimated_sent_bytes_per_s'])}/s",
            "?" if hours is None else f"{hours:.2f}",
            "" if disk is None else plan.readable_bytes(disk),
        )
    for table in (memory, sent, time):
        if table.row_count:
            console.print(table)
    for stage in stages:
        if stage["change"]:
            short = stage["short_bytes"]
            by = "" if short is None else f"{_gib(short)} too much as it is; "
            say(f"{stage['name']}: {by}fits with {' '.join(stage['change'])}")


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / (1 << 30):.2f} GiB"
