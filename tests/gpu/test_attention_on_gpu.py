"""cuDNN's attention on the card itself, against the plain one in float32."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax import models
from fusejax.models import attention
from fusejax.models.attention import Backend, Features, Tokens

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu" and not os.environ.get("FUSEJAX_REQUIRE_GPU"),
    reason="needs an NVIDIA GPU (make test-gpu)",
)
LENGTH = 130


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "length"), [(4, 4, 64, 1024), (8, 2, 128, 130), (6, 1, 64, 520)]
)
@pytest.mark.parametrize("window", [None, 7, 200])
def test_values_and_gradients(window, heads, kv_heads, width, length, packed):
    """In bfloat16 as near to float32 as `xla` in bfloat16 is: values, and gradients of queries, keys and values."""
    rng, tokens = np.random.default_rng(0), Tokens.of(jnp.arange(length)[None])
    if packed:
        segments = jnp.asarray(np.repeat([[1, 2, 0], [0, 1, 2]], [length - 60, 40, 20], axis=1))
        tokens = Tokens.of(attention.segment_positions(segments), segments)
    query, key, value, weights = (rng.normal(size=(2, length, n, width)) for n in (heads, kv_heads, kv_heads, heads))

    def results(name, dtype):
        def loss(*args):
            mixed = attention.attend(*args, tokens, tokens, Features(width**-0.5, window), Backend(name))
            return (mixed.astype(jnp.float32) * weights).sum(), mixed

        arrays = (jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (query, key, value))
        with jax.default_matmul_precision("highest"):
            gradients, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return [np.asarray(x, np.float32) for x in (mixed, *gradients)]

    exact, plain = results("xla", jnp.float32), results("xla", jnp.bfloat16)
    for wanted, xla, got in zip(exact, plain, results("cudnn", jnp.bfloat16), strict=True):
        ours, yardstick = (np.linalg.norm(x - wanted) / np.linalg.norm(wanted) for x in (got, xla))
        assert ours <= 1.5 * yardstick + 1e-3


def test_in_a_model():
    """`auto` takes it for rows of one document; what fills up a row on the right changes nothing before it."""
    config = models.DecoderConfig(
        vocab_size=40, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, d_mlp=128, max_length=64,
        rotary_dim=64, initializer_std=0.1, window=20, window_layers=(True, False),
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(0, 40, (2, LENGTH))
    hidden = jax.jit(lambda model, ids: model.hidden(ids))
    exact = hidden(models.init(config, 0, attention="xla"), ids)
    plain = hidden(models.init(config, 0, compute_dtype=jnp.bfloat16, attention="xla"), ids)
    model = models.init(config, 0, compute_dtype=jnp.bfloat16)
    assert "cudnn" in jax.jit(lambda model, ids: model.hidden(ids)).lower(model, ids).compile().as_text().lower()
    got = hidden(model, ids)
    ours, yardstick = (np.linalg.norm(np.asarray(x, np.float32) - exact) for x in (got, plain))
    assert ours <= 1.5 * yardstick
    filled = np.where(np.arange(LENGTH) < 100, ids, 0)
    np.testing.assert_array_equal(hidden(model, filled)[:, :100], got[:, :100])


def test_a_packed_document_in_a_model_with_cudnn():
    """Perturbing one document leaves the other's hidden states as they are, bit for bit."""
    config = models.DecoderConfig(
        vocab_size=512, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, d_mlp=512, max_length=256,
        rotary_dim=64,
    )  # fmt: skip
    model = models.init(config, seed=0, compute_dtype=jnp.bfloat16, attention="cudnn")
    ids = np.random.default_rng(0).integers(0, 512, (1, 256)).astype(np.int32)
    segments = np.repeat([[1, 2]], [100, 156], axis=1)
    other = ids.copy()
    other[0, :100] = (other[0, :100] + 7) % 512
    first, second = (np.float32(model.hidden(jnp.asarray(x), segments)) for x in (ids, other))
    np.testing.assert_array_equal(first[0, 100:], second[0, 100:])
    assert np.any(first[0, :100] != second[0, :100])
