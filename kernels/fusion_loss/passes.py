"""The fused loss over all tokens: block by block, on one device or over a mesh, with its own derivative rule.

No array of tokens × vocabulary beyond one block is made. Each device goes over its own tokens with its own columns of
the unembedding; where the vocabulary is split, the devices of a row exchange a few floats per token and block
(`terms.across`), so that all of them know the log-sum-exp of the whole vocabulary.
"""

import importlib
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from fusejax.kernels.fusion_loss.events import targets
from fusejax.kernels.fusion_loss.terms import Options, Rows, Sums, across, terms
from fusejax.kernels.placement import Placement, own_ids, platform_of
from jax import Array
from jax.sharding import PartitionSpec


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def losses(hidden: Array, unembedding: Array, rows: Rows, weight_clm: Array, options: Options) -> tuple[Array, Sums]:
    """hidden [T, D], unembedding [D, V], weight_clm λ float32[] → (λ·clm + (1−λ)·fusion + z_loss, the parts).

    Differentiable in hidden and unembedding, through the first result only.
    """
    return _over_mesh(hidden, unembedding, rows, weight_clm, options, with_gradients=False)[0]


def _forward(
    hidden: Array, unembedding: Array, rows: Rows, weight_clm: Array, options: Options
) -> tuple[tuple[Array, Sums], tuple[Array, ...] | tuple]:
    if options.gradients == "forward":
        out, *gradients = _over_mesh(hidden, unembedding, rows, weight_clm, options, with_gradients=True)
        like = (jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), unembedding.dtype))
        return out, (gradients, like, rows, weight_clm)
    out = _over_mesh(hidden, unembedding, rows, weight_clm, options, with_gradients=False)[0]
    return out, (None, (hidden, unembedding), rows, weight_clm)


def _backward(options: Options, saved: tuple, cotangents: tuple[Array, Sums]) -> tuple:
    gradients, like, rows, weight_clm = saved
    if gradients is None:
        hidden, unembedding = like
        _, *gradients = _over_mesh(hidden, unembedding, rows, weight_clm, options, with_gradients=True)
    scaled = ((g * cotangents[0]).astype(x.dtype) for g, x in zip(gradients, like, strict=True))
    return (*scaled, None, None)


losses.defvjp(_forward, _backward)


def _over_mesh(
    hidden: Array, unembedding: Array, rows: Rows, weight_clm: Array, options: Options, with_gradients: bool
) -> tuple:
    """Returns ((total, sums), gradient of hidden, gradient of unembedding), the gradients only where asked for."""
    weights = unembedding.astype(hidden.dtype)
    placement = options.placement
    if placement is None:
        return _over_blocks(hidden, weights, rows, weight_clm, None, options=options, with_gradients=with_gradients)
    (T, D), V = hidden.shape, weights.shape[1]
    weights, (hidden, rows) = placement.padded(weights, (hidden, rows))
    tokens, columns = PartitionSpec(placement.batch), PartitionSpec(None, placement.vocab)
    at_rest = placement.embed if D % placement.mesh.shape[placement.embed] == 0 else None
    results: tuple = ((PartitionSpec(), PartitionSpec()),)
    if with_gradients:
        results += (tokens, PartitionSpec(at_rest, placement.vocab))
    run = jax.shard_map(
        partial(_on_device, vocab_size=V, at_rest=at_rest, options=options, with_gradients=with_gradients),
        mesh=placement.mesh,
        in_specs=(tokens, columns, tokens, PartitionSpec()),
        out_specs=results,
        check_vma=False,
    )
    out, *gradients = run(hidden, weights, rows, weight_clm)
    return (out, gradients[0][:T], gradients[1][:, :V]) if gradients else (out,)


def _on_device(
    hidden: Array,
    weights: Array,
    rows: Rows,
    weight_clm: Array,
    *,
    vocab_size: int,
    at_rest: str | None,
    options: Options,
    with_gradients: bool,
) -> tuple:
    """`_over_blocks` of this device's tokens and columns, the results added up over the mesh."""
    placement = options.placement
    assert placement is not None
    first, valid = placement.own_columns(weights.shape[1], vocab_size)
    out, *gradients = _over_blocks(
        hidden,
        weights,
        rows,
        weight_clm,
        valid,
        first=first,
        options=options,
        with_gradients=with_gradients,
    )
    out = jax.lax.psum(out, placement.batch)
    if not gradients:
        return (out,)
    grad_TD, grad_DV = gradients
    if at_rest is None:
        return out, grad_TD, jax.lax.psum(grad_DV, placement.batch)
    others = tuple(axis for axis in placement.batch if axis != at_rest)
    grad_DV = jax.lax.psum_scatter(grad_DV, at_rest, scatter_dimension=0, tiled=True)
    return out, grad_TD, jax.lax.psum(grad_DV, others)


def _over_blocks(
    hidden: Array,
    weights: Array,
    rows: Rows,
    weight_clm: Array,
    valid: Array | None,
    *,
    options: Options,
    with_gradients: bool,
    first: Array | int = 0,
) -> tuple:
    """One device's part: as `_over_mesh`, `weights` [D, W] being the vocabulary's columns first .. first + W.

    Of them those from `valid` on are padding (None: none are).
    """
    T, D = hidden.shape
    kernel = _implementation(options)
    placement = options.placement
    split = placement is not None and placement.vocab_shards > 1
    n = max(1, -(-T // (options.block or _block_tokens(weights.shape[1], placement))))
    size = -(-T // n)

    def blocks(x: Array) -> Array:
        """[T, …] → [n, size, …]"""
        x = jnp.pad(x, [(0, size * n - T)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(n, size, *x.shape[1:])

    def step(carry: tuple, block: tuple[Array, Rows]) -> tuple[tuple, Array | None]:
        total, sums, grad_DV = carry
        h, r = block
        # Whatever a row that counts for nothing holds (padding may be NaN), 0 · NaN must not reach the gradients.
        h = jnp.where(((r.clm_weight != 0) | (r.fusion_weight != 0))[:, None], h, jnp.zeros((), h.dtype))
        target = targets(r, options)
        ids = own_ids(jnp.concatenate([target.ids, r.labels[:, None]], -1), first, weights.shape[1])
        found, kept = kernel.statistics(h, weights, ids, valid, options)
        if split:
            found = across(found, placement.vocab)
        value, parts, slopes = terms(found, r, target, weight_clm, options)
        total, sums = total + value, jax.tree.map(jnp.add, sums, parts)
        if not with_gradients:
            return (total, sums, None), None
        dlogits = kernel.dlogits(kept, ids, slopes, options).astype(h.dtype)
        grad_h = jnp.einsum("tv,dv->td", dlogits, weights, preferred_element_type=jnp.float32)
        if split:
            grad_h = jax.lax.psum(grad_h, placement.vocab)
        # Transposed on its own, as XLA's CPU kernels contract the last axis of the first factor a fifth faster.
        h_DT = jax.lax.optimization_barrier(h.T)
        grad_DV += jnp.einsum("dt,tv->dv", h_DT, dlogits, preferred_element_type=jnp.float32)
        return (total, sums, grad_DV), grad_h.astype(h.dtype)

    zero = jnp.zeros((), jnp.float32)
    grad_DV = jnp.zeros(weights.shape, jnp.float32) if with_gradients else None
    carry = (zero, Sums(zero, zero, zero, zero, zero), grad_DV)
    (total, sums, grad_DV), grads = jax.lax.scan(step, carry, jax.tree.map(blocks, (hidden, rows)))
    if grad_DV is None:
        return ((total, sums),)
    return (total, sums), jnp.asarray(grads).reshape(size * n, D)[:T], grad_DV


def _block_tokens(columns: int, placement: Placement | None) -> int:
    """Tokens of one block on a device that holds so many columns of the vocabulary: 64 MB of float32 logits, or more.

    Every block reads and writes the gradient of the unembedding once, 8·D·V bytes beside its 8·D·V flops a token. On an
    H200, 2048 tokens took 15 to 26% less time than 512, and 4096 no less; a CPU computes slower, and 512 do.
    """
    return max(512 if platform_of(placement) == "cpu" else 2048, (1 << 24) // columns)


def _implementation(options: Options) -> ModuleType:
    """The module that makes a block; Pallas is imported only where it is asked for."""
    return importlib.import_module(f"fusejax.kernels.fusion_loss.{options.implementation}")
