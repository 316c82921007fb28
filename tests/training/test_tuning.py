"""What is trained and what is not: frozen parameters, frozen layers, adapters."""

import jax
import numpy as np
import pytest

import fusejax
from fusejax import training
from fusejax.checkpoint import Checkpoints
from fusejax.errors import UserError


def trained(config):
    """(parameters before, after) a run."""
    training.train(config, "fused")
    trainer = training.Trainer.make(config, 1, with_sources=False)
    with Checkpoints(config.folder / "checkpoints", config.checkpoint) as checkpoints:
        _, state = checkpoints.restore(trainer.state)
    before, after = (jax.device_get(flat(trainer.model(s))) for s in (trainer.state, state))
    return before, after, state


def flat(model):
    from flax import nnx

    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.split(model)[1])}


@pytest.fixture
def clm_job(make_job):
    def make(**changes):
        settings = {"sources": [], "batch": {"sequences": 4, "epochs": 2}, "optimizer": {"learning_rate": 1e-2}}
        return make_job(**(settings | changes))

    return make


def test_frozen_parameters_keep_their_bits(clm_job):
    config = clm_job(optimizer={"learning_rate": 1e-2, "frozen": ["embedding", "blocks.*.mlp"]})
    before, after, state = trained(config)
    for name in before:
        same = np.array_equal(before[name], after[name])
        assert same == (name == "embedding" or ".mlp." in name), name
    moments = sum(leaf.size for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state["params"]))


def test_one_frozen_layer_of_two(clm_job, tmp_path):
    from conftest import _model, _tokenizer

    _tokenizer(tmp_path / "two", 330, bos=False)
    _model(tmp_path / "two", "llama", rows=352, seed=1, n_layers=2)
    config = clm_job(target=str(tmp_path / "two"), optimizer={"learning_rate": 1e-2, "frozen": ["blocks.0"]})
    before, after, _ = trained(config)
    for name in before:
        if name.startswith("blocks."):
            np.testing.assert_array_equal(before[name][0], after[name][0])
            assert not np.array_equal(before[name][1], after[name][1]), name


def test_adapters_alone_are_trained_and_kept_and_merged_on_export(clm_job):
    config = clm_job(lora={"rank": 2, "alpha": 8, "targets": ["query", "out", "blocks.mlp.*"]})
    base = flat(fusejax.load(config.target.model))
    before, after, state = trained(config)
    for name in base:
        np.testing.assert_array_equal(before[name], base[name])  # B = 0: nothing is changed at first
        parts = name.split(".")
        targeted = parts[-1] == "kernel" and (parts[2] in ("query", "out") or parts[1] == "mlp")
        assert targeted != np.array_equal(after[name], base[name]), name
    sizes = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}
    assert all(key.endswith(("['a']", "['b']")) for key in sizes)
    out = state["params"]["blocks"]["attention"]["out"]["kernel"]
    by_hand = base["blocks.attention.out.kernel"] + 8 / 2 * np.einsum("lhkr,lrd->lhkd", out["a"], out["b"])
    np.testing.assert_allclose(after["blocks.attention.out.kernel"], by_hand, rtol=1e-5, atol=1e-6)
    training.export(config)
    exported = flat(fusejax.load(config.folder / "export"))
    for name in after:
        np.testing.assert_allclose(exported[name], after[name], rtol=1e-6, atol=1e-7)


def test_the_running_mean_is_what_is_exported(clm_job):
    config = clm_job(optimizer={"learning_rate": 1e-2, "ema": 0.5}, batch={"sequences": 4, "steps": 2})
    trainer = training.Trainer.make(config, 2, with_sources=False)
    from fusejax import sharding
    from fusejax.batches import Batches

    batches = Batches(config, with_sources=False)
    mean = jax.device_get(trainer.state["params"])
    state = trainer.state
    for _, batch in batches.iterate():
        state, _ = trainer.step(state, trainer.fixed, sharding.put_batch(batch, trainer.mesh), [])
        mean = jax.tree.map(lambda m, p: 0.5 * m + 0.5 * np.asarray(p), mean, state["params"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), jax.device_get(state["ema"]), mean
    )
    exported = flat(trainer.model(state))["embedding"]
    np.testing.assert_array_equal(exported, state["ema"]["embedding"])
    assert not np.array_equal(exported, state["params"]["embedding"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"frozen": ["embeding"]}}, r"optimizer.frozen: 'embeding' .* did you mean embedding\?"),
        ({"optimizer": {"frozen": ["*"]}}, "nothing to train"),
        ({"lora": {"targets": ["querry"]}}, r"lora.targets: 'querry' .* did you mean query\?"),
    ],
)
def test_names_of_nothing_are_one_line(clm_job, changes, message):
    with pytest.raises(UserError, match=message):
        training.Trainer.make(clm_job(**changes), 1, with_sources=False)
