"""Faults of models and corpora, and kernels that the devices cannot run, found before any stage does work.

Looks at what is on this machine and asks nothing of a hub: configurations, headers of weight files, tokenizers, and
the first text of each corpus. No tensor is read.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from fusejax import corpus, hub, metrics, models, outputs, paths, sharding, tokenizer_files, tokenizers
from fusejax.config import Config, ModelConfig
from fusejax.errors import UserError
from fusejax.models import convert, families, files
from fusejax.progress import warn
from fusejax.scoring import check_fits
from fusejax.tokenizers import Tokenizer


def check(config: Config) -> None:
    """UserError with the first fault of the target, a source or a corpus.

    Hub names are checked as far as they are in the hub's cache; corpora on a hub are left alone.
    """
    if config.wandb is not None:
        metrics.require_wandb()
    paths.require_checkpoints(config.folder)
    paths.check(config.folder)
    outputs.require_writable(config.folder / "config.yaml", remedy="choose another `output`, or make it writable")
    seen = set()
    for model in (config.target, *config.sources):
        key = (model.model, model.revision, model.bos)
        if key not in seen:
            seen.add(key)
            check_model(model)
            check_length(model, config.max_length, "max_length")
    for documents in (config.corpus, config.evaluation.corpus):
        if documents is not None:
            corpus.check(documents)


def check_devices(config: Config, training: bool = True) -> None:
    """UserError where `kernels` or `attention` ask for what this machine's devices or the models cannot do.

    Attention is traced, as far as the models' configurations are here; nothing is compiled. training: the target's
    rows over the whole mesh too, and not the sources alone.
    """
    mesh = sharding.job_mesh(config) if training else sharding.sources_mesh(config)
    sharding.check_kernels(config.kernels, mesh)
    if config.attention in ("splash", "cudnn"):
        for source in config.sources:
            _check_attention(config, source, sharding.sources_mesh(config), packed=False)
        if training:
            _check_attention(config, config.target, mesh, packed=config.batch.packed)


def _check_attention(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh, packed: bool) -> None:
    folder = folder_of(model)
    if folder is None:
        return
    compute = jnp.dtype(config.precision.compute)
    decoder = models.Decoder(models.read_config(folder)[1], compute, attention=config.attention, mesh=mesh)
    structure, params = nnx.split(decoder)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    ids_BL = jax.ShapeDtypeStruct((rows, config.max_length), jnp.int32)

    def hidden(params: nnx.State, ids_BL: jax.Array) -> jax.Array:
        return nnx.merge(structure, params).hidden(ids_BL, segment_ids=ids_BL if packed else None)

    jax.eval_shape(hidden, params, ids_BL)


def check_model(model: ModelConfig) -> None:
    """UserError where a model cannot be loaded, names or shapes do not match, or the tokenizer is not the model's."""
    if hub.is_local(model.model):
        folder = files.local_folder(model.model, model.revision)
        _refuse_missing(model.model, folder)
        _check_weights(folder)
        _check_tokenizer(tokenizers.for_model(model), folder, model.model)
        return
    cached = files.cached_folder(model.model, model.revision)
    if cached is None:
        return
    models.read_config(cached)
    if has_all_weights(cached):  # what is missing in the cache will be fetched
        _check_weights(cached)
    if tokenizer_files.has_files(cached):
        _check_tokenizer(Tokenizer.load(str(cached), bos=model.bos), cached, model.model)


def check_length(model: ModelConfig, max_length: int, key: str) -> None:
    """UserError where `max_length` tokens go beyond a model's table of learned positions, a warning where they go
    beyond the context that it was made for. key: how the user gives `max_length`."""
    folder = folder_of(model)
    if folder is None:
        return
    _, config = models.read_config(folder)
    if max_length <= config.max_length:
        return
    if config.learned_positions:
        raise UserError(
            f"{model.model}: has positions for {config.max_length} tokens, {key} asks for {max_length}: "
            f"set {key} to {config.max_length} or less"
        )
    warn(f"{model.model}: was made for {config.max_length} tokens, {key} asks for {max_length}; it may do worse there")


def folder_of(model: ModelConfig) -> Path | None:
    """Where a model's files are on this machine, if they are."""
    path = Path(model.model).expanduser()
    return path if path.is_dir() else files.cached_folder(model.model, model.revision)


def _refuse_missing(name: str, folder: Path) -> None:
    """All that a model folder lacks, in one line."""
    parts = {
        "config.json": (folder / "config.json").exists(),
        "weights (model.safetensors)": _has_weights(folder),
        "a tokenizer (tokenizer.json)": tokenizer_files.has_files(folder),
    }
    missing = [part for part, there in parts.items() if not there]
    if missing:
        raise UserError(f"{name}: not a whole model folder: it lacks {' and '.join(missing)}")


def _has_weights(folder: Path) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / f"{name}{end}").is_file() for name in names for end in ("", ".index.json"))


def has_all_weights(folder: Path) -> bool:
    """Whether all files of a model's weights are in a folder, by their names."""
    try:
        files.weight_files(folder)
    except UserError:
        return False
    return True


def _check_weights(folder: Path) -> None:
    values, config = models.read_config(folder)
    family = families.find(values, str(folder / "config.json"))
    convert.match(folder, family, config, headers_only=True)


def _check_tokenizer(tokenizer: Tokenizer, folder: Path, name: str) -> None:
    check_fits(tokenizer, models.read_config(folder)[1].vocab_size, name)
