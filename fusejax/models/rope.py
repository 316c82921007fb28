"""Rotary positions: the frequencies of every scaling that published checkpoints use.

Shapes: B sequences, L tokens, R rotated features of a head. RoPE (Su et al. 2021, equation 15) rotates pair i of a
head's features by position * theta^(-2i / R), i = 0 .. R/2 - 1. With s the factor and W the original context:

    linear    frequencies / s                                                       (Chen et al. 2023)
    dynamic   theta * (s * n / W - (s - 1))^(R / (R - 2)) for a document of n > W tokens ("dynamic NTK")
    yarn      a ramp, by the rotations that a pair makes in W tokens, from f / s to f   (Peng et al. 2023, section 3.2)
    llama3    likewise, another ramp, over the wavelengths                              (Llama 3.1)
    longrope  one divisor for each frequency, of two lists: n <= W and n > W            (Ding et al. 2024)

The length n is each document's own, so that documents packed into one row get what they would get alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.models.config import RopeScaling


def angles(
    positions_BL: jax.Array, lengths_BL: jax.Array, rotary_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [B, L, 1, R/2] each.

    positions_BL: int32. lengths_BL: int32, tokens of the document that each token is of; used by `dynamic` and
    `longrope` alone.
    """
    frequencies = _frequencies(lengths_BL, rotary_dim, theta, scaling)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _frequencies(lengths_BL: jax.Array, rotary_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """float32 [R/2], or [B, L, 1, R/2] where they depend on the document's length."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    # Scaled in float32, step by step as torch does: at far positions the last bit of a frequency shows.
    plain = (theta**-exponents).astype(np.float32)
    if scaling is None:
        return jnp.asarray(plain)
    if scaling.kind == "linear":
        return jnp.asarray(plain / np.float32(scaling.factor))
    if scaling.kind == "yarn":
        return jnp.asarray(_yarn(plain, rotary_dim, theta, scaling))
    if scaling.kind == "llama3":
        return jnp.asarray(_llama3(plain, scaling))
    lengths = lengths_BL[:, :, None, None].astype(jnp.float32)
    if scaling.kind == "longrope":
        short, long = (plain / np.asarray(x, np.float32) for x in (scaling.short_factors, scaling.long_factors))
        return jnp.where(lengths > scaling.original_length, jnp.asarray(long), jnp.asarray(short))
    stretch = scaling.factor * jnp.maximum(lengths, scaling.original_length) / scaling.original_length
    theta_BL11 = theta * (stretch - (scaling.factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    return theta_BL11 ** jnp.asarray(-exponents, jnp.float32)


def _yarn(plain: np.ndarray, rotary_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    def feature(rotations: float) -> float:
        """The pair, as a real number, that makes so many rotations in the original context."""
        return rotary_dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    return plain / np.float32(scaling.factor) * ramp + plain * (1 - ramp)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    low, high, factor = (np.float32(x) for x in (scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor))
    rotations = np.float32(scaling.original_length) / (np.float32(2 * math.pi) / plain)
    ramp = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - ramp) * plain / factor + ramp * plain
