"""In blocks over the vocabulary, with a running top-k and a running log-sum-exp: one [T, block] array at a time.

XLA's top_k on CPUs is one thread's scalar loop: at k = 32 and 262,144 columns it took longer than their products did.
There, the vectorised maxima of groups of columns say first which groups can hold one of the k largest, and fewer tokens
are taken at a time, so that a block has more columns to leave out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed.candidates import Candidates
from fusejax.kernels.topk_unembed.reference import logits_of

_BLOCK_ELEMENTS = 1 << 24  # float32 logits held at a time: 64 MiB
_CPU_TOKENS = 512  # at a time, as in the fused loss
_GROUP = 32  # columns


def default_block(T: int) -> int:
    """Vocabulary entries per block for T rows: a multiple of 128, at least 1024."""
    return max(1024, _BLOCK_ELEMENTS // max(T, 1) // 128 * 128)


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
    block: int | None,
    platform: str,
) -> Candidates:
    """Of the first `vocab_size` columns (and of them those before `valid`): see `fusejax.kernels.topk_unembed`."""
    T = hidden_TD.shape[0]
    n = min(T, _CPU_TOKENS) if platform == "cpu" else T
    logits: dict[str, Any] = {"vocab_size": vocab_size, "logit_scale": logit_scale, "logit_cap": logit_cap}
    take = partial(_take_block, k, _largest if platform == "cpu" else jax.lax.top_k)

    def search(tokens: tuple[jax.Array, jax.Array]) -> Candidates:
        return _search(*tokens, unembedding_DV, valid, k, take, block=block or default_block(n), **logits)

    if n == T:
        return search((hidden_TD, labels_T))
    whole = T // n * n
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, n, *x.shape[1:]), (hidden_TD, labels_T))
    found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(search, parts))
    if whole == T:
        return found
    rest = search((hidden_TD[whole:], labels_T[whole:]))
    return jax.tree.map(lambda *both: jnp.concatenate(both), found, rest)


def _search(
    hidden_TD: jax.Array,
    labels_T: jax.Array,
    unembedding_DV: jax.Array,
    valid: jax.Array | None,
    k: int,
    take: Callable[..., tuple[jax.Array, ...]],
    **logits: Any,
) -> Candidates:
    """All of the given tokens at once, block after block of `over_blocks`."""
    T = hidden_TD.shape[0]
    carry: tuple[jax.Array, ...] = (
        jnp.full((T, k), -jnp.inf),
        jnp.zeros((T, k), jnp.int32),
        jnp.full(T, -jnp.inf),
        jnp.zeros(T),
        jnp.zeros(T),
    )
    carry = over_blocks(partial(take, labels_T), carry, hidden_TD, unembedding_DV, valid, **logits)
    values_TK, ids_TK, max_T, sum_T, label_T = carry
    return Candidates(values_TK, ids_TK, max_T + jnp.log(sum_T), label_T)


def over_blocks(
    step: Callable[[tuple[jax.Array, ...], jax.Array, jax.Array], tuple[jax.Array, ...]],
    carry: tuple[jax.Array, ...],
    hidden_TD: jax.Array,
    unembedding_DV: jax.Array,
    valid: jax.Array | None,
    *,
    vocab_size: int,
    logit_scale: float,
    logit_cap: float | None,
    block: int,
) -> tuple[jax.Array, ...]:
    """The carry after step(carry, logits float32 [T, ≤ block], the first one's id) for the first `vocab_size` columns.

    The logits of columns from `valid` on are −inf; None: there are none such.
    """

    def take(size: int, carry: tuple[jax.Array, ...], start: jax.Array) -> tuple[jax.Array, ...]:
        table_DB = jax.lax.dynamic_slice_in_dim(unembedding_DV, start, size, axis=1)
        logits_TB = logits_of(hidden_TD, table_DB, logit_scale, logit_cap)
        if valid is not None:
            logits_TB = jnp.where(start + jnp.arange(size) < valid, logits_TB, -jnp.inf)
        return step(carry, logits_TB, start)

    whole = vocab_size // block
    if whole:
        starts = jnp.arange(whole, dtype=jnp.int32) * block
        carry, _ = jax.lax.scan(lambda c, start: (take(block, c, start), None), carry, starts)
    # What no whole block covers is a block of its own: padding the table would copy it.
    if vocab_size % block:
        carry = take(vocab_size % block, carry, jnp.int32(whole * block))
    return carry


def _take_block(
    k: int,
    largest: Callable[[jax.Array, int], Sequence[jax.Array]],
    labels_T: jax.Array,
    carry: tuple[jax.Array, ...],
    logits_TB: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, ...]:
    """The carry after a block whose first entry is `start`."""
    values_TK, ids_TK, max_T, sum_T, label_T = carry
    size = logits_TB.shape[1]
    if k:
        new_TK, where_TK = largest(logits_TB, min(k, size))
        # Earlier blocks come first, and top_k keeps the first of equals: ties go to the lower id.
        both = jnp.concatenate([values_TK, new_TK], axis=1)
        both_ids = jnp.concatenate([ids_TK, where_TK.astype(jnp.int32) + start], axis=1)
        values_TK, order_TK = jax.lax.top_k(both, k)
        ids_TK = jnp.take_along_axis(both_ids, order_TK, axis=1)
    top_T = jnp.maximum(max_T, logits_TB.max(axis=1))
    # A row whose logits are all −inf so far would otherwise give −inf − −inf.
    shift_T = jnp.where(top_T == -jnp.inf, 0.0, top_T)
    sum_T = sum_T * jnp.exp(max_T - shift_T) + jnp.exp(logits_TB - shift_T[:, None]).sum(axis=1)
    here_T = labels_T - start
    inside_T = (here_T >= 0) & (here_T < size)
    picked_T = jnp.take_along_axis(logits_TB, jnp.clip(here_T, 0, size - 1)[:, None], axis=1)[:, 0]
    return values_TK, ids_TK, top_T, sum_T, jnp.where(inside_T, picked_T, label_T)


def _largest(x_TB: jax.Array, k: int) -> Sequence[jax.Array]:
    """`jax.lax.top_k`, ties included: the k largest lie in the k groups of columns with the largest maxima.

    Of groups with equal maxima top_k takes the first, and the groups are searched in the order of their columns, so
    that equals go to the lower column as they do there.
    """
    T, B = x_TB.shape
    groups = -(-B // _GROUP)
    if groups <= 2 * k:  # little would be left out
        return jax.lax.top_k(x_TB, k)
    x_TGC = jnp.pad(x_TB, ((0, 0), (0, -B % _GROUP)), constant_values=-jnp.inf).reshape(T, groups, _GROUP)
    group_TK = jnp.sort(jax.lax.top_k(x_TGC.max(axis=2), k)[1], axis=1)
    found = jnp.take_along_axis(x_TGC, group_TK[:, :, None], axis=1).reshape(T, k * _GROUP)
    values_TK, order_TK = jax.lax.top_k(found, k)
    where_TK = jnp.take_along_axis(group_TK, order_TK // _GROUP, axis=1) * _GROUP + order_TK % _GROUP
    return values_TK, where_TK
