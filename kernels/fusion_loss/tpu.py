"""The fused loss's two steps as Pallas kernels for TPUs (Mosaic): no logits in HBM, only their gradient.

`statistics` goes over tiles of tokens × columns with a running maximum and sums; `dlogits` makes each tile's logits
again and writes their gradient in the hidden states' dtype. So a block costs one matmul more than in `xla`, and half
the memory in bfloat16 or less.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from fusejax.kernels.fusion_loss.terms import Options, Slopes, Statistics
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TILES_BYTES = 1 << 24  # of VMEM for the two factors' tiles, each held twice


def statistics(
    h: Array, weights: Array, ids: Array, valid: Array | None, options: Options
) -> tuple[Statistics, tuple[Array, Array, Array]]:
    """As `xla.statistics`."""
    (T, D), W = h.shape, weights.shape[1]
    limit = jnp.full((1,), W if valid is None else valid, jnp.int32)
    tiles = _Tiles(T, D, W, ids.shape[1], h.dtype.itemsize)
    column = jax.ShapeDtypeStruct((T, 1), jnp.float32)
    at, *others = pl.pallas_call(
        partial(_statistics_kernel, options=options),
        grid=tiles.grid,
        in_specs=[tiles.scalar, tiles.hidden, tiles.table, tiles.per_row(ids.shape[1])],
        out_specs=[tiles.per_row(ids.shape[1]), *[tiles.per_row(1)] * 3],
        out_shape=[jax.ShapeDtypeStruct(ids.shape, jnp.float32), column, column, column],
        scratch_shapes=[
            pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32),
            *[pltpu.VMEM((tiles.rows, 1), jnp.float32)] * 4,
        ],
        interpret=options.interpret,
        name="fusion_loss_statistics",
        **tiles.compiler_options(2 * T * D * W, h, weights, 0, across_columns="arbitrary"),
    )(limit, h, weights, ids)
    lse, tempered, mean = (x[:, 0] for x in others)
    found = Statistics(at, lse, tempered if options.tempered else None, mean if options.model_entropy else None)
    return found, (h, weights, limit)


def dlogits(kept: tuple[Array, Array, Array], ids: Array, slopes: Slopes, options: Options) -> Array:
    """∂ Σ loss / ∂ (h @ weights), [T, V] in h's dtype."""
    h, weights, limit = kept
    (T, D), W = h.shape, weights.shape[1]
    M1 = ids.shape[1]
    tiles = _Tiles(T, D, W, M1, h.dtype.itemsize)
    zeros = jnp.zeros_like(slopes.dense)
    per_token = [slopes.dense, slopes.shift, slopes.tempered, slopes.shift_tempered]
    per_token = [(zeros if x is None else x)[:, None] for x in per_token]
    return pl.pallas_call(
        partial(_dlogits_kernel, options=options),
        grid=tiles.grid,
        in_specs=[
            tiles.scalar,
            tiles.hidden,
            tiles.table,
            tiles.per_row(M1),
            tiles.per_row(M1),
            *[tiles.per_row(1)] * 4,
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda t, v: (t, v)),
        out_shape=jax.ShapeDtypeStruct((T, W), h.dtype),
        scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)] * 2,
        interpret=options.interpret,
        name="fusion_loss_dlogits",
        **tiles.compiler_options(2 * T * D * W, h, weights, T * W * h.dtype.itemsize, across_columns="parallel"),
    )(limit, h, weights, ids, slopes.at, *per_token)


class _Tiles:
    """The grid over tokens × columns, and the tiles of each operand."""

    def __init__(self, T: int, D: int, W: int, M1: int, itemsize: int) -> None:
        tile = next((n for n in (512, 256) if 4 * n * D * itemsize <= _TILES_BYTES), 128)
        self.rows, self.columns = min(tile, -(-T // 16) * 16), min(tile, -(-W // 128) * 128)
        self.grid = (pl.cdiv(T, self.rows), pl.cdiv(W, self.columns))
        self.scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
        self.hidden = pl.BlockSpec((self.rows, D), lambda t, v: (t, 0))
        self.table = pl.BlockSpec((D, self.columns), lambda t, v: (0, v))

    def per_row(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.rows, width), lambda t, v: (t, 0))

    def compiler_options(
        self, flops: int, h: Array, weights: Array, written: int, across_columns: Literal["parallel", "arbitrary"]
    ) -> dict:
        read = h.nbytes + self.grid[0] * weights.nbytes
        cost = pl.CostEstimate(
            flops=flops, bytes_accessed=read + written, transcendentals=h.shape[0] * weights.shape[1]
        )
        semantics = pltpu.CompilerParams(
            dimension_semantics=("parallel", across_columns), vmem_limit_bytes=2 * _TILES_BYTES
        )
        return {"compiler_params": semantics, "cost_estimate": cost}


def _logits(h_ref: Array, w_ref: Array, options: Options) -> Array:
    z = jnp.dot(h_ref[...], w_ref[...], preferred_element_type=jnp.float32) * options.logit_scale
    return z if options.logit_cap is None else options.logit_cap * jnp.tanh(z / options.logit_cap)


def _columns(shape: tuple[int, ...], first: Array | int) -> Array:
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _pick(x: Array, m: Array | int) -> Array:
    """x[:, m : m + 1], for a traced m."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.sum(jnp.where(lanes == m, x, jnp.zeros((), x.dtype)), 1, keepdims=True)


def _statistics_kernel(
    limit_ref, h_ref, w_ref, ids_ref, at_ref, lse_ref, tempered_ref, mean_ref, z_ref, top_ref, sum_ref, sum_τ_ref,
    weighted_ref, *, options: Options,
):  # fmt: skip
    """Adds this tile's columns to the running statistics of its tokens; the last tile writes them."""
    τ = options.temperature
    M1 = ids_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        for ref in (at_ref, sum_ref, sum_τ_ref, weighted_ref):
            ref[...] = jnp.zeros_like(ref)

    z = _logits(h_ref, w_ref, options)
    first = pl.program_id(1) * z.shape[1]
    columns = _columns(z.shape, first)
    z_ref[...] = jnp.where(columns < limit_ref[0], z, -jnp.inf)
    ids, lanes = ids_ref[...], jax.lax.broadcasted_iota(jnp.int32, ids_ref.shape, 1)

    def find(m: Array, _: None) -> None:
        z = z_ref[...]
        hit = _columns(z.shape, first) == _pick(ids, m)
        at_ref[...] += jnp.where(lanes == m, jnp.sum(jnp.where(hit, z, 0.0), 1, keepdims=True), 0.0)

    def exclude(m: Array, _: None) -> None:
        z = z_ref[...]
        z_ref[...] = jnp.where(_columns(z.shape, first) == _pick(ids, m), -jnp.inf, z)

    jax.lax.fori_loop(0, M1, find, None)
    if options.tail:
        jax.lax.fori_loop(0, M1 - 1, exclude, None)
    z = z_ref[...]
    top = jnp.maximum(top_ref[...], jnp.max(z, 1, keepdims=True))
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    faded, e = top_ref[...] - shift, jnp.exp(z - shift)
    sum_ref[...] = sum_ref[...] * jnp.exp(faded) + jnp.sum(e, 1, keepdims=True)
    if options.tempered:
        sum_τ_ref[...] = sum_τ_ref[...] * jnp.exp(faded / τ) + jnp.sum(jnp.exp((z - shift) / τ), 1, keepdims=True)
    if options.model_entropy:
        parts = jnp.sum(jnp.where(e > 0, e * z, 0.0), 1, keepdims=True)
        weighted_ref[...] = weighted_ref[...] * jnp.exp(faded) + parts
    top_ref[...] = top

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        top, total = top_ref[...], sum_ref[...]
        lse_ref[...] = top + jnp.log(total)
        tempered_ref[...] = top / τ + jnp.log(sum_τ_ref[...])
        mean_ref[...] = jnp.where(total > 0, weighted_ref[...] / total, 0.0)


def _dlogits_kernel(
    limit_ref, h_ref, w_ref, ids_ref, at_ref, dense_ref, shift_ref, tempered_ref, shift_τ_ref, out_ref, z_ref, dz_ref,
    *, options: Options,
):  # fmt: skip
    """One tile's logits again, and their gradient."""
    z_ref[...] = _logits(h_ref, w_ref, options)
    z = z_ref[...]
    first = pl.program_id(1) * z.shape[1]
    M = ids_ref.shape[1] - 1
    dz_ref[...] = dense_ref[...] * jnp.exp(z - shift_ref[...])
    if options.tempered:
        dz_ref[...] += tempered_ref[...] * jnp.exp(z / options.temperature - shift_τ_ref[...])
    ids, at = ids_ref[...], at_ref[...]

    def add(m: Array, _: None) -> None:
        dz = dz_ref[...]
        here = _pick(at, m)
        # Under a tail the dense part leaves the support out.
        here = jnp.where(m < M, here, dz + here) if options.tail else dz + here
        dz_ref[...] = jnp.where(_columns(dz.shape, first) == _pick(ids, m), here, dz)

    jax.lax.fori_loop(0, M + 1, add, None)
    dz = dz_ref[...] * options.logit_scale
    if options.logit_cap is not None:
        dz = dz * (1 - (z_ref[...] / options.logit_cap) ** 2)
    out_ref[...] = jnp.where(_columns(dz.shape, first) < limit_ref[0], dz, 0.0).astype(out_ref.dtype)
