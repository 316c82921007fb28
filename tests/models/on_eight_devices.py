"""Run by test_models_on_meshes.py in a process with 8 CPU devices: every family's logits and gradients on meshes.

    python on_eight_devices.py CASE ...     prints one line of JSON for each case and mesh

Errors are relative to the largest value of the same array on one device.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))
from model_zoo import CASES, V

from fusejax import models, sharding
from fusejax.config import MeshConfig
from fusejax.models import generate
from fusejax.models.attention import Backend

ALL_DIVIDE = "all-divide"
MESHES = {"2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8)}
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (8, 16))
SEGMENTS = np.repeat([[1, 2, 0]] * 8, [7, 6, 3], axis=1)
WEIGHTS = RNG.normal(size=(8, 16, 1)).astype(np.float32)


def results(model, place):
    """(logits, gradients by name) of a model; `place` lays the batch out."""
    graphdef, params = nnx.split(model)

    def loss(params, ids, segments, weights):
        logits = nnx.merge(graphdef, params)(ids, segments)
        rows = weights * jnp.where((segments > 0)[..., None], logits, 0)
        return (rows * jnp.sin(jnp.arange(logits.shape[-1]))).sum() / 1e3, logits

    batch = place({"ids": IDS, "segments": SEGMENTS, "weights": WEIGHTS})
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params, *batch.values())
    named = {".".join(path): np.asarray(value[...]) for path, value in nnx.to_flat_state(gradients)}
    return np.asarray(logits)[SEGMENTS > 0], named


def error(got, wanted):
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-3))


def beyond(model, mesh, alone, logits):
    """What else runs on a mesh: generation, and a kernel that each device runs on its own rows and heads."""
    greedy, programs = greedy_tokens(alone), generate._next._cache_size()
    same, programs = np.array_equal(greedy_tokens(model), greedy), generate._next._cache_size() - programs
    model.backend = Backend("splash", mesh, interpret=True)
    graphdef, params = nnx.split(model)
    batch = sharding.put_batch({"ids": IDS, "segments": SEGMENTS}, mesh)
    forward = jax.jit(lambda params, ids, segments: nnx.merge(graphdef, params)(ids, segments))
    splash = np.asarray(forward(params, batch["ids"], batch["segments"]))[SEGMENTS > 0]
    return {"same_tokens": same, "decode_programs": programs, "splash": error(splash, logits)}


def greedy_tokens(model):
    return np.stack(list(generate.tokens(model, [[1, 2, 3], [4]], 5)))


def compare(case):
    # Of the axes that `tensor` may split, 8 divides the MLP alone, but for the case where it divides all.
    changes = {"n_heads": 8, "n_kv_heads": 8, "vocab_size": 96} if case == ALL_DIVIDE else {}
    config = models.decoder_config(CASES["llama" if case == ALL_DIVIDE else case])
    config = dataclasses.replace(config, initializer_std=0.2, d_mlp=48, **changes)
    alone = models.init(config, 0)
    logits, gradients = results(alone, lambda batch: batch)
    for name, (data, fsdp, tensor) in MESHES.items():
        mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        model = models.init(config, 0, mesh)
        variables = [variable[...] for _, variable in nnx.to_flat_state(nnx.split(model)[1])]
        declared = jax.tree.leaves(models.shardings(config, mesh))
        got, got_gradients = results(model, lambda batch, mesh=mesh: sharding.put_batch(batch, mesh))
        worst = max(gradients, key=lambda path: error(got_gradients[path], gradients[path]))
        report = {
            "case": case,
            "mesh": name,
            "logits": error(got, logits),
            "gradients": {worst: error(got_gradients[worst], gradients[worst])},
            "as_declared": [x.sharding for x in variables] == declared,
            "share": sum(x.addressable_shards[0].data.size for x in variables) / sum(x.size for x in variables),
        }
        if case == "llama-gqa" and name == "2x2x2":
            report |= beyond(model, mesh, alone, logits)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        compare(case)
