"""Flax models converted from Hugging Face checkpoints.

    model = fusejax.load("path/or/hub-name")     # a Decoder, an nnx.Module
    logits = model(ids)                           # float32 [B, L, V]

See `fusejax.models.families` for the architectures, `fusejax.models.decoder` for the model itself.
"""

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import outputs
from fusejax.config import AttentionBackend, Remat
from fusejax.errors import UserError
from fusejax.models import families, files, loading
from fusejax.models.config import DecoderConfig
from fusejax.models.decoder import Decoder, fill
from fusejax.models.families import decoder_config, hf_config
from fusejax.models.files import local_folder

__all__ = [
    "Decoder",
    "DecoderConfig",
    "abstract_params",
    "count_parameters",
    "decoder_config",
    "fingerprint",
    "hf_config",
    "init",
    "load",
    "local_folder",
    "logical_axes",
    "read_config",
    "shardings",
]


def load(
    path_or_repo: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    *,
    compute_dtype: Any = jnp.float32,
    remat: Remat = "none",
    unroll: int = 1,
    attention: AttentionBackend = "auto",
) -> Decoder:
    """The model of a Hugging Face folder or hub name, a Flax NNX module; its family is what config.json says.

        model = fusejax.load("path/or/hub-name")
        logits = model(ids)  # ids int32 [B, L], from 0 to model.config.vocab_size - 1 → float32 [B, L, V]

    mesh: every parameter goes straight to its shards there, laid out by its declaration; default: one device. dtype: of
    the parameters, compute_dtype: of the activations, float32 or bfloat16 each; logits are float32 always. revision: of
    a hub name. remat, unroll, attention: see `Decoder`. The host holds one tensor at a time, whatever the model's size.
    Raises UserError for what is missing, unknown or not supported, naming the file and the key or tensor.
    """
    for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
        if not _is_float(value):
            raise UserError(f"{name}: {value!r} should be float32 or bfloat16")
    folder = local_folder(path_or_repo, revision)
    values, config = read_config(folder)
    family = families.find(values, str(folder / "config.json"))
    return loading.load_params(
        Decoder(config, compute_dtype, remat, unroll, attention, mesh), folder, family, mesh, dtype
    )


def init(
    config: DecoderConfig,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = jnp.float32,
    remat: Remat = "none",
    unroll: int = 1,
    attention: AttentionBackend = "auto",
) -> Decoder:
    """A model with random parameters, the same for a seed on any machine and mesh.

    Normal with `config.initializer_std`; the projections that write to the residual stream are smaller by
    sqrt(2 n_layers) (GPT-2, Radford et al. 2019, section 2.3); norms 1, biases 0.
    """
    std = {"normal": config.initializer_std, "residual": config.initializer_std / np.sqrt(2 * config.n_layers)}

    def make(path: tuple[Any, ...], variable: nnx.Param) -> jax.Array:
        kind, shape = variable.get_metadata()["init"], tuple(variable.shape)
        if kind in std:
            rng = np.random.default_rng([seed, zlib.crc32(".".join(path).encode())])
            value = rng.standard_normal(shape, np.float32) * np.float32(std[kind])
        else:
            value = np.full(shape, {"ones": 1.0, "zeros": 0.0}[kind], np.float32)
        value = value.astype(jnp.dtype(dtype))
        if mesh is None:
            return jnp.asarray(value)
        return jax.make_array_from_callback(shape, loading.sharding_of(variable, mesh), value.__getitem__)

    return fill(Decoder(config, compute_dtype, remat, unroll, attention, mesh), make)


def read_config(path_or_repo: str | Path, revision: str | None = None) -> tuple[dict[str, Any], DecoderConfig]:
    """(config.json, what it means) of a model folder or hub name; no weights are read or downloaded."""
    path = local_folder(path_or_repo, revision, weights=False) / "config.json"
    values = files.read_json(path)
    return values, decoder_config(values, str(path))


def fingerprint(path_or_repo: str | Path, revision: str | None = None) -> str:
    """16 hex digits that change with what a model computes: its configuration's meaning and its weights."""
    folder = local_folder(path_or_repo, revision)
    _, config = read_config(folder)
    return outputs.fingerprint([vars(config), files.weights_fingerprint(folder)])


def _is_float(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> nnx.State:
    """The parameters as ShapeDtypeStructs, a pytree like `nnx.split(model)[1]`."""
    _, params = nnx.split(Decoder(config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)


def logical_axes(config: DecoderConfig) -> nnx.State:
    """The logical axes of every parameter, a tuple of names or None where `abstract_params` has a leaf."""
    return _per_parameter(config, lambda variable: variable.get_metadata()["axes"])


def shardings(config: DecoderConfig, mesh: jax.sharding.Mesh) -> nnx.State:
    """The NamedSharding of every parameter, a pytree like the parameters."""
    return _per_parameter(config, lambda variable: loading.sharding_of(variable, mesh))


def _per_parameter(config: DecoderConfig, value: Any) -> nnx.State:
    _, params = nnx.split(Decoder(config))
    return nnx.from_flat_state([(path, v.replace(value(v))) for path, v in nnx.to_flat_state(params)])


def count_parameters(config: DecoderConfig) -> int:
    """How many numbers the model holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
