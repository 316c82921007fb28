"""From final hidden states to the top-k next-token log-probabilities and the cross-entropy of given labels.

    logits = logit_cap(logit_scale · hidden · unembedding)      logit_cap(x) = c · tanh(x / c)
    log p  = logits − logsumexp(logits)

`reference` writes this down on the whole [T, V] array; `xla` goes over the vocabulary in blocks and never holds more
than one of them; `tpu` is a Pallas kernel that holds a tile. All give the same ids (ties: the lower id first) and the
same values within float32 rounding. Over a mesh each device searches its own columns of the vocabulary, and the k best
of each are merged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from fusejax.kernels.placement import Placement, on_mesh, own_ids, platform_of
from fusejax.kernels.topk_unembed import reference, xla
from fusejax.kernels.topk_unembed.candidates import Candidates, across, finish
from fusejax.kernels.topk_unembed.reference import TopK

from fusejax import arguments

__all__ = ["Implementation", "TopK", "topk_unembed"]

Search = Callable[..., Candidates]
Implementation = Literal["auto", "reference", "xla", "tpu"]


def topk_unembed(
    hidden: jax.Array,
    unembedding_DV: jax.Array,
    labels: jax.Array | None = None,
    *,
    k: int,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    logit_cap: float | None = None,
    block: int | None = None,
    placement: Placement | None = None,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> TopK:
    """Top-k log-probabilities and CE of `labels`, without a [T, V] array (except in `reference`).

    Args:
      hidden: [..., D] final hidden states; the product is computed in their dtype and summed in float32.
      unembedding_DV: [D, V].
      labels: int32 [...], −1 where there is none; None: no labels at all.
      k: how many tokens to keep; 0 keeps none and leaves the cross-entropy. At most `vocab_size`.
      vocab_size: ids from here on are padding of the table: they get probability 0. Default V.
      logit_scale, logit_cap: applied to the logits, in this order.
      block: vocabulary entries at a time (xla); default: about 64 MiB of logits.
      placement: how the tokens and the vocabulary are split over a mesh; None: one device.
      implementation: "reference", "xla", or "tpu", a Pallas kernel; "auto" is "xla" (docs/kernels.md says why).
      interpret: run the Pallas kernel as plain XLA, slowly, for tests.

    Returns:
      TopK(ids int32 [..., k], logprobs float32 [..., k] sorted descending, log_normalizer float32 [...],
      ce float32 [...] in nats, 0 where there is no label).

    Raises:
      ValueError: shapes that do not belong together, options out of range.

    >>> import jax.numpy as jnp
    >>> out = topk_unembed(jnp.ones((1, 2)), jnp.array([[0.0, 3.0, 1.0], [0.0, 1.0, 1.0]]), k=2)
    >>> out.ids.tolist()
    [[1, 2]]
    """
    D, V = unembedding_DV.shape
    vocab_size = V if vocab_size is None else vocab_size
    if not 0 <= k <= vocab_size <= V:
        raise ValueError(f"need 0 <= k <= vocab_size <= V, got k={k}, vocab_size={vocab_size}, V={V}")
    if hidden.shape[-1] != D:
        raise ValueError(f"hidden states have {hidden.shape[-1]} channels, the unembedding {D}")
    lead = hidden.shape[:-1]
    arguments.shape("labels", labels, lead, f"the leading dimensions of hidden {hidden.shape}")
    arguments.one_of("implementation", implementation, get_args(Implementation))
    arguments.within("logit_scale", logit_scale, above=0)
    arguments.optional("logit_cap", logit_cap, above=0)
    arguments.optional("block", block, 1)
    hidden_TD = hidden.reshape(-1, D)
    labels_T = jnp.full(hidden_TD.shape[0], -1, jnp.int32) if labels is None else labels.reshape(-1)
    options: dict[str, Any] = {"k": k, "logit_scale": logit_scale, "logit_cap": logit_cap}
    if implementation == "reference":
        out = reference.topk_unembed(hidden_TD, unembedding_DV, labels_T, vocab_size=vocab_size, **options)
    else:
        search = partial(_search(implementation, interpret, platform_of(placement)), block=block, **options)
        if placement is None:
            found = search(hidden_TD, unembedding_DV, labels_T, vocab_size=vocab_size)
        else:
            run = partial(_on_device, vocab_size=vocab_size, placement=placement, search=search)
            found = on_mesh(run, placement, hidden_TD, unembedding_DV, labels_T)
        out = finish(found, labels_T)
    return TopK(*(x.reshape(lead + x.shape[1:]) for x in out))


def _search(implementation: Implementation, interpret: bool, platform: str) -> Search:
    if implementation != "tpu":
        return partial(xla.topk_unembed, platform=platform)
    from fusejax.kernels.topk_unembed import tpu

    return partial(tpu.topk_unembed, interpret=interpret)


def _on_device(
    hidden_TD: jax.Array,
    table_DW: jax.Array,
    labels_T: jax.Array,
    *,
    vocab_size: int,
    placement: Placement,
    search: Search,
) -> Candidates:
    """The candidates of this device's tokens among its columns, then of all devices."""
    width = table_DW.shape[1]
    first, valid = placement.own_columns(width, vocab_size)
    found = search(hidden_TD, table_DW, own_ids(labels_T, first, width), valid, vocab_size=width)
    found = found._replace(ids=found.ids + first)
    return across(found, placement.vocab) if placement.vocab_shards > 1 else found
