"""A Pallas kernel for TPUs (Mosaic): tiles of tokens × columns, with a running top-k and log-sum-exp in VMEM.

The best k so far of a token lie in the lanes of a row, sorted. A tile's logits go in one by one, the greatest first,
and only as long as one of them beats some token's k-th best: few columns of a later tile do.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed.candidates import Candidates
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TILES_BYTES = 1 << 24  # of VMEM for the two factors' tiles, each held twice
_LANES = 128


def topk_unembed(
    hidden_TD: jax.Array,
    unembedding_DV: jax.Array,
    labels_T: jax.Array,
    valid: jax.Array | None = None,
    *,
    k: int,
    vocab_size: int,
    logit_scale: float,
    logit_cap: float | None,
    block: int | None = None,
    interpret: bool = False,
) -> Candidates:
    """As `xla.topk_unembed`; `block`: columns of a tile, a multiple of 128."""
    T, D = hidden_TD.shape
    table = unembedding_DV.astype(hidden_TD.dtype)
    # A product of float32 factors at full precision holds them once more, in pieces.
    itemsize = table.dtype.itemsize * (2 if table.dtype == jnp.float32 else 1)
    tile = next((n for n in (512, 256) if 4 * n * D * itemsize <= _TILES_BYTES), _LANES)
    rows, columns = min(tile, -(-T // 16) * 16), min(block or tile, -(-vocab_size // _LANES) * _LANES)
    lanes = max(-(-k // _LANES), 1) * _LANES
    limit = jnp.full((1,), vocab_size if valid is None else valid, jnp.int32)
    per_row = lambda width: pl.BlockSpec((rows, width), lambda t, v: (t, 0))  # noqa: E731
    column = jax.ShapeDtypeStruct((T, 1), jnp.float32)
    grid = (pl.cdiv(T, rows), pl.cdiv(vocab_size, columns))
    values, ids, lse, label = pl.pallas_call(
        partial(_kernel, k=k, logit_scale=logit_scale, logit_cap=logit_cap),
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((rows, D), lambda t, v: (t, 0)),
            pl.BlockSpec((D, columns), lambda t, v: (0, v)),
            per_row(1),
        ],
        out_specs=[per_row(lanes), per_row(lanes), per_row(1), per_row(1)],
        out_shape=[
            jax.ShapeDtypeStruct((T, lanes), jnp.float32),
            jax.ShapeDtypeStruct((T, lanes), jnp.int32),
            column,
            column,
        ],
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32), *[pltpu.VMEM((rows, 1), jnp.float32)] * 2],
        interpret=interpret,
        name="topk_unembed",
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=2 * _TILES_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * D * vocab_size,
            bytes_accessed=hidden_TD.nbytes + grid[0] * table.nbytes,
            transcendentals=T * vocab_size,
        ),
    )(limit, hidden_TD, table, labels_T[:, None])
    return Candidates(values[:, :k], ids[:, :k], lse[:, 0], label[:, 0])


def _kernel(
    limit_ref: Any, h_ref: Any, w_ref: Any, labels_ref: Any, values_ref: Any, ids_ref: Any, lse_ref: Any,
    label_ref: Any, z_ref: Any, top_ref: Any, sum_ref: Any, *, k: int, logit_scale: float, logit_cap: float | None,
) -> None:  # fmt: skip
    """Adds this tile's columns to what is known of its tokens; the last tile writes the log-normalizers."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        values_ref[...] = jnp.full_like(values_ref, -jnp.inf)
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        for ref in (ids_ref, sum_ref, label_ref):
            ref[...] = jnp.zeros_like(ref)

    # Accelerators would otherwise round float32 factors to fewer bits.
    precision = jax.lax.Precision.HIGHEST if h_ref.dtype == jnp.float32 else None
    z = jnp.dot(h_ref[...], w_ref[...], preferred_element_type=jnp.float32, precision=precision) * logit_scale
    if logit_cap is not None:
        z = logit_cap * jnp.tanh(z / logit_cap)
    columns = pl.program_id(1) * z.shape[1] + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    z = jnp.where(columns < limit_ref[0], z, -jnp.inf)
    label_ref[...] += jnp.sum(jnp.where(columns == labels_ref[...], z, 0.0), 1, keepdims=True)
    highest = jnp.max(z, 1, keepdims=True)
    top = jnp.maximum(top_ref[...], highest)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    sum_ref[...] = sum_ref[...] * jnp.exp(top_ref[...] - shift) + jnp.sum(jnp.exp(z - shift), 1, keepdims=True)
    top_ref[...] = top
    if k:
        z_ref[...] = z
        _insert(columns, values_ref, ids_ref, z_ref, k)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        lse_ref[...] = top_ref[...] + jnp.log(sum_ref[...])


def _insert(columns: jax.Array, values_ref: Any, ids_ref: Any, z_ref: Any, k: int) -> None:
    """Merge the tile z into the sorted rows of values and ids; z is used up."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, values_ref.shape, 1)

    def beats() -> jax.Array:
        """bool [rows, 1]; never true of a row that is not numbers."""
        worst = jnp.min(jnp.where(lanes < k, values_ref[...], jnp.inf), 1, keepdims=True)
        return jnp.max(z_ref[...], 1, keepdims=True) > worst

    def insert(_: jax.Array) -> jax.Array:
        z, values, ids = z_ref[...], values_ref[...], ids_ref[...]
        best = jnp.where(beats(), jnp.max(z, 1, keepdims=True), -jnp.inf)
        # The first of equals, and after those of earlier tiles: ties go to the lower id.
        where = jnp.min(jnp.where(z == best, columns, jnp.iinfo(jnp.int32).max), 1, keepdims=True)
        before = values >= best
        place = jnp.sum(before.astype(jnp.int32), 1, keepdims=True)
        moved, moved_ids = pltpu.roll(values, 1, 1), pltpu.roll(ids, 1, 1)
        values_ref[...] = jnp.where(lanes == place, best, jnp.where(before, values, moved))
        ids_ref[...] = jnp.where(lanes == place, where, jnp.where(before, ids, moved_ids))
        z_ref[...] = jnp.where(columns == where, -jnp.inf, z)
        return jnp.any(beats())

    jax.lax.while_loop(lambda go: go, insert, jnp.any(beats()))
