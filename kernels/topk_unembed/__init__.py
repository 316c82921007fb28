"""From final hidden states to the top-k next-token log-probabilities and the cross-entropy of given labels.

    logits = logit_cap(logit_scale · hidden · unembedding)      logit_cap(x) = c · tanh(x / c)
    log p  = logits − logsumexp(logits)

`reference` writes this down on the whole [T, V] array; `xla` goes over the vocabulary in blocks and never holds more
than one of them. Both give the same ids (ties: the lower id first) and the same values within float32 rounding.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from fusejax.kernels.topk_unembed import reference, xla
from fusejax.kernels.topk_unembed.reference import TopK

__all__ = ["TopK", "topk_unembed"]

Implementation = Literal["auto", "reference", "xla"]


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
    implementation: Implementation = "auto",
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
      implementation: "auto" takes the fastest for the backend.

    Returns:
      TopK(ids int32 [..., k], logprobs float32 [..., k] sorted descending, log_normalizer float32 [...],
      ce float32 [...] in nats, 0 where there is no label).

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
    hidden_TD = hidden.reshape(-1, D)
    T = hidden_TD.shape[0]
    labels_T = jnp.full(T, -1, jnp.int32) if labels is None else labels.reshape(T)
    options: dict[str, Any] = {
        "k": k,
        "vocab_size": vocab_size,
        "logit_scale": logit_scale,
        "logit_cap": logit_cap,
    }
    if implementation == "reference":
        out = reference.topk_unembed(hidden_TD, unembedding_DV, labels_T, **options)
    elif implementation in ("auto", "xla"):
        options["block"] = block or xla.default_block(T)
        out = xla.topk_unembed(hidden_TD, unembedding_DV, labels_T, **options)
    else:
        raise ValueError(f"unknown implementation {implementation!r}: auto, reference or xla")
    return TopK(*(x.reshape(lead + x.shape[1:]) for x in out))
