import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax import alignment, metrics, sharding, sources, training
from fusejax.batches import Batches
from fusejax.errors import UserError


@pytest.fixture
def job(make_job):
    def make(**changes):
        made = make_job(**({"optimizer": {"learning_rate": 3e-3}, "loss": {"weight_clm": 0.5}} | changes))
        sources.run(made)
        alignment.run(made)
        return made

    return make


def steps(config, n, **batch):
    """(state, metrics of each step) after n steps on whole batches."""
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"steps": n} | batch)})
    trainer = training.Trainer.make(config, n, with_sources=True)
    state, history = trainer.state, []
    for _, made in Batches(config).iterate():
        state, values = trainer.step(state, trainer.fixed, sharding.put_batch(made, trainer.mesh), trainer.tables)
        history.append(jax.device_get(values))
    return jax.device_get(state), history


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_microbatches_equal_the_large_batch(job):
    config = job(batch={"sequences": 4, "epochs": 4})
    whole, whole_history = steps(config, 3)
    for micro in (1, 2):
        parts, history = steps(config, 3, microbatch=micro)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), parts["params"], whole["params"]
        )
        for a, b in zip(history, whole_history, strict=True):
            assert a["tokens"] == b["tokens"]
            assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_document_a_sequence_needs_no_segments(job):
    config = job(batch={"sequences": 4, "packed": False, "steps": 3})
    batches = Batches(config)
    assert all(len(documents) <= 1 for step in range(len(batches)) for documents in batches.documents(step))
    without, history = steps(config, 3)
    packed = config.model_copy(update={"batch": config.batch.model_copy(update={"packed": True})})
    trainer = training.Trainer.make(packed, 3, with_sources=True)
    state = trainer.state
    for step, values in enumerate(history):
        on_mesh = sharding.put_batch(batches.batch(step), trainer.mesh)
        state, wanted = trainer.step(state, trainer.fixed, on_mesh, trainer.tables)
        assert_close(values, jax.device_get(wanted), rtol=1e-5, atol=1e-6)
    assert_close(without["params"], jax.device_get(state)["params"], rtol=1e-4, atol=1e-6)


def test_a_step_without_a_number_leaves_everything_but_the_count(job):
    config = job(batch={"sequences": 2, "steps": 1}, optimizer={"ema": 0.9})
    trainer = training.Trainer.make(config, 1, with_sources=True)
    batch = sharding.put_batch(Batches(config).batch(0), trainer.mesh)
    broken = dict(trainer.state)
    broken["params"] = jax.tree.map(jnp.copy, broken["params"])
    broken["params"]["final_norm"]["scale"] = jnp.full_like(broken["params"]["final_norm"]["scale"], jnp.nan)
    broken = jax.device_put(broken, sharding.like(trainer.state))
    before = jax.device_get(broken)
    after, values = trainer.step(broken, trainer.fixed, batch, trainer.tables)
    assert (int(after["step"]), int(values["skipped"]), int(values["skipped_in_a_row"])) == (1, 1, 1)
    for part in ("params", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after[part]), before[part])


def test_the_run_stops_after_the_limit(job):
    config = job(
        optimizer={"learning_rate": 1e30, "grad_clip": 1e30}, guard={"limit": 2}, batch={"sequences": 4, "epochs": 6}
    )
    with pytest.raises(UserError, match=r"last 2 steps up to \d+ were skipped: the loss became .*; lower optimizer"):
        training.train(config, "fused")
    assert [row["skipped"] for row in metrics.read(config.folder)][-1] == 1  # the last one is in the message


@pytest.mark.parametrize("kind", ["adafactor", "lion"])
def test_other_optimizers_learn(job, kind):
    rate = {"adafactor": 2e-2, "lion": 1e-3}[kind]
    config = job(optimizer={"kind": kind, "learning_rate": rate}, batch={"sequences": 4, "epochs": 6})
    training.train(config, "fused")
    history = metrics.read(config.folder)
    assert history[-1]["clm_loss"] < history[0]["clm_loss"] - 0.1


def test_fusing_sampled_sources(job):
    """The draws' shares stand in for the distributions: their loss is that of the top-k within the draws' noise."""
    config = job(output="sampled", cache={"kind": "sampled", "rounds": 255})
    _, (sampled,) = steps(config, 1)
    _, (exact,) = steps(job(output="exact", cache={"top_k": 256}), 1)
    assert sampled["fusion_loss"] == pytest.approx(exact["fusion_loss"], rel=0.05)
    assert sampled["mass_kept"] == pytest.approx(exact["mass_kept"], abs=0.05)


@pytest.mark.parametrize("unit", ["byte", "aligned"])
def test_the_gate_leaves_the_label_alone_where_the_target_is_ahead(job, unit):
    """A source that is ahead of the target everywhere fuses as without a gate; one that is behind leaves plain CLM."""
    open_ = job(fusion={"ce_unit": unit})
    gated = job(output="gated", fusion={"ce_unit": unit, "gate": "target"})
    _, (without,) = steps(open_, 1)
    _, (values,) = steps(gated, 1)
    assert 0 <= values["gated"] <= values["fallback"] <= 1
    assert values["won"].sum() + values["fallback"] == pytest.approx(1)
    assert values["clm_loss"] == pytest.approx(without["clm_loss"])
    if unit == "aligned":
        return  # what decides is measured in the step
    batch = Batches(gated).batch(0)

    def one_step(config, source_ce):
        trainer = training.Trainer.make(config, 1, with_sources=True)
        changed = {**batch, "source_ce": np.full_like(batch["source_ce"], source_ce)}
        if not config.fusion.gate:
            del changed["label_bytes"]
        on_mesh = sharding.put_batch(changed, trainer.mesh)
        return jax.device_get(trainer.step(trainer.state, trainer.fixed, on_mesh, trainer.tables)[1])

    ahead, behind = one_step(gated, -1.0), one_step(gated, np.inf)
    assert ahead["gated"] == 0
    assert ahead["fusion_loss"] == pytest.approx(one_step(open_, -1.0)["fusion_loss"], rel=1e-6)
    assert behind["fusion_loss"] == pytest.approx(without["clm_loss"], rel=1e-5)
    assert not behind["won"].any()
