"""Every implementation of attention against the definition in float64, and which one is chosen for what."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax import models
from fusejax.errors import UserError
from fusejax.models import attention, attention_blocks, attention_kernels
from fusejax.models.attention import Alibi, Backend, Features, Tokens

B, L, N, G, K = 2, 130, 4, 2, 16  # no multiple of any kernel's or block's size
SEGMENTS = np.repeat([[1, 2, 0], [0, 1, 2]], [60, 50, 20], axis=1)
POSITIONS = np.asarray(attention.segment_positions(jnp.asarray(SEGMENTS)))
TOKENS = Tokens.of(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
SLOPES = tuple(attention.alibi_slopes(N, 8).tolist())

FEATURES = {
    "plain": Features(0.25),
    "window": Features(0.3, window=7),
    "softcap": Features(0.25, softcap=2.0),
    "window-softcap": Features(0.25, window=20, softcap=2.0),
    "alibi": Features(0.25, alibi=Alibi(SLOPES)),
    "alibi-scale": Features(0.5, alibi=Alibi(SLOPES, scale=0.25)),
    "alibi-window": Features(0.5, window=30, alibi=Alibi(SLOPES)),
}

IMPLEMENTATIONS = {
    "xla": lambda q, k, v, tokens, features: attention.attend_xla(q, k, v, tokens, tokens, features),
    "blockwise": lambda q, k, v, tokens, f: attention_blocks.attend_blockwise(q, k, v, tokens, tokens, f, block=32),
    "by head": lambda q, k, v, tokens, f: attention_blocks.attend_by_head(q, k, v, tokens, f, at_once=3, block=32),
    "splash": lambda q, k, v, tokens, f: attention_kernels.splash(q, k, v, tokens, f, interpret=True),
}


def arrays(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, L, heads, K)), dtype) for heads in (N, G, G)]


def by_definition(query, key, value, features):
    """float64, one query at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, N // G, axis=2) for x in (key, value))
    out = np.zeros(query.shape)
    for b, n, i in np.ndindex(B, N, L):
        seen = [j for j in range(i + 1) if SEGMENTS[b, i] == SEGMENTS[b, j]]
        seen = [j for j in seen if features.window is None or i - j < features.window]
        scores = features.scale * key[b, seen, n] @ query[b, i, n]
        if features.softcap is not None:
            scores = features.softcap * np.tanh(scores / features.softcap)
        if features.alibi is not None:
            scores += features.alibi.scale * features.alibi.slopes[n] * (POSITIONS[b, seen] - POSITIONS[b, i])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights / weights.sum() @ value[b, seen, n]
    return out


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        (name, case)
        for name in IMPLEMENTATIONS
        for case in FEATURES
        if name != "by head" or FEATURES[case].alibi is None
    ],
)
def test_the_definition(implementation, case):
    features, run = FEATURES[case], IMPLEMENTATIONS[implementation]
    got = run(*arrays(), TOKENS, features)
    np.testing.assert_allclose(got, by_definition(*arrays(), features), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(name, case, marks=() if case in ("alibi", "window-softcap") else pytest.mark.slow)
        for name in ("blockwise", "by head", "splash")
        for case in FEATURES
        if name != "by head" or FEATURES[case].alibi is None
    ],
)
def test_gradients_of_the_reference(implementation, case):
    def gradients(run):
        def loss(*args):
            return jnp.sin(run(*args, TOKENS, FEATURES[case])).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays())

    for got, wanted in zip(gradients(IMPLEMENTATIONS[implementation]), gradients(IMPLEMENTATIONS["xla"]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_document_never_reaches_another(implementation):
    features = Features(0.25, window=100, softcap=3.0)
    before = IMPLEMENTATIONS[implementation](*arrays(), TOKENS, features)
    first = jnp.asarray(SEGMENTS == 1)[:, :, None, None]
    changed = [jnp.where(first, other, x) for x, other in zip(arrays(), arrays(seed=1), strict=True)]
    after = IMPLEMENTATIONS[implementation](*changed, TOKENS, features)
    np.testing.assert_array_equal(before[SEGMENTS != 1], after[SEGMENTS != 1])
    assert (np.abs(before - after)[SEGMENTS == 1].max(-1) > 1e-3).all()


def test_documents_in_a_model_with_splash():
    config = models.DecoderConfig(
        vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_mlp=24, max_length=32,
        rotary_dim=4, initializer_std=0.3, window=6, window_layers=(True, False),
    )  # fmt: skip
    model, ids = models.init(config, 0), np.random.default_rng(0).integers(0, 40, (2, L))
    wanted = model.hidden(ids, jnp.asarray(SEGMENTS))
    model.backend = Backend("splash", interpret=True)
    got = model.hidden(ids, jnp.asarray(SEGMENTS))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    changed = np.where(SEGMENTS == 1, (ids + 1) % 40, ids)
    np.testing.assert_array_equal(model.hidden(changed, jnp.asarray(SEGMENTS))[SEGMENTS != 1], got[SEGMENTS != 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_alibi_as_features(dtype):
    """The bias is right to float32 whatever the dtype of queries and keys, at any position of a long document."""
    positions = np.array([[0, 1, 255, 256, 257, 2047, 65535]])
    nothing = [jnp.zeros((1, 7, heads, 2), dtype) for heads in (6, 3)]
    slopes = attention.alibi_slopes(6, 8)
    query, key = attention_kernels.with_alibi(
        *nothing, jnp.asarray(positions), Alibi(tuple(slopes.tolist()), scale=0.3)
    )
    key = jnp.repeat(key, 2, axis=2)
    bias = jnp.einsum("bqnk,bsnk->bnqs", query, key, preferred_element_type=jnp.float32)
    wanted = 0.3 * slopes.astype(np.float64)[None, :, None, None] * positions[:, None, None, :]
    np.testing.assert_allclose(bias, np.broadcast_to(wanted, bias.shape), rtol=3e-7)


def test_blocks_need_little_memory():
    def temporaries(run):
        shapes = [jax.ShapeDtypeStruct((1, 4096, heads, K), jnp.float32) for heads in (N, G, G)]
        tokens = Tokens.of(jnp.arange(4096)[None])
        compiled = jax.jit(lambda q, k, v: run(q, k, v, tokens, tokens, FEATURES["plain"])).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = N * 4096 * 4096 * 4
    assert temporaries(attention.attend_xla) >= scores
    assert temporaries(attention.attend) < scores / 7


def test_cudnn_is_asked_for_the_same(monkeypatch):
    """cuDNN cannot run here: what it is asked for is done by the same function's own implementation."""
    function = jax.nn.dot_product_attention

    def instead(*args, implementation, **options):
        assert implementation == "cudnn"
        return function(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    alone = Tokens.of(jnp.arange(L)[None])
    for case in ("plain", "window"):
        for tokens in (alone, TOKENS):
            got = attention_kernels.cudnn(*arrays(), tokens, FEATURES[case])
            wanted = attention.attend_xla(*arrays(), tokens, tokens, FEATURES[case])
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def on(platform, name="auto", compute_capability=None):
    """A backend for a device that is not here."""
    device = SimpleNamespace(platform=platform, compute_capability=compute_capability)
    return Backend(name, SimpleNamespace(devices=np.array([device], object)))


ALONE = Tokens.of(jnp.arange(L)[None])
ODD = Tokens.of(TOKENS.positions_BL[:, :-1], TOKENS.segments_BL[:, :-1])
FALCON = Features(0.25, alibi=Alibi(SLOPES, bf16=True))


@pytest.mark.parametrize(
    ("backend", "chosen", "tokens", "features", "width", "dtype"),
    [
        (on("cpu"), "xla", TOKENS, FEATURES["plain"], 128, jnp.float32),
        (on("tpu"), "splash", TOKENS, FEATURES["window-softcap"], 128, jnp.bfloat16),
        (on("tpu"), "splash", TOKENS, FEATURES["alibi"], 128, jnp.bfloat16),
        (on("tpu"), "xla", TOKENS, FALCON, 128, jnp.bfloat16),
        (on("tpu", "xla"), "xla", TOKENS, FEATURES["plain"], 128, jnp.bfloat16),
        (on("gpu", compute_capability="8.0"), "cudnn", ALONE, FEATURES["window"], 128, jnp.bfloat16),
        (on("gpu", compute_capability="8.0"), "cudnn", TOKENS, FEATURES["plain"], 128, jnp.bfloat16),
        (on("gpu", compute_capability="8.0"), "xla", ODD, FEATURES["plain"], 128, jnp.bfloat16),
        (on("gpu", compute_capability="8.0"), "xla", ALONE, FEATURES["softcap"], 128, jnp.bfloat16),
        (on("gpu", compute_capability="8.0"), "xla", ALONE, FEATURES["alibi"], 128, jnp.bfloat16),
        (on("gpu", compute_capability="8.0"), "xla", ALONE, FEATURES["plain"], 128, jnp.float32),
        (on("gpu", compute_capability="8.0"), "xla", ALONE, FEATURES["plain"], 256, jnp.bfloat16),
        (on("cuda", compute_capability="9.0"), "cudnn", ALONE, FEATURES["plain"], 256, jnp.bfloat16),
    ],
)
def test_choice(backend, chosen, tokens, features, width, dtype):
    query = jnp.zeros((1, len(tokens.index_L), N, width), dtype)
    assert attention.choose(query, tokens, features, backend) == chosen


@pytest.mark.parametrize(
    ("backend", "tokens", "features", "message"),
    [
        (on("cpu", "splash"), TOKENS, FEATURES["plain"], "attention: splash runs on TPUs, not on cpu; use auto or xla"),
        (on("tpu", "splash"), TOKENS, FALCON, "splash cannot round ALiBi's bias"),
        (on("tpu", "cudnn"), ALONE, FEATURES["plain"], "cudnn runs on NVIDIA GPUs, not on tpu"),
        (on("gpu", "cudnn"), ODD, FEATURES["plain"], "rows of an even number of tokens, not of 129"),
        (on("gpu", "cudnn"), ALONE, FEATURES["softcap"], "cudnn has no soft cap"),
        (on("gpu", "cudnn"), ALONE, FEATURES["alibi"], "cudnn has no ALiBi"),
        (on("gpu", "cudnn"), ALONE, FEATURES["plain"], "bfloat16 or float16, not in float32"),
    ],
)
def test_forced_and_refused(backend, tokens, features, message):
    with pytest.raises(UserError, match=message):
        attention.choose(jnp.zeros((1, len(tokens.index_L), N, 128), jnp.float32), tokens, features, backend)


def test_forced_in_a_model(tiny_models):
    model = models.load(tiny_models["coarse"], attention="splash")
    with pytest.raises(UserError, match="splash runs on TPUs"):
        model.hidden(jnp.zeros((1, 8), jnp.int32))


@pytest.mark.parametrize("cores", [0, 1, 4, 5])
@pytest.mark.parametrize("segments", [True, False])
def test_long_rows_on_any_number_of_cores(monkeypatch, cores, segments):
    monkeypatch.setattr(Backend, "cores", cores)  # 5: more than the 2 x 2 pairs of row and key head
    rng, length = np.random.default_rng(0), attention.WHOLE_UP_TO + 40
    heads = [jnp.asarray(rng.normal(size=(2, length, n, 8)), jnp.float32) for n in (N, G, G)]
    ids = jnp.asarray(rng.integers(0, 2, (2, length)).cumsum(1) // 30, jnp.int32)
    tokens = Tokens.of(jnp.arange(length)[None], ids if segments else None)

    def both(attend):
        out, back = jax.vjp(lambda *args: attend(*args, tokens, tokens, Features(0.3, window=200)), *heads)
        return out, *back(jnp.cos(out))

    for got, wanted in zip(both(attention.attend), both(attention.attend_xla), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


def test_cores_of_one_cpu_alone():
    assert Backend().cores >= 1
    several = SimpleNamespace(devices=np.array(jax.devices() * 2, object), size=2)
    assert Backend("auto", several).cores == 0
    assert on("tpu").cores == 0
