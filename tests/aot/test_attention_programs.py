"""Attention on TPUs: the Splash kernel is what v5e gets for Llama, MPT and Gemma 2, and 7B models fit with it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fusejax import aot, models, sharding
from fusejax.config import MeshConfig

LLAMA_7B = models.DecoderConfig(
    vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_mlp=11008, max_length=4096,
    norm_eps=1e-5, rotary_dim=128,
)  # fmt: skip
SMALL = dataclasses.replace(LLAMA_7B, d_model=512, n_layers=2, n_heads=8, n_kv_heads=4, d_mlp=1024)
MODELS = {
    "llama": SMALL,
    "mpt": dataclasses.replace(SMALL, n_kv_heads=8, rotary_dim=0, alibi_bias_max=8.0, norm="layer", gated_mlp=False),
    "gemma2": dataclasses.replace(SMALL, window=1024, window_layers=(True, False), attention_softcap=50.0),
}


def compiled(config, devices, batch, length, mesh_shape, gradient=True, **options):
    """(the program of a forward, or of the gradient of a loss, over packed rows; its StableHLO)."""
    data, fsdp, tensor = mesh_shape
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    graphdef, _ = nnx.split(models.Decoder(config, jnp.bfloat16, mesh=mesh, **options))
    params = jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        models.abstract_params(config, jnp.bfloat16),
        models.shardings(config, mesh),
    )
    rows = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def forward(params, ids, segments):
        return nnx.merge(graphdef, params).hidden(ids, segments)

    def loss(*arguments):
        return jnp.square(forward(*arguments).astype(jnp.float32)).sum()

    run = jax.jit(jax.grad(loss) if gradient else forward)
    return aot.compile_for(run, params, rows, rows), run.lower(params, rows, rows).as_text()


@pytest.mark.parametrize("model", MODELS)
def test_tpus_get_splash(devices, model):
    small, text = compiled(MODELS[model], devices("v5e:2x2"), 4, 2048, (1, 2, 2))
    assert text.count("splash_mha") >= 2  # forward and backward kernels
    large, text = compiled(MODELS[model], devices("v5e:2x2"), 4, 2048, (1, 2, 2), attention="xla")
    assert "splash" not in text
    print(f"\n{model}: splash {small.temporaries >> 20} MiB, xla {large.temporaries >> 20} MiB of temporaries")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["splash", "xla"])
def test_7b_forward(devices, attention):
    program, _ = compiled(LLAMA_7B, devices("v5p:2x2x2"), 8, 4096, (1, 4, 2), gradient=False, attention=attention)
    print(f"\n{attention}: {program}")
    assert program.arguments < 2.2 * models.count_parameters(LLAMA_7B) / len(devices("v5p:2x2x2"))
    assert program.temporaries < 4 << 30


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots_with_no_batch_dims_saveable", "dots_saveable", "none"])
def test_7b_gradients_by_remat(devices, remat):
    program, _ = compiled(LLAMA_7B, devices("v5p:2x2x2"), 8, 4096, (1, 4, 2), remat=remat)
    print(f"\n{remat}: {program}")
    assert program.peak < 95 << 30
