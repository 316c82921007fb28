"""Properties of the decoder that need no other implementation."""

import subprocess
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import on_cpus
from flax import nnx

from fusejax import models
from fusejax.config import Remat
from fusejax.models import attention
from fusejax.models.decoder import REMAT_POLICIES
from fusejax.models.layers import ACTIVATIONS

LLAMA = models.DecoderConfig(
    vocab_size=40, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_mlp=24, max_length=32, rotary_dim=4,
    initializer_std=0.3,
)  # fmt: skip
MPT = models.decoder_config(
    dict(model_type="mpt", vocab_size=40, d_model=16, n_heads=4, n_layers=2, initializer_range=0.3)
)
IDS = np.random.default_rng(0).integers(0, 40, (2, 12))


def test_segment_positions():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2], [1, 1, 2, 3, 3, 0, 0]])
    wanted = [[0, 1, 0, 1, 2, 0, 1], [0, 1, 0, 0, 1, 0, 1]]
    np.testing.assert_array_equal(attention.segment_positions(segments), wanted)


def test_alibi_slopes():
    np.testing.assert_allclose(attention.alibi_slopes(8, 8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(attention.alibi_slopes(3, 8), [2.0**-4, 2.0**-8, 2.0**-2])
    np.testing.assert_allclose(attention.alibi_slopes(1, 8), [2.0**-8])


@pytest.mark.parametrize("config", [LLAMA, MPT])
def test_documents_of_a_row_do_not_see_each_other(config):
    model = models.init(config, 0)
    forward = jax.jit(lambda ids, segments: model(ids, segments))
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * 2)
    before, changed = forward(IDS, segments), IDS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % 40
    after = forward(changed, segments)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    np.testing.assert_array_equal(before[:, 5:], after[:, 5:])
    assert (np.abs(before - after)[:, 2:5].max(-1) > 1e-3).all()
    assert np.isfinite(before).all()


def test_remat_and_unroll_change_nothing():
    assert set(get_args(Remat)) == {"none", *REMAT_POLICIES}
    params = nnx.split(models.init(LLAMA, 0))[1]

    def gradient(**options):
        graphdef = nnx.split(models.Decoder(LLAMA, **options))[0]
        segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3] * 2)

        def loss(params):
            return jnp.square(nnx.merge(graphdef, params).hidden(IDS, segments)).sum()

        return jax.jit(jax.grad(loss))(params)

    wanted = gradient()
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(wanted.blocks))
    for options in (*(dict(remat=name) for name in REMAT_POLICIES), dict(unroll=2)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient(**options), wanted)


def test_compute_dtype():
    wide, narrow = (models.init(LLAMA, 0, compute_dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    hidden = narrow.hidden(IDS)
    assert hidden.dtype == jnp.bfloat16
    assert narrow.logits(hidden).dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.split(narrow)[1]))
    np.testing.assert_allclose(hidden.astype(np.float32), wide.hidden(IDS), atol=0.15)


def test_unembedding():
    for config in (LLAMA, MPT):
        model = models.init(config, 0)
        assert model.unembedding().shape == (16, 40)
        hidden = model.hidden(IDS)
        np.testing.assert_allclose(model(IDS), hidden @ model.unembedding(), rtol=1e-5, atol=1e-5)


def test_activations():
    x = jnp.array([-1.0, 0.5])
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), [-0.158655, 0.345731], atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](x), [-0.158808, 0.345714], atol=1e-6)


def test_declarations_agree_with_parameters():
    params = nnx.split(models.init(LLAMA, 0))[1]
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
                 models.abstract_params(LLAMA), params)  # fmt: skip
    jax.tree.map(lambda leaf, axes: np.testing.assert_equal(leaf.ndim, len(axes)), params, models.logical_axes(LLAMA))
    kernel = params.blocks.attention.out.kernel
    assert kernel.shape == (3, 4, 4, 16)
    assert models.logical_axes(LLAMA).blocks.attention.out.kernel.get_value() == ("layers", "heads", None, "embed")
    assert models.count_parameters(LLAMA) == 2 * 40 * 16 + 16 + 3 * (16 * 32 + 16 * 16 + 3 * 16 * 24 + 2 * 16)


def test_init_depends_on_the_seed_alone():
    first, again, other = (jax.tree.leaves(nnx.split(models.init(LLAMA, seed))[1]) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all((a == b).all() for a, b in zip(first, other, strict=True))


_ON_EIGHT_DEVICES = """
import sys, jax, numpy as np
from flax import nnx
from fusejax import models, sharding
from fusejax.config import MeshConfig
from fusejax.models import loading
ids = np.load(sys.argv[2])
alone = models.load(sys.argv[1])
def logits(model):
    return jax.jit(lambda ids: model(ids))(ids)
wanted = logits(alone)
for shape in ((2, 2, 2), (1, 8, 1), (1, 1, 8)):
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    model = models.load(sys.argv[1], mesh=mesh)
    kernel = model.blocks.mlp.up.kernel[...]
    assert kernel.addressable_shards[0].data.size * shape[1] * shape[2] == kernel.size, shape
    assert kernel.sharding == models.shardings(model.config, mesh).blocks.mlp.up.kernel.get_value()
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(kernel, models.load(sys.argv[1]).blocks.mlp.up.kernel[...])
    loading._SMALL, small = 0, loading._SMALL
    streamed = models.load(sys.argv[1], mesh=mesh)
    loading._SMALL = small
    jax.tree.map(np.testing.assert_array_equal, nnx.state(streamed), nnx.state(alone))
    random = models.init(model.config, 3, mesh=mesh)
    np.testing.assert_array_equal(random.embedding[...], models.init(model.config, 3).embedding[...])
print("equal")
"""


def test_sharded_over_eight_devices(tmp_path):
    from fusejax import export

    export.save(models.init(LLAMA, 0), models.hf_config(LLAMA, "llama"), tmp_path / "model")
    np.save(tmp_path / "ids.npy", IDS)
    command = [sys.executable, "-c", _ON_EIGHT_DEVICES, str(tmp_path / "model"), str(tmp_path / "ids.npy")]
    done = subprocess.run(command, env=on_cpus(8), capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
