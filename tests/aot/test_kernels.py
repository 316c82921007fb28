"""The Pallas kernels compile at the sizes of 7B models; nothing is run."""

import functools

import jax
import jax.numpy as jnp
import pytest
from fusejax.kernels.fusion_loss import passes, terms
from fusejax.kernels.topk_unembed import topk_unembed
from jax.sharding import NamedSharding, PartitionSpec

from fusejax import aot, models, sharding
from fusejax.config import MeshConfig

CHIPS = [("v5e:2x2", "tpu"), ("v5p:2x2x1", "tpu"), ("v6e:2x2", "tpu"), ("h100:1", "gpu")]
SIZES = [(2048, 4096, 32000), (2048, 2048, 128256)]  # tokens, channels, vocabulary
M = 11


def shape_on(device):
    mesh = jax.sharding.Mesh([device], ("device",))
    return functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))


def rows(shape, T):
    per_token = shape((T,), jnp.float32)
    ids, probs = shape((T, M), jnp.int32), shape((T, M), jnp.float32)
    return terms.Rows(shape((T,), jnp.int32), ids, probs, per_token, per_token)


@pytest.mark.parametrize("T_D_V", SIZES)
@pytest.mark.parametrize(("chip", "implementation"), CHIPS)
def test_loss_and_gradients(devices, chip, implementation, T_D_V):
    T, D, V = T_D_V
    shape = shape_on(devices(chip)[0])
    options = terms.Options(implementation=implementation, tail=True, model_entropy=True)

    def step(hidden, unembedding, rows, weight_clm):
        run = jax.value_and_grad(passes.losses, argnums=(0, 1), has_aux=True)
        return run(hidden, unembedding, rows, weight_clm, options)

    hidden, unembedding = shape((T, D), jnp.bfloat16), shape((D, V), jnp.float32)
    program = aot.compile_for(jax.jit(step), hidden, unembedding, rows(shape, T), shape((), jnp.float32))
    logits = 4 * T * V
    both = 4 * D * V + 2 * D * V  # the gradient of the unembedding, and its columns in bfloat16
    assert program.temporaries < both + logits


@pytest.mark.parametrize("D", [1024, 48])
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2", "h100:1"])
def test_every_variant_of_the_loss(devices, chip, D):
    """Without a tail, tempered, capped, and channels and a vocabulary that no tile divides."""
    shape = shape_on(devices(chip)[0])
    options = terms.Options(
        implementation=dict(CHIPS)[chip], temperature=2.0, divergence=True, logit_cap=30.0, logit_scale=0.5
    )
    step = jax.grad(lambda *arguments: passes.losses(*arguments, options)[0], argnums=(0, 1))
    hidden, unembedding = shape((300, D), jnp.float32), shape((D, 50257), jnp.float32)
    aot.compile_for(jax.jit(step), hidden, unembedding, rows(shape, 300), shape((), jnp.float32))


LLAMA = models.DecoderConfig(
    vocab_size=32000, d_model=2048, n_layers=2, n_heads=16, n_kv_heads=16, head_dim=128, d_mlp=5504, max_length=2048,
    rotary_dim=128,
)  # fmt: skip


@pytest.mark.parametrize(("chip", "V"), [("v5e:2x4", 32000), ("v5p:2x2x2", 50257), ("v6e:2x4", 128256)])
def test_topk_inside_the_sharded_forward(devices, chip, V):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices(chip))
    config = models.DecoderConfig(**(vars(LLAMA) | {"vocab_size": V}))
    params, placed = models.abstract_params(config, jnp.bfloat16), models.shardings(config, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)
    structure = models.Decoder(config, jnp.bfloat16, mesh=mesh)

    def forward(params, ids, labels):
        from flax import nnx

        decoder = nnx.merge(nnx.split(structure)[0], params)
        hidden = decoder.hidden(ids)
        placement = sharding.placement(mesh)
        return topk_unembed(
            hidden, decoder.unembedding(), labels, k=10, vocab_size=V, placement=placement, implementation="tpu"
        )

    ids = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=sharding.batch_sharding(mesh))
    program = aot.compile_for(jax.jit(forward), params, ids, ids)
    assert program.collectives["all-gather"].times > 0


@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("T_D_V", "dtype"), [(SIZES[0], "bfloat16"), (SIZES[1], "float32")])
def test_topk(devices, chip, T_D_V, dtype):
    T, D, V = T_D_V
    shape = shape_on(devices(chip)[0])
    run = jax.jit(lambda h, w, y: topk_unembed(h, w, y, k=10, implementation="tpu"))
    program = aot.compile_for(run, shape((T, D), dtype), shape((D, V), dtype), shape((T,), jnp.int32))
    assert program.temporaries < 4 * T * V / 8  # no array of tokens × vocabulary
