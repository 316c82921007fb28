"""Whatever a family does to its logits, the caches, the evaluation and the loss must do too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_zoo import CASES, V

from fusejax import models, scoring, sharding
from fusejax.training.step import batch_sums


@pytest.mark.parametrize("case", ["llama", "gemma2-small-caps", "gptj", "opt-350m", "mpt", "phi3"])
def test_scores_and_loss_are_those_of_the_logits(case, make_job):
    config = make_job(sources=[])
    # Large weights, so that caps and biases matter.
    model = models.init(models.decoder_config(CASES[case] | {"initializer_range": 0.5}), seed=1)
    values = {path: np.random.default_rng(len(str(path))) for path, _ in nnx.to_flat_state(nnx.state(model))}
    graphdef, params = nnx.split(model)
    moved = [
        (path, leaf.replace(leaf[...] + 0.3 * values[path].standard_normal(leaf[...].shape).astype(np.float32)))
        for path, leaf in nnx.to_flat_state(params)
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(moved))
    ids = np.random.default_rng(0).integers(0, V, 17).astype(np.int32)
    inputs, labels = ids[:-1], ids[1:]
    logprobs = np.asarray(jax.nn.log_softmax(nnx.jit(lambda m, x: m(x))(model, inputs[None])[0]), np.float64)
    ce = -logprobs[np.arange(16), labels]

    scorer = scoring.Scorer(model, k=5, max_length=16, batch_tokens=16, mesh=sharding.make_mesh())
    ((_, (scores,)),) = scorer([inputs], [labels])
    np.testing.assert_allclose(scores.ce, ce, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.logprobs, -np.sort(-logprobs, -1)[:, :5], rtol=1e-4, atol=1e-4)

    batch = {"ids": inputs[None], "labels": labels[None], "segment_ids": np.ones((1, 16), np.int32)}
    batch["positions"] = np.arange(16, dtype=np.int32)[None]
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    total, _ = batch_sums(config, model, batch, [], jnp.float32(1.0))
    np.testing.assert_allclose(total, ce.sum(), rtol=1e-5)
