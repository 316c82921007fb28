"""The fused loss's two steps as Pallas kernels for NVIDIA GPUs (Triton): no logits in memory, only their gradient.

Each program makes one tile of tokens × columns. `statistics` writes every tile's own maximum and sums, which are then
combined, and the logits at a token's ids from the tile that holds them; `dlogits` makes the tile again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from fusejax.kernels.fusion_loss.terms import Options, Slopes, Statistics, combine
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_TILE = 128  # tokens, and columns, of a program
_STEP = 64  # of the sum over channels


def statistics(
    h: Array, weights: Array, ids: Array, valid: Array | None, options: Options
) -> tuple[Statistics, tuple[Array, Array, Array]]:
    """As `xla.statistics`."""
    T, M1 = ids.shape
    kept = _padded(h, weights, valid)
    h, weights, limit = kept
    rows = h.shape[0]
    ids = _by_entry(ids, rows, -1)
    grid = (rows // _TILE, pl.cdiv(weights.shape[1], _TILE))
    tile = jax.ShapeDtypeStruct((grid[1], rows), jnp.float32)
    per_tile = pl.BlockSpec((None, _TILE), lambda t, v: (v, t))
    at, top, total, tempered, weighted = pl.pallas_call(
        partial(_statistics_kernel, width=weights.shape[1], options=options),
        grid=grid,
        in_specs=[*_factors(weights), _entries(M1), _entries(M1)],
        out_specs=[_entries(M1), *[per_tile] * 4],
        out_shape=[jax.ShapeDtypeStruct(ids.shape, jnp.float32), tile, tile, tile, tile],
        input_output_aliases={4: 0},
        **_compiler_options(options, "fusion_loss_statistics"),
    )(limit, h, weights, ids, jnp.zeros(ids.shape, jnp.float32))
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    τ = options.temperature
    per_tile = Statistics(
        at=at.T[None, :T],
        lse=(shift + jnp.log(total))[:, :T],
        lse_tempered=(shift / τ + jnp.log(tempered))[:, :T] if options.tempered else None,
        mean=jnp.where(total > 0, weighted / total, 0.0)[:, :T] if options.model_entropy else None,
    )
    return combine(per_tile), kept


def dlogits(kept: tuple[Array, Array, Array], ids: Array, slopes: Slopes, options: Options) -> Array:
    """∂ Σ loss / ∂ (h @ weights), [T, V] in h's dtype."""
    h, weights, limit = kept
    (T, M1), rows = ids.shape, h.shape[0]
    per_token = [slopes.dense, slopes.shift, slopes.tempered, slopes.shift_tempered]
    per_token = [jnp.pad(jnp.zeros(T) if x is None else x, (0, rows - T)) for x in per_token]
    dz = pl.pallas_call(
        partial(_dlogits_kernel, width=weights.shape[1], options=options),
        grid=(rows // _TILE, pl.cdiv(weights.shape[1], _TILE)),
        in_specs=[
            *_factors(weights),
            _entries(M1),
            _entries(M1),
            *[pl.BlockSpec((_TILE,), lambda t, v: (t,))] * 4,
        ],
        out_specs=pl.BlockSpec((_TILE, _TILE), lambda t, v: (t, v)),
        out_shape=jax.ShapeDtypeStruct((rows, weights.shape[1]), h.dtype),
        **_compiler_options(options, "fusion_loss_dlogits"),
    )(limit, h, weights, _by_entry(ids, rows, -1), _by_entry(slopes.at, rows, 0), *per_token)
    return dz[:T]


def _padded(h: Array, weights: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """Whole tiles of tokens and whole steps of channels; (h, weights, int32[1] the number of columns that count)."""
    (T, D), limit = h.shape, weights.shape[1] if valid is None else valid
    # Triton wants powers of two, and at least 16 channels to multiply.
    pad_T, pad_D = -T % _TILE, -D % _STEP if D > _STEP else max(16, pl.next_power_of_2(D)) - D
    weights = jnp.pad(weights, ((0, pad_D), (0, 0)))
    return jnp.pad(h, ((0, pad_T), (0, pad_D))), weights, jnp.full((1,), limit, jnp.int32)


def _by_entry(x: Array, rows: int, fill: int) -> Array:
    """[T, M + 1] → [M + 1, rows]: an entry of all tokens of a tile is then one vector, loaded at its turn."""
    return jnp.pad(x.T, ((0, 0), (0, rows - x.shape[0])), constant_values=fill)


def _factors(weights: Array) -> list[pl.BlockSpec]:
    D = weights.shape[0]
    return [
        pl.BlockSpec((1,), lambda t, v: (0,)),
        pl.BlockSpec((_TILE, D), lambda t, v: (t, 0)),
        pl.BlockSpec((D, _TILE), lambda t, v: (0, v)),
    ]


def _entries(M1: int) -> pl.BlockSpec:
    return pl.BlockSpec((M1, _TILE), lambda t, v: (0, t))


def _compiler_options(options: Options, name: str) -> dict[str, Any]:
    parameters = plgpu.CompilerParams(num_warps=8, num_stages=3)
    return {"compiler_params": parameters, "interpret": options.interpret, "name": name}


def _logits(h_ref: Any, w_ref: Any, columns: Array, width: int, options: Options) -> Array:
    """This tile's logits; those of columns beyond the table are 0 before the cap."""
    D = w_ref.shape[0]
    step = min(_STEP, D)

    def add(i: Array, z: Array) -> Array:
        channels = pl.ds(i * step, step)
        w = plgpu.load(w_ref.at[channels, :], mask=(columns < width)[None, :], other=0.0)
        return z + jnp.dot(h_ref[:, channels], w, preferred_element_type=jnp.float32)

    z = jax.lax.fori_loop(0, D // step, add, jnp.zeros((_TILE, _TILE), jnp.float32)) * options.logit_scale
    return z if options.logit_cap is None else options.logit_cap * jnp.tanh(z / options.logit_cap)


def _inside(ids: Array, first: Array) -> Array:
    return (ids >= first) & (ids < first + _TILE)


def _where_any(own: Array, update: Callable[[Array], Array], x: Array) -> Array:
    """update(x) where any of this tile's tokens has an entry here; most tiles hold none of most entries."""
    return jax.lax.cond(jnp.max(own.astype(jnp.int32)) > 0, update, lambda x: x, x)


def _statistics_kernel(
    limit_ref: Any, h_ref: Any, w_ref: Any, ids_ref: Any, _: Any, at_ref: Any, top_ref: Any, sum_ref: Any,
    tempered_ref: Any, weighted_ref: Any, *, width: int, options: Options,
) -> None:  # fmt: skip
    first = pl.program_id(1) * _TILE
    columns = first + jnp.arange(_TILE)
    z = _logits(h_ref, w_ref, columns, width, options)
    label = ids_ref.shape[0] - 1

    def visit(m: Array, counted: Array) -> Array:
        """Writes the logits at entry m, and takes it out of what is counted under a tail, unless it is the label."""
        ids = ids_ref[m, :]
        own = _inside(ids, first)

        def update(counted: Array) -> Array:
            hit = columns[None, :] == ids[:, None]
            # Each id is in one tile, so no two programs write the same place.
            plgpu.store(at_ref.at[m, :], jnp.sum(jnp.where(hit, z, 0.0), 1), mask=own)
            return jnp.where(hit & (m < label), -jnp.inf, counted) if options.tail else counted

        return _where_any(own, update, counted)

    counted = jnp.where((columns < limit_ref[0])[None, :], z, -jnp.inf)
    counted = jax.lax.fori_loop(0, label + 1, visit, counted)
    top = jnp.max(counted, 1)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    e = jnp.exp(counted - shift[:, None])
    top_ref[...] = top
    sum_ref[...] = jnp.sum(e, 1)
    if options.tempered:
        tempered_ref[...] = jnp.sum(jnp.exp((counted - shift[:, None]) / options.temperature), 1)
    if options.model_entropy:
        weighted_ref[...] = jnp.sum(jnp.where(e > 0, e * counted, 0.0), 1)


def _dlogits_kernel(
    limit_ref: Any, h_ref: Any, w_ref: Any, ids_ref: Any, at_ref: Any, dense_ref: Any, shift_ref: Any,
    tempered_ref: Any, shift_tempered_ref: Any, out_ref: Any, *, width: int, options: Options,
) -> None:  # fmt: skip
    first = pl.program_id(1) * _TILE
    columns = first + jnp.arange(_TILE)
    z = _logits(h_ref, w_ref, columns, width, options)
    dz = dense_ref[...][:, None] * jnp.exp(z - shift_ref[...][:, None])
    if options.tempered:
        tempered = jnp.exp(z / options.temperature - shift_tempered_ref[...][:, None])
        dz += tempered_ref[...][:, None] * tempered
    label = ids_ref.shape[0] - 1

    def add(m: Array, dz: Array) -> Array:
        ids = ids_ref[m, :]

        def update(dz: Array) -> Array:
            here = at_ref[m, :][:, None]
            # Under a tail the dense part leaves the support out.
            here = jnp.where(m < label, here, dz + here) if options.tail else dz + here
            return jnp.where(columns[None, :] == ids[:, None], here, dz)

        return _where_any(_inside(ids, first), update, dz)

    dz = jax.lax.fori_loop(0, label + 1, add, dz) * options.logit_scale
    if options.logit_cap is not None:
        dz *= 1 - (z / options.logit_cap) * (z / options.logit_cap)
    dz = jnp.where((columns < limit_ref[0])[None, :], dz, 0.0).astype(out_ref.dtype)
    plgpu.store(out_ref, dz, mask=jnp.broadcast_to((columns < width)[None, :], dz.shape))
