"""The fused loss as its definitions read: dense, in NumPy float64, token by token; what the kernels are held to.

Differentiable by hand: `gradients` evaluates the derivative of the same definitions. Not for training.
"""

from typing import NamedTuple

import numpy as np


class Losses(NamedTuple):
    """Per token, float64[T], each times its weight: the CLM loss, the fusion loss, and what the gradients are of."""

    clm: np.ndarray
    fusion: np.ndarray
    total: np.ndarray


def losses(
    hidden: np.ndarray,
    unembedding: np.ndarray,
    labels: np.ndarray,
    target_ids: np.ndarray,
    target_probs: np.ndarray,
    mask: np.ndarray,
    *,
    weight_clm: float,
    kind: str = "ce",
    temperature: float = 1.0,
    tail: str = "tail",
    logit_scale: float = 1.0,
    logit_cap: float | None = None,
    z_loss: float = 0.0,
) -> Losses:
    """hidden [T, D], unembedding [D, V], labels [T], target_ids and target_probs [T, M] (repeats add up), mask [T]."""
    logits_TV = capped_logits(hidden, unembedding, logit_scale, logit_cap)
    T = len(labels)
    clm, fusion, total = np.zeros(T), np.zeros(T), np.zeros(T)
    for t in range(T):
        if labels[t] < 0 or mask[t] == 0:
            continue
        z = logits_TV[t]
        clm[t] = mask[t] * -log_softmax(z)[labels[t]]
        target, model = events(z, target_ids[t], target_probs[t], temperature, tail)
        fusion[t] = mask[t] * divergence(target, model, kind)
        total[t] = weight_clm * clm[t] + (1 - weight_clm) * fusion[t]
        total[t] += mask[t] * z_loss * logsumexp(z) ** 2
    return Losses(clm, fusion, total)


def gradients(
    hidden: np.ndarray,
    unembedding: np.ndarray,
    labels: np.ndarray,
    target_ids: np.ndarray,
    target_probs: np.ndarray,
    mask: np.ndarray,
    *,
    weight_clm: float,
    temperature: float = 1.0,
    tail: str = "tail",
    logit_scale: float = 1.0,
    logit_cap: float | None = None,
    z_loss: float = 0.0,
    kind: str = "ce",
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of Σ total for hidden and unembedding; CE and KL have the same."""
    del kind
    logits_TV = capped_logits(hidden, unembedding, logit_scale, logit_cap)
    dlogits = np.zeros_like(logits_TV)
    for t in range(len(labels)):
        if labels[t] < 0 or mask[t] == 0:
            continue
        z = logits_TV[t]
        p = np.exp(log_softmax(z))
        clm = p.copy()
        clm[labels[t]] -= 1
        fusion = _fusion_gradient(z, target_ids[t], target_probs[t], temperature, tail)
        z_part = 2 * z_loss * logsumexp(z) * p
        dlogits[t] = mask[t] * (weight_clm * clm + (1 - weight_clm) * fusion + z_part)
    if logit_cap is not None:
        dlogits *= 1 - (logits_TV / logit_cap) ** 2
    dlogits *= logit_scale
    return dlogits @ np.asarray(unembedding, np.float64).T, np.asarray(hidden, np.float64).T @ dlogits


def capped_logits(
    hidden: np.ndarray, unembedding: np.ndarray, logit_scale: float, logit_cap: float | None
) -> np.ndarray:
    z = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64) * logit_scale
    return z if logit_cap is None else logit_cap * np.tanh(z / logit_cap)


def events(
    z: np.ndarray, ids: np.ndarray, probs: np.ndarray, temperature: float, tail: str
) -> tuple[np.ndarray, np.ndarray]:
    """(the target's probabilities, the model's log-probabilities) of the same events, both tempered.

    `renormalize`: one event for each of the V tokens. `tail`: one for each support id and one for all others together.
    """
    support, q = merged(ids, probs)
    if tail == "renormalize":
        target = np.zeros(len(z))
        if q.sum() > 0:
            target[support] = tempered(q / q.sum(), temperature)
        return target, log_softmax(z / temperature)
    outside = np.setdiff1d(np.arange(len(z)), support)
    log_p = log_softmax(z)
    target = tempered(np.append(q, max(1 - q.sum(), 0.0)), temperature)
    if len(outside) == 0:
        return target[:-1], log_softmax(log_p[support] / temperature)
    model = np.append(log_p[support], logsumexp(log_p[outside]))
    return target, log_softmax(model / temperature)


def merged(ids: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ids of a row and the sum of the probabilities of each; −1 is no id."""
    support = np.unique(ids[ids >= 0])
    return support, np.array([probs[ids == i].sum(dtype=np.float64) for i in support])


def tempered(q: np.ndarray, temperature: float) -> np.ndarray:
    """q^(1/τ), scaled to sum 1; at τ = 1 q itself."""
    if temperature == 1:
        return q
    raw = q ** (1 / temperature)
    return raw / raw.sum()


def divergence(target: np.ndarray, model: np.ndarray, kind: str) -> float:
    there = target > 0
    cross_entropy = -np.sum(target[there] * model[there])
    return cross_entropy + np.sum(target[there] * np.log(target[there])) if kind == "kl" else cross_entropy


def _fusion_gradient(z: np.ndarray, ids: np.ndarray, probs: np.ndarray, temperature: float, tail: str) -> np.ndarray:
    target, model = events(z, ids, probs, temperature, tail)
    on_events = (target.sum() * np.exp(model) - target) / temperature
    if tail == "renormalize":
        return on_events
    support, _ = merged(ids, probs)
    outside = np.setdiff1d(np.arange(len(z)), support)
    gradient = np.zeros(len(z))
    gradient[support] = on_events[: len(support)]
    if len(outside):
        gradient[outside] = on_events[-1] * np.exp(z[outside] - logsumexp(z[outside]))
    return gradient


def logsumexp(z: np.ndarray) -> float:
    return z.max() + np.log(np.sum(np.exp(z - z.max())))


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - logsumexp(z)
