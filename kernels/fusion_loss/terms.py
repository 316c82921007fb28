"""What the fused loss and its gradient are, given a few numbers of each token: the same for every implementation.

Write z_i for a token's logits, y for its label, t_e for the target's events: its support ids, and with a tail one more,
"anything else". From the log-sum-exp of the logits and the logits at y and at the support ids follow loss and gradient:

  clm    = lse − z_y                                        ∂/∂z_i = p_i − [i = y]
  fusion = Σ_j q_j (lse' − z_j/τ)   without a tail, lse' = log Σ_i exp(z_i/τ); ∂/∂z_i = (Σq · p'_i − q_i)/τ
  fusion = −Σ_e t_e log s_e         with a tail, s = softmax over events of ℓ/τ, ℓ_e the model's log-probability of e

With g_e = (Σt · s_e − t_e)/τ the gradient under a tail is g_j at the support and g_rest · exp(z_i − lse_rest) outside,
where lse_rest = log Σ_{i outside the support} exp(z_i) is summed directly: 1 − Σ_j p_j would lose all its digits.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from fusejax.kernels.placement import Placement
from jax import Array

Implementation = Literal["xla", "tpu", "gpu"]


class Options(NamedTuple):
    """What is fixed at compile time. `block`: tokens of a block of logits on each device; None: as the kernel likes."""

    block: int | None = None
    placement: Placement | None = None  # None: everything on one device
    implementation: Implementation = "xla"
    interpret: bool = False  # Pallas kernels as plain XLA, for tests on CPUs
    divergence: bool = False  # KL: the target's entropy taken off, and rounding below 0 cleared
    temperature: float = 1.0
    tail: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    z_loss: float = 0.0
    model_entropy: bool = False
    gradients: str = "forward"

    @property
    def tempered(self) -> bool:
        """Whether there are terms of all logits over τ; a tail's few events are tempered on their own."""
        return not self.tail and self.temperature != 1


class Rows(NamedTuple):
    """Per-token inputs; T tokens, M support entries.

    labels: int32[T] (any value where clm_weight is 0). ids: int32[T, M], −1 = none, repeats add up. probs: float[T, M].
    clm_weight, fusion_weight: float32[T].
    """

    labels: Array
    ids: Array
    probs: Array
    clm_weight: Array
    fusion_weight: Array


class Targets(NamedTuple):
    """The events of the targets of some rows.

    ids: int32[T, M], distinct, −1 = none. q: float32[T, M], 0 where none; with a tail and τ ≠ 1 already tempered. rest:
    float32[T], the tail event's probability. constant: float32[T], taken off the fusion loss (the tempered target's
    entropy, for KL). entropy: float32[T], before temperature.
    """

    ids: Array
    q: Array
    rest: Array
    constant: Array
    entropy: Array


class Sums(NamedTuple):
    """float32[]: Σ clm_weight·clm, Σ fusion_weight·fusion, Σ clm_weight·z_loss, and of the entropies of the model

    (Σ clm_weight·entropy) and of the targets (Σ fusion_weight·entropy).
    """

    clm: Array
    fusion: Array
    z_loss: Array
    entropy: Array
    target_entropy: Array


class Statistics(NamedTuple):
    """What is needed of a token's logits z, float32; "counted" are all tokens, but under a tail those off the support.

    at: [T, M + 1], z at the M support ids and at the label, 0 where there is none. lse: [T], logsumexp of the counted
    z. lse_tempered: [T], logsumexp(z/τ), where `Options.tempered`. mean: [T], the mean of the counted z under their
    softmax, where the model's entropy is asked for. What a variant has no use for is None.
    """

    at: Array
    lse: Array
    lse_tempered: Array | None
    mean: Array | None


class Slopes(NamedTuple):
    """∂ Σ loss / ∂ z_i = dense · exp(z_i − shift) [i counted] + tempered · exp(z_i/τ − shift_tempered) + Σ at at i.

    float32[T] each, and at float32[T, M + 1] for the support ids and the label; z after scale and cap.
    """

    dense: Array
    shift: Array
    tempered: Array | None
    shift_tempered: Array | None
    at: Array


def combine(parts: Statistics) -> Statistics:
    """The whole vocabulary's from those of its parts, stacked along a first axis; `at` is 0 in all parts but one."""
    lse = jax.nn.logsumexp(parts.lse, 0)
    tempered = None if parts.lse_tempered is None else jax.nn.logsumexp(parts.lse_tempered, 0)
    mean = None
    if parts.mean is not None:
        share = jnp.where(parts.lse > -jnp.inf, jnp.exp(parts.lse - _finite(lse)), 0.0)
        mean = jnp.sum(share * parts.mean, 0)
    return Statistics(jnp.sum(parts.at, 0), lse, tempered, mean)


def across(statistics: Statistics, axis: str) -> Statistics:
    """The whole vocabulary's from each device's own columns of it, in one exchange of M + 2 to M + 4 floats a token."""
    at, lse, tempered, mean = statistics
    columns = [x[:, None] for x in (lse, tempered, mean) if x is not None]
    gathered = jax.lax.all_gather(jnp.concatenate([at, *columns], -1), axis)  # [devices, T, M + 1 + columns]
    M1 = at.shape[-1]
    rest = iter(jnp.moveaxis(gathered[..., M1:], -1, 0))
    lse = next(rest)
    tempered, mean = (None if x is None else next(rest) for x in (tempered, mean))
    return combine(Statistics(gathered[..., :M1], lse, tempered, mean))


def terms(s: Statistics, r: Rows, target: Targets, weight_clm: Array, options: Options) -> tuple[Array, Sums, Slopes]:
    """λ·clm + (1−λ)·fusion + z_loss summed over the rows, its parts, and the gradient's coefficients."""
    on_clm = weight_clm * r.clm_weight
    on_fusion = (1 - weight_clm) * r.fusion_weight
    variant = _tail_terms if options.tail else _plain_terms
    lse, fusion, mean, slopes = variant(s, r, target, on_clm, on_fusion, options)
    if options.divergence:
        fusion = jnp.maximum(fusion - target.constant, 0.0)
    sums = Sums(
        _weighted(r.clm_weight, lse - s.at[:, -1]),
        _weighted(r.fusion_weight, fusion),
        options.z_loss * _weighted(r.clm_weight, lse**2),
        jnp.zeros((), jnp.float32) if mean is None else _weighted(r.clm_weight, lse - mean),
        _weighted(r.fusion_weight, target.entropy),
    )
    total = weight_clm * sums.clm + (1 - weight_clm) * sums.fusion + sums.z_loss
    return total, sums, slopes._replace(at=jnp.concatenate([slopes.at, -on_clm[:, None]], -1))


def _plain_terms(s: Statistics, r: Rows, target: Targets, on_clm: Array, on_fusion: Array, options: Options) -> tuple:
    """(lse, fusion loss, mean logit, slopes at the support), the support's mass being all there is."""
    τ = options.temperature
    on_p = on_clm + 2 * options.z_loss * r.clm_weight * s.lse
    lse_τ = s.lse if s.lse_tempered is None else s.lse_tempered
    Σq = jnp.sum(target.q, -1)
    fusion = Σq * lse_τ - jnp.sum(target.q * s.at[:, :-1], -1) / τ
    at = -on_fusion[:, None] * target.q / τ
    if τ == 1:
        return s.lse, fusion, s.mean, Slopes(on_p + on_fusion * Σq, s.lse, None, None, at)
    return s.lse, fusion, s.mean, Slopes(on_p, s.lse, on_fusion * Σq / τ, lse_τ, at)


def _tail_terms(s: Statistics, r: Rows, target: Targets, on_clm: Array, on_fusion: Array, options: Options) -> tuple:
    """As `_plain_terms`, with everything outside the support as one more event."""
    τ = options.temperature
    z_ids = jnp.where(target.ids >= 0, s.at[:, :-1], -jnp.inf)
    events = jnp.concatenate([z_ids, s.lse[:, None]], -1)
    exists = events > -jnp.inf  # no tail event where the support is the whole vocabulary
    t = jnp.where(exists, jnp.concatenate([target.q, target.rest[:, None]], -1), 0.0)
    Σt = jnp.sum(t, -1, keepdims=True)
    lse = jax.nn.logsumexp(events, -1)
    log_s = jnp.where(exists, jax.nn.log_softmax(events / τ, -1), 0.0)
    fusion = -jnp.sum(t * log_s, -1)
    g = jnp.where(exists, (Σt * jnp.exp(log_s) - t) / τ, 0.0)
    p = jnp.exp(events - lse[:, None])
    mean = None
    if s.mean is not None:
        mean = p[:, -1] * s.mean + jnp.sum(p[:, :-1] * s.at[:, :-1], -1)
    on_p = on_clm + 2 * options.z_loss * r.clm_weight * lse
    on_events = on_p[:, None] * p + on_fusion[:, None] * g
    # exp(z − lse_rest) rather than p_i: the model's mass outside the support may be too small for a quotient.
    return lse, fusion, mean, Slopes(on_events[:, -1], _finite(s.lse), None, None, on_events[:, :-1])


def _weighted(weight: Array, value: Array) -> Array:
    """Σ weight·value; a masked row adds exactly 0, whatever its value is."""
    return jnp.sum(jnp.where(weight != 0, weight * value, 0.0))


def _finite(lse: Array) -> Array:
    return jnp.where(lse == -jnp.inf, 0.0, lse)
