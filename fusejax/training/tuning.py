"""Which parameters are trained: all, all but frozen ones, or low-rank adapters beside them (LoRA).

The parameters are split into a *trained* and a *fixed* pytree; only the trained one has gradients, moments and a place
in checkpoints. `combine` gives the model's parameters back.
"""

import difflib
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax import sharding
from fusejax.config import Config, LoraConfig
from fusejax.errors import UserError

Params = dict[str, Any]


def split(config: Config, params: Params, model: Any, mesh: jax.sharding.Mesh) -> tuple[Params, Params]:
    """(trained, fixed) of a model's parameters, a nested dict of arrays. Adapters are new arrays, laid out over `mesh`.

    Raises UserError for a pattern of `optimizer.frozen` or `lora.targets` that names nothing.
    """
    trained, fixed = abstract_split(config, params, model, mesh)
    return (trained if config.lora is None else _initial(trained, config.seed)), fixed


def abstract_split(config: Config, params: Params, model: Any, mesh: jax.sharding.Mesh) -> tuple[Params, Params]:
    """`split`, but for new adapters, which are ShapeDtypeStructs; `params` may be such, too."""
    if config.lora is not None:
        return _adapters(config.lora, params, model, mesh), params
    frozen = frozen_layers(config.optimizer.frozen, params)
    trained: Params = {}
    fixed: Params = {}
    for path, leaf in _flat(params):
        _put(fixed if frozen[path].all() else trained, path, leaf)
    if not trained:
        raise UserError("optimizer.frozen: freezes every parameter, so there is nothing to train")
    return trained, fixed


def combine(config: Config, trained: Params, fixed: Params) -> Params:
    """The model's parameters; under LoRA the kernels W + alpha/rank · A @ B (Hu et al. 2021, eq. 3)."""
    if config.lora is not None:
        return _merged(config.lora, trained, fixed)
    params: Params = {}
    for part in (trained, fixed):
        for path, leaf in _flat(part):
            _put(params, path, leaf)
    return params


def mask_frozen(config: Config, tree: Params) -> Params:
    """`tree` (gradients or updates, like the trained part) with zeros for frozen layers of a stacked parameter."""
    if config.lora is not None or not config.optimizer.frozen:
        return tree
    frozen = frozen_layers(config.optimizer.frozen, tree, strict=False)
    masked: Params = {}
    for path, leaf in _flat(tree):
        if frozen[path].any():
            leaf = jnp.where(frozen[path].reshape(-1, *[1] * (leaf.ndim - 1)), jnp.zeros_like(leaf), leaf)
        _put(masked, path, leaf)
    return masked


def frozen_layers(patterns: tuple[str, ...], params: Params, strict: bool = True) -> dict[tuple[str, ...], np.ndarray]:
    """For each parameter bool [layers] ([1] where it is not stacked): which a pattern names.

    A pattern is a shell pattern on names such as `blocks.3.mlp.up.kernel`, or on the beginning of one.
    """
    names = {path: _names(path, leaf) for path, leaf in _flat(params)}
    if strict:
        known = [name for group in names.values() for name in group]
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in known):
                raise _names_nothing("optimizer.frozen", pattern, known)
    return {
        path: np.array([any(_matches(name, pattern) for pattern in patterns) for name in group])
        for path, group in names.items()
    }


def _names(path: tuple[str, ...], leaf: Any) -> list[str]:
    if path[0] != "blocks":
        return [".".join(path)]
    return [".".join(("blocks", str(i), *path[1:])) for i in range(leaf.shape[0])]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _names_nothing(key: str, pattern: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(sorted(known)[:20])
    return UserError(f"{key}: {pattern!r} names no parameter of the target; {hint}")


def _adapters(lora: LoraConfig, params: Params, model: Any, mesh: jax.sharding.Mesh) -> Params:
    """For every target kernel [layers, *in, *out] the shapes of a [layers, *in, rank] and b [layers, rank, *out]."""
    kernels = {path: leaf for path, leaf in _flat(params) if path[0] == "blocks" and path[-1] == "kernel"}
    for target in lora.targets:
        if not any(_is_target(path, target) for path in kernels):
            raise _names_nothing("lora.targets", target, [path[-2] for path in kernels])
    adapters: Params = {}
    for path, kernel in kernels.items():
        if not any(_is_target(path, target) for target in lora.targets):
            continue
        split_at = 1 + _n_in(model, path)
        spec = (*kernel.sharding.spec, *[None] * kernel.ndim)[: kernel.ndim]
        layers, inputs, outputs = kernel.shape[0], kernel.shape[1:split_at], kernel.shape[split_at:]
        a, b = (layers, *inputs, lora.rank), (layers, lora.rank, *outputs)
        for name, shape, axes in (
            ("a", a, (*spec[:split_at], None)),
            ("b", b, (spec[0], None, *spec[split_at:])),
        ):
            layout = sharding.by_axes(mesh, axes)
            _put(adapters, (*path, name), jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout))
    return adapters


def _initial(adapters: Params, seed: int) -> Params:
    """The arrays of new adapters: each a normal with variance 1 / inputs, each b zero."""
    made: Params = {}
    for path, leaf in _flat(adapters):
        if path[-1] == "a":
            random = np.random.default_rng([seed, zlib.crc32(".".join(path[:-1]).encode())])
            std = np.float32(1 / np.sqrt(np.prod(leaf.shape[1:-1])))
            values = random.standard_normal(leaf.shape, np.float32) * std
        else:
            values = np.zeros(leaf.shape, np.float32)
        _put(made, path, sharding.put_parameter(values, leaf.sharding.mesh, tuple(leaf.sharding.spec)))
    return made


def _is_target(path: tuple[str, ...], target: str) -> bool:
    """Whether `target` is the layer's own name (`query`) or a pattern on its whole one (`blocks.mlp.*`)."""
    return path[-2] == target or fnmatchcase(".".join(path[:-1]), target)


def _n_in(model: Any, path: tuple[str, ...]) -> int:
    """Over how many of its dimensions (the stacking apart) a kernel sums."""
    module = model
    for part in path[:-1]:
        module = getattr(module, part)
    return module.n_in


def _merged(lora: LoraConfig, adapters: Params, params: Params) -> Params:
    pairs: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for path, leaf in _flat(adapters):
        pairs.setdefault(path[:-1], {})[path[-1]] = leaf
    merged: Params = {}
    for path, leaf in _flat(params):
        if path in pairs:
            a, b = pairs[path]["a"], pairs[path]["b"]
            inputs, outputs = "ijk"[: a.ndim - 2], "uvw"[: b.ndim - 2]
            update = jnp.einsum(f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", a, b)
            leaf = leaf + (lora.alpha / lora.rank) * update
        _put(merged, path, leaf)
    return merged


def _flat(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value


def _put(tree: Params, path: tuple[str, ...], leaf: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf
