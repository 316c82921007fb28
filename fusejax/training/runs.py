"""The runs of a job: which there are, where each lives, and what its result depends on."""

import functools
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import fusejax
from fusejax import corpus, models, outputs, paths, settings, tokenizers
from fusejax.config import Config, validate
from fusejax.errors import UserError
from fusejax.source_cache import SourceCache

# Keys that change a result by rounding at most: a run may go on with others.
_WITHIN_ROUNDING = (
    ("batch", "microbatch"),
    ("alignment", "workers"),
    ("guard", "limit"),  # when a run gives up, and is gone on with
    ("loss", "model_entropy"),  # a metric
)


_ENTRIES = "cache.top_k of "  # and a source's label; runs of before it was recorded have it in its cache's fingerprint
_OF_TRAINING = ("metrics.jsonl", "checkpoints")
PAIR = "pair/"  # and a source's label: the run that fuses it into a copy of the target


def runs(config: Config) -> list[str]:
    """The runs of a job. Without sources there is nothing to fuse: CLM is the job itself, and the only run."""
    fused = ["fused"]
    if config.fusion.kind == "pairwise":
        fused = [PAIR + source.label for source in config.partners]
    return [*fused, "clm"] if config.sources and config.evaluation.clm else fused


def run_folder(config: Config, name: str) -> Path:
    """Where a run's checkpoints, metrics and export are: the output folder itself for `fused`."""
    if name.startswith(PAIR):
        return config.folder / "pairs" / name.removeprefix(PAIR)
    return config.folder / "clm" if name == "clm" else config.folder


def run_config(config: Config, name: str) -> Config:
    """The configuration as a run sees it: that of a pair has its source, and the target where that is a source too.

    A pair is fused by `min_ce` (FuseChat, Wan et al. 2024, section 3.2) and exported in float32, since copies are
    merged by their differences from the target, which bfloat16 would round away.
    """
    if not name.startswith(PAIR):
        return config
    label = name.removeprefix(PAIR)
    pair = tuple(source for source in config.sources if source.label == label or source not in config.partners)
    fusion = config.fusion.model_copy(update={"kind": "min_ce", "merge": None})
    precision = config.precision.model_copy(update={"export": "float32"})
    return config.model_copy(update={"sources": pair, "fusion": fusion, "precision": precision})


def run_inputs(config: Config, name: str) -> dict[str, Any]:
    """What determines a run's result, flat: two runs with equal inputs give equal weights. config: its own."""
    documents = corpus.documents(config)
    inputs: dict[str, Any] = {
        "target": models.fingerprint(config.target.model, config.target.revision),
        "tokenizer": tokenizers.for_model(config.target).fingerprint,
        "corpus": outputs.fingerprint(documents.inputs),
    }
    if name != "clm":
        for source in config.sources:
            made_from = SourceCache.of(config, source).inputs
            inputs[f"source {source.label}"] = outputs.fingerprint(made_from)
    return inputs | run_settings(config, name)


def run_settings(config: Config, name: str) -> dict[str, Any]:
    """The part of `run_inputs` that stands in the configuration itself."""
    inputs: dict[str, Any] = {
        "seed": config.seed,
        "max_length": config.max_length,
        "compute": config.precision.compute,
        "compat": config.compat,
        "loss.z_loss": config.loss.z_loss,
    }
    sections = ["optimizer", "batch", "lora", "guard"]
    if name != "clm" and config.sources:
        sections += ["loss", "fusion", "alignment"]
        inputs |= {f"{_ENTRIES}{source.label}": source.top_k or config.cache.top_k for source in config.sources}
    for section in sections:
        values = getattr(config, section)
        for key, value in (values.model_dump(mode="json") if values else {}).items():
            if (section, key) not in _WITHIN_ROUNDING:
                inputs[f"{section}.{key}"] = value
    return inputs


@functools.cache
def code_fingerprint() -> str:
    """16 hex digits over this package's source files."""
    folder = Path(fusejax.__file__).parent
    files = sorted(folder.rglob("*.py"))
    return outputs.fingerprint({str(file.relative_to(folder)): outputs.file_fingerprint(file) for file in files})


def read_record(folder: Path) -> dict[str, Any] | None:
    """What is known of a run: "inputs", "done" and, where it is, "steps" and "throughput"; None before its start.

    UserError where the record is damaged, or missing beside what the run left.
    """
    needed, optional = {"inputs": dict, "done": bool}, {"throughput": _Throughput}
    path, remedy = folder / "training.json", "set checkpoint.resume=false to train anew"
    record = outputs.read_object(path, needed, remedy, optional)
    left = [name for name in _OF_TRAINING if (folder / name).exists()]
    if record is None and left:  # it is written first
        raise UserError(f"{path}: is missing, which says what the {left[0]} beside it is made from; {remedy}")
    return record


class _Throughput(BaseModel):
    """What is read of it; see `fusejax.training.meter`."""

    tokens_per_s: float | None


def check_record(folder: Path, record: dict[str, Any], wanted: dict[str, Any], remedy: str) -> None:
    """UserError, naming what differs, where a run was begun with other inputs than those wanted."""
    older = {key: value for key, value in wanted.items() if key.startswith(_ENTRIES)}
    made = {**older, **record["inputs"]}
    outputs.check_inputs(folder / "training.json", made, wanted, remedy, settings.defaults(Config))


def check_settings(config: Config, name: str, remedy: str) -> None:
    """UserError where a run was begun with other settings; asks for nothing that earlier stages make."""
    folder, wanted = run_folder(config, name), run_settings(run_config(config, name), name)
    record = read_record(folder)
    if record is not None:
        known = {key: value for key, value in record["inputs"].items() if key in wanted}
        check_record(folder, {"inputs": known}, wanted, remedy)


def check_models(config: Config, remedy: str) -> None:
    """UserError where the job in the output folder has other models, or caches of another kind, by its config.yaml."""
    path = config.folder / "config.yaml"
    try:
        noted = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({paths.one_line(error)}); remove it") from None
    made = validate(noted if isinstance(noted, dict) else {}, str(path))
    outputs.check_inputs(path, _models(made), _models(config), remedy)


def _models(config: Config) -> dict[str, Any]:
    models = {"target": config.target} | {f"sources.{i}": source for i, source in enumerate(config.sources)}
    found = {f"{at}.{key}": getattr(model, key) for at, model in models.items() for key in ("model", "revision", "bos")}
    return found | {f"cache.{key}": getattr(config.cache, key) for key in ("kind", "rounds", "values")}


def forget(folder: Path) -> None:
    """Remove what an earlier run of training left; its inputs and results go together."""
    for name in ("training.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        paths.remove_folder(folder / name)
