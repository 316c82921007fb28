"""Run by test_kernels_on_meshes.py with 8 simulated devices: the kernels on every kind of mesh against one device."""

import re
import sys

import jax
import numpy as np
from fusejax.kernels.sample_unembed import sample_unembed
from fusejax.kernels.topk_unembed import topk_unembed

from fusejax import loss, sharding
from fusejax.config import MeshConfig

B, L, D, M = 8, 6, 16, 5
SHAPES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
VARIANTS = (
    {"kind": "ce", "tail": "tail"},
    {"kind": "kl", "tail": "tail", "temperature": 2.0, "logit_cap": 5.0, "logit_scale": 0.5},
    {"kind": "kl", "tail": "renormalize", "temperature": 1.5, "z_loss": 1e-2, "logit_cap": 9.0},
    {"kind": "ce", "tail": "tail", "model_entropy": True, "gradients": "recompute"},
)
TOPK_VARIANTS = ({}, {"logit_cap": 2.0, "logit_scale": 0.7, "block": 3}, {"k": 0})


def close(one, many):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), one, many)


def example(V, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, L, D)).astype(np.float32)
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    labels = rng.integers(-1, V, (B, L)).astype(np.int32)
    ids = rng.integers(-1, V, (B, L, M)).astype(np.int32)
    return hidden, unembedding, labels, ids, (rng.random((B, L, M)) / M).astype(np.float32)


def layouts(mesh, V):
    rows = sharding.batch_sharding(mesh)
    return rows, sharding.named(mesh, ("embed", "vocab"), (D, V))


def check_loss(mesh, V, options):
    def step(h, w, y, ids, probs, mesh=None):
        def total(h, w):
            sums = loss.fusion_loss(h, w, y, ids, probs, weight_clm=0.3, block=4, mesh=mesh, **options)
            return sums.total / sums.count, sums

        return jax.value_and_grad(total, (0, 1), has_aux=True)(h, w)

    arrays = example(V)
    one = jax.jit(step)(*arrays)
    rows, columns = layouts(mesh, V)
    put = jax.device_put
    placed = (put(arrays[0], rows), put(arrays[1], columns), *(put(x, rows) for x in arrays[2:]))
    compiled = jax.jit(step, static_argnums=5).lower(*placed, mesh).compile()
    many = compiled(*placed)
    assert len(many[1][1].sharding.device_set) == 8
    close(one, many)
    return compiled.as_text()


def check_topk(mesh, V, vocab_size, options):
    hidden, unembedding, labels, *_ = example(V, seed=1)
    if "logit_cap" not in options:  # whole numbers are summed without rounding: ties, across devices too
        hidden, unembedding = np.round(hidden), np.round(unembedding)
    labels = np.minimum(labels, vocab_size - 1)
    options = {"k": min(7, vocab_size), "vocab_size": vocab_size} | options
    one = topk_unembed(hidden, unembedding, labels, **options)
    rows, columns = layouts(mesh, V)
    placement = sharding.placement(mesh)
    run = jax.jit(lambda h, w, y: topk_unembed(h, w, y, placement=placement, **options))
    many = run(jax.device_put(hidden, rows), jax.device_put(unembedding, columns), jax.device_put(labels, rows))
    np.testing.assert_array_equal(one.ids, many.ids)
    close(one, many)


def check_draws(mesh, V, vocab_size):
    hidden, unembedding, labels, *_ = example(V, seed=2)
    uniforms = np.random.default_rng(3).random((B, L, 30)).astype(np.float32)
    options = {"vocab_size": vocab_size, "logit_cap": 4.0, "block": 8}
    labels = np.minimum(labels, vocab_size - 1)
    one = sample_unembed(hidden, unembedding, uniforms, labels, **options)
    rows, columns = layouts(mesh, V)
    put, placement = jax.device_put, sharding.placement(mesh)
    run = jax.jit(lambda h, w, u, y: sample_unembed(h, w, u, y, placement=placement, **options))
    many = run(put(hidden, rows), put(unembedding, columns), put(uniforms, rows), put(labels, rows))
    # A number within rounding of the border between two tokens may fall to either.
    assert (np.asarray(one.ids) != np.asarray(many.ids)).mean() < 2e-3
    close(one._replace(ids=0), many._replace(ids=0))


def check_lookup(mesh):
    """Embeddings arrive where their sequences are, by an exchange and not by replication."""
    table, ids = example(64)[1].T, example(64)[2]
    rows = sharding.batch_sharding(mesh)
    placed = jax.device_put(table, sharding.named(mesh, ("vocab", "embed"), table.shape)), jax.device_put(ids, rows)
    run = jax.jit(lambda table, ids: sharding.to_batch_rows(table[ids], mesh, table.dtype), out_shardings=rows)
    np.testing.assert_array_equal(run(*placed), table[ids])
    if mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] > 1:
        assert "all-to-all(" in run.lower(*placed).compile().as_text()


def main(every):
    for shape in SHAPES:
        mesh = sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
        check_lookup(mesh)
        # 53: no axis divides it. 5: fewer columns than devices.
        cases = [(V, o) for V in (64, 53) for o in VARIANTS] + [(5, VARIANTS[0])]
        for V, options in cases if every else [(64, VARIANTS[0]), (53, VARIANTS[1])]:
            text = check_loss(mesh, V, options)
            if V == 64:
                check_exchange(text, 64 // shape[2])
        cases = [(V, n, o) for V, n in ((64, 64), (64, 41), (53, 53), (16, 9)) for o in TOPK_VARIANTS]
        for V, vocab_size, options in cases if every else [(64, 41, {}), (53, 53, TOPK_VARIANTS[1])]:
            check_topk(mesh, V, vocab_size, options)
        for V, vocab_size in ((64, 64), (64, 41), (53, 53), (16, 9)) if every else [(53, 50)]:
            check_draws(mesh, V, vocab_size)
    print("same on", jax.device_count(), "devices")


def check_exchange(text, columns):
    """The gradient of the unembedding meets once, after the loop over blocks, and not in each of them."""
    collective = re.compile(rf"f32\[\d+,{columns}\]\S* (all-reduce|all-gather|reduce-scatter)(-start)?\(")
    loops, entry = text.split("\nENTRY")
    assert not collective.search(loops)
    assert columns == 8 or collective.search(entry)


main(every=sys.argv[1:] == ["every"])
