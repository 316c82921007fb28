"""The training loss: L = λ · L_CLM + (1 − λ) · L_Fusion, from hidden states and sparse fused targets.

Both terms come out of one pass over the logits, made and dropped block by block, so that fusing costs what a plain
cross-entropy costs. `fusejax.kernels.fusion_loss` holds the pass and what it is checked against (`reference`).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from fusejax import arguments, sharding
from fusejax.kernels.fusion_loss import passes, terms

Kind = Literal["ce", "kl"]
Tail = Literal["tail", "renormalize"]
Gradients = Literal["forward", "recompute"]
Implementation = Literal["auto", "xla", "tpu", "gpu"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, float32 scalars. A mean is a sum divided by `count`, after both were added over microbatches.

    total: λ·clm + (1−λ)·fusion + z_loss, the one differentiable field. clm: cross-entropy of the labels, nats.
    fusion: divergence from the fused targets, nats. z_loss: as added to total. count: Σ mask.
    target_entropy: entropy of the fused targets, the tail as one event (before temperature), nats.
    model_entropy: entropy of the model's distribution; 0 unless asked for.
    """

    total: Array
    clm: Array
    fusion: Array
    z_loss: Array
    count: Array
    target_entropy: Array
    model_entropy: Array


def clm_weight(step: Array | int, steps: int, start: float, schedule: str = "constant") -> Array:
    """λ at `step`: `start` throughout, or rising linearly to 1: start + (1 − start)·step/steps. float32[]."""
    if schedule == "constant":
        return jnp.asarray(start, jnp.float32)
    if schedule != "linear":
        raise ValueError(f"clm_weight: schedule {schedule!r} should be constant or linear")
    return start + (1 - start) * jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0, 1)


def fusion_loss(
    hidden: Array,
    unembedding: Array,
    labels: Array,
    target_ids: Array,
    target_probs: Array,
    mask: Array | None = None,
    *,
    weight_clm: Array | float,
    kind: Kind = "ce",
    temperature: float = 1.0,
    tail: Tail = "tail",
    fusion_mask: Array | None = None,
    block: int | None = None,
    mesh: Mesh | None = None,
    logit_scale: float = 1.0,
    logit_cap: float | None = None,
    z_loss: float = 0.0,
    model_entropy: bool = False,
    gradients: Gradients = "forward",
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> LossSums:
    """λ · L_CLM + (1 − λ) · L_Fusion ("Knowledge Fusion of Large Language Models", section 3.1), summed over tokens.

    Shapes, with any leading dimensions `...`: hidden float[..., D] (float32 or bfloat16: the matmuls' type; they add up
    in float32), unembedding float[D, V], labels int32[...] (−1: no label, the row counts for nothing), target_ids
    int32[..., M] (−1: empty; repeats add up), target_probs float[..., M] (0 ≤, row sum ≤ 1), mask bool or float[...]
    (per-token weights). With logits z = logit_scale · hidden @ unembedding, capped to logit_cap · tanh(z/logit_cap):

      clm    = logsumexp(z) − z[label]
      fusion = Σ_e t_e · (−log s_e) for kind `ce`;  Σ_e t_e · (log t_e − log s_e) for `kl`

    Under tail `renormalize` the events e are the V tokens, t the target scaled to sum 1 and tempered (t ∝ q^(1/τ)), and
    s = softmax(z/τ). Under `tail` they are the target's ids and one event for all other tokens together, t its
    probabilities 1 − Σq included and s the model's probabilities of the same events; with a temperature both sides'
    event probabilities, the tail's like any other, are raised to 1/τ and scaled to sum 1. So the divergence is ≥ 0 and,
    at τ = 1, at most that of the full distributions. No factor τ² is applied. z_loss · logsumexp(z)² may be added.

    What the arrays hold is not checked. A negative label is no label. Labels and ids of V or more are no column: their
    logit counts as 0 and the row's loss means nothing. A probability that is NaN, infinite or negative counts as 0, its
    id stays in the support. A row that sums to more than 1 has no tail and is scaled to 1 under `renormalize` or with a
    temperature; else it weighs as much as it sums to. Under `tail`, a support of all V tokens with mass missing has an
    infinite divergence; returned is the sum over the support, without the missing mass.

    weight_clm is λ, a float or a traced scalar. fusion_mask float[...] weighs the fusion term on its own (default:
    mask where there is a label), labels or not; `count` remains that of the CLM term. block: about how many tokens
    share one block of logits on a device (default: 64 MB of float32, but at least 2048 tokens, on a CPU 512); none is
    larger. mesh: the tokens are split over its batch axes and the vocabulary over its tensor axis; the result is the
    same. gradients: `forward` makes them in the forward pass (3 matmuls instead of 4, and D·V float32 kept until the
    backward pass), `recompute` in the backward pass. implementation: `xla`, or the Pallas kernels for `tpu` or `gpu`;
    `auto` is `xla` (docs/kernels.md says why). interpret: run Pallas kernels as plain XLA, slowly, for tests. Only
    `total` is differentiable, in hidden and unembedding. Raises ValueError for shapes that do not belong together, and
    for options out of range as far as they are not traced.

    >>> hidden, unembedding = jnp.eye(2, 4), jnp.eye(4, 6)
    >>> sums = fusion_loss(
    ...     hidden, unembedding, jnp.array([0, 1]), jnp.array([[0], [1]]), jnp.ones((2, 1)), weight_clm=0.9
    ... )
    >>> bool(jnp.allclose(sums.total, sums.clm)), float(sums.count)  # one-hot targets: the fusion loss is the CLM loss
    (True, 2.0)
    """
    arrays = {"labels": labels, "mask": mask, "fusion_mask": fusion_mask}
    _check_shapes(hidden, unembedding, target_ids, target_probs, arrays)
    arguments.one_of("kind", kind, get_args(Kind))
    arguments.one_of("tail", tail, get_args(Tail))
    arguments.one_of("gradients", gradients, get_args(Gradients))
    arguments.one_of("implementation", implementation, get_args(Implementation))
    arguments.within("weight_clm", weight_clm, 0, 1)
    arguments.within("temperature", temperature, above=0)
    arguments.within("logit_scale", logit_scale, above=0)
    arguments.within("z_loss", z_loss, 0)
    arguments.optional("logit_cap", logit_cap, above=0)
    arguments.optional("block", block, 1)
    D = unembedding.shape[0]
    T, M = labels.size, target_ids.shape[-1]
    on_clm = _clm_weights(labels, mask)
    on_fusion = on_clm if fusion_mask is None else fusion_mask.astype(jnp.float32)
    rows = terms.Rows(
        labels=labels.reshape(T),
        ids=target_ids.reshape(T, M),
        probs=target_probs.reshape(T, M),
        clm_weight=on_clm.reshape(T),
        fusion_weight=on_fusion.reshape(T),
    )
    options = terms.Options(
        block=block,
        placement=sharding.placement(mesh),
        implementation="xla" if implementation == "auto" else implementation,
        interpret=interpret,
        divergence=kind == "kl",
        temperature=temperature,
        tail=tail == "tail",
        logit_scale=logit_scale,
        logit_cap=logit_cap,
        z_loss=z_loss,
        model_entropy=model_entropy,
        gradients=gradients,
    )
    λ = jnp.asarray(weight_clm, jnp.float32)
    total, sums = passes.losses(hidden.reshape(T, D), unembedding, jax.lax.stop_gradient(rows), λ, options)
    sums = jax.lax.stop_gradient(sums)
    return LossSums(
        total=total,
        clm=sums.clm,
        fusion=sums.fusion,
        z_loss=sums.z_loss,
        count=jnp.sum(on_clm),
        target_entropy=sums.target_entropy,
        model_entropy=sums.entropy,
    )


def clm_loss(hidden: Array, unembedding: Array, labels: Array, mask: Array | None = None, **options) -> LossSums:
    """The causal language-model loss alone, made the same way: `fusion_loss` with λ = 1 and empty targets.

    hidden float[..., D], unembedding float[D, V], labels int32[...] (−1: none), mask bool or float[...]; options:
    block, mesh, logit_scale, logit_cap, z_loss, model_entropy, gradients, implementation. `fusion` and `target_entropy`
    are 0.

    >>> sums = clm_loss(jnp.zeros((3, 4)), jnp.zeros((4, 8)), jnp.array([1, 2, -1]))
    >>> round(float(sums.total / sums.count), 4)  # log 8
    2.0794
    """
    none = jnp.zeros((*labels.shape, 0), jnp.float32)
    return fusion_loss(
        hidden,
        unembedding,
        labels,
        none.astype(jnp.int32),
        none,
        mask,
        weight_clm=1.0,
        tail="renormalize",
        **options,
    )


def _check_shapes(
    hidden: Array, unembedding: Array, target_ids: Array, target_probs: Array, arrays: dict[str, Any]
) -> None:
    """ValueError where the arrays are not of the same tokens."""
    lead = hidden.shape[:-1]
    arguments.shape("unembedding", unembedding, (hidden.shape[-1], *unembedding.shape[1:2]), "[D, V] with hidden's D")
    why = f"the leading dimensions of hidden {hidden.shape}"
    for name, array in arrays.items():
        arguments.shape(name, array, lead, why)
    arguments.shape("target_ids", target_ids, (*lead, target_ids.shape[-1]), f"[..., M] with {why}")
    arguments.shape("target_probs", target_probs, target_ids.shape, "that of target_ids")


def _clm_weights(labels: Array, mask: Array | None) -> Array:
    weights = jnp.ones(labels.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    return jnp.where(labels >= 0, weights, 0.0)
