"""From final hidden states to independent draws from the next-token distributions: sources of the kind `sampled`.

The share of a token among R draws is an unbiased estimate of its probability, whatever the temperature of the tail:
"Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (ACL 2025) distils from about 12 distinct tokens of
50 draws as well as from the whole distribution, where the k largest, scaled to 1, are a biased target.

A draw is the token in whose share of the distribution function a uniform number lies. `reference` writes this down on
the whole [T, V] array; `xla` takes two passes over the vocabulary in blocks, one for the normalizer and one for the
draws. Over a mesh each device looks through its own columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from fusejax.kernels.placement import Placement, on_mesh, own_ids, platform_of
from fusejax.kernels.sample_unembed import reference, xla
from fusejax.kernels.sample_unembed.reference import Sampled
from fusejax.kernels.topk_unembed import xla as search
from fusejax.kernels.topk_unembed.candidates import across, finish

from fusejax import arguments

__all__ = ["Implementation", "Sampled", "sample_unembed"]

Implementation = Literal["reference", "xla"]

_BLOCK = 8192  # fixed, so that rounding, and with it a draw, does not depend on the size of the batch


def sample_unembed(
    hidden: jax.Array,
    unembedding_DV: jax.Array,
    uniforms: jax.Array,
    labels: jax.Array | None = None,
    *,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    logit_cap: float | None = None,
    block: int = _BLOCK,
    placement: Placement | None = None,
    implementation: Implementation = "xla",
) -> Sampled:
    """Draws and CE of `labels`, without a [T, V] array (except in `reference`).

    hidden: [..., D]; unembedding_DV: [D, V]; uniforms: float32 [..., R] in [0, 1); labels: int32 [...], −1 where there
    is none. vocab_size, logit_scale, logit_cap, placement: as in `topk_unembed`. block: vocabulary entries at a time.
    Returns Sampled(ids int32 [..., R], log_normalizer float32 [...], ce float32 [...] in nats). Raises ValueError for
    shapes that do not belong together and options out of range.
    """
    D, V = unembedding_DV.shape
    lead, R = hidden.shape[:-1], uniforms.shape[-1]
    vocab_size = V if vocab_size is None else vocab_size
    if not 0 < vocab_size <= V:
        raise ValueError(f"need 0 < vocab_size <= V, got vocab_size={vocab_size}, V={V}")
    why = f"the leading dimensions of hidden {hidden.shape}"
    arguments.shape("unembedding_DV", unembedding_DV, (hidden.shape[-1], V), "[D, V] with hidden's D")
    arguments.shape("uniforms", uniforms, (*lead, R), f"[..., R] with {why}")
    arguments.shape("labels", labels, lead, why)
    arguments.one_of("implementation", implementation, get_args(Implementation))
    arguments.within("logit_scale", logit_scale, above=0)
    arguments.optional("logit_cap", logit_cap, above=0)
    arguments.within("block", block, 1)
    hidden_TD, uniforms_TR = hidden.reshape(-1, D), uniforms.reshape(-1, R)
    labels_T = jnp.full(len(hidden_TD), -1, jnp.int32) if labels is None else labels.reshape(-1)
    options: dict[str, Any] = {"logit_scale": logit_scale, "logit_cap": logit_cap}
    run: Callable[..., Sampled]
    if implementation == "reference":
        run = partial(reference.sample_unembed, vocab_size=vocab_size, **options)
    else:
        run = partial(_on_device, vocab_size=vocab_size, placement=placement, block=block, **options)
        if placement is not None:
            run = partial(on_mesh, run, placement)
    out = run(hidden_TD, unembedding_DV, uniforms_TR, labels_T)
    # Rounding can leave a number beside every token's share (about once in a million draws): take another draw of it.
    ids_TR = jnp.where(out.ids < 0, out.ids.max(-1, keepdims=True), out.ids)
    return Sampled(ids_TR.reshape(*lead, R), out.log_normalizer.reshape(lead), out.ce.reshape(lead))


def _on_device(
    hidden_TD: jax.Array,
    table_DW: jax.Array,
    uniforms_TR: jax.Array,
    labels_T: jax.Array,
    *,
    vocab_size: int,
    placement: Placement | None,
    block: int,
    logit_scale: float,
    logit_cap: float | None,
) -> Sampled:
    """The draws among this device's columns, then of all devices."""
    options: dict[str, Any] = {"logit_scale": logit_scale, "logit_cap": logit_cap, "block": block}
    of_labels: dict[str, Any] = options | {"k": 0, "platform": platform_of(placement)}
    if placement is None or placement.vocab_shards == 1:
        found = search.topk_unembed(hidden_TD, table_DW, labels_T, vocab_size=vocab_size, **of_labels)
        done = finish(found, labels_T)
        lse_T, before_T = done.log_normalizer, jnp.zeros(len(hidden_TD))
        ids_TR = xla.draw(hidden_TD, table_DW, uniforms_TR, lse_T, before_T, None, vocab_size=vocab_size, **options)
        return Sampled(ids_TR, done.log_normalizer, done.ce)
    width = table_DW.shape[1]
    first, valid = placement.own_columns(width, vocab_size)
    own_labels_T = own_ids(labels_T, first, width)
    own = search.topk_unembed(hidden_TD, table_DW, own_labels_T, valid, vocab_size=width, **of_labels)
    done = finish(across(own, placement.vocab), labels_T)
    share_T = jnp.exp(own.lse - done.log_normalizer)
    shares_ST = jax.lax.all_gather(share_T, placement.vocab)
    earlier_S1 = jnp.arange(placement.vocab_shards)[:, None] < jax.lax.axis_index(placement.vocab)
    before_T = jnp.where(earlier_S1, shares_ST, 0.0).sum(0)
    lse_T = done.log_normalizer
    ids_TR = xla.draw(hidden_TD, table_DW, uniforms_TR, lse_T, before_T, valid, vocab_size=width, **options)
    ids_TR = jax.lax.pmax(jnp.where(ids_TR >= 0, ids_TR + first, -1), placement.vocab)
    return Sampled(ids_TR, done.log_normalizer, done.ce)
