import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax import aot, config, models, scoring, sharding, training
from fusejax.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "a machine and its shape"),
        ("v5p:2y2", "a machine and its shape"),
        ("v5p:0x2", "a machine and its shape"),
        ("a100:8", "known machines are v4, v5e, v5p, v6e and h100"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        aot.topology(name)


def test_a_program_for_this_machine():
    run = jax.jit(lambda x: jnp.sin(x) @ x.T)
    whole = sharding.replicated(sharding.make_mesh())
    program = aot.compile_for(run, jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=whole))
    assert program.arguments == 64 * 32 * 4
    assert program.collectives == {}
    assert program.flops >= 2 * 64 * 64 * 32
    assert program.peak >= program.arguments


def test_a_step_from_shapes_alone_is_the_trainers_step(make_job, monkeypatch):
    """The shapes and layouts of the abstract step are those that training uses."""
    job = make_job()
    seen = []
    monkeypatch.setattr(aot, "compile_for", lambda step, *arguments: seen.extend(arguments))
    _, model_config = models.read_config(job.target.model)
    aot.train_step(job, model_config, jax.devices()[:1], source_vocabularies=(352, 280), table_columns=4)
    state, fixed, batch, tables = seen
    trainer = training.Trainer.make(job, 10, with_sources=False)
    real = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), trainer.state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == real
    assert fixed == trainer.fixed == {}
    assert [table.ids.shape for table in tables] == [(352, 4), (280, 4)]
    assert batch["source_logprobs"].shape == (2, 64, 2, 5)
    assert set(batch) >= {"ids", "labels", "segment_ids", "positions", "source_ids", "gold_logprobs"}


@pytest.mark.parametrize("changes", [{"lora": {"rank": 4}}, {"optimizer": {"frozen": ["embedding", "blocks.0"]}}])
def test_adapters_and_frozen_parameters_as_the_trainer_has_them(make_job, monkeypatch, changes):
    job = make_job(**changes)
    seen = []
    monkeypatch.setattr(aot, "compile_for", lambda step, *arguments: seen.extend(arguments))
    _, model_config = models.read_config(job.target.model)
    aot.train_step(job, model_config, jax.devices()[:1])
    trainer = training.Trainer.make(job, 10, with_sources=False)
    for abstract, real in ((seen[0], trainer.state), (seen[1], trainer.fixed)):
        described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), real)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract) == described


def test_a_sources_forward_is_the_scorers(make_job, monkeypatch):
    """What is compiled from shapes is what the stage calls, on arrays of the shapes that it calls it on."""
    job = make_job()
    source, length = job.sources[0], job.max_length
    mesh, compute = sharding.local_mesh(job.mesh), jnp.dtype(job.precision.compute)
    model = models.load(source.model, mesh=mesh, dtype=compute, compute_dtype=compute)
    seen, called = [], []
    monkeypatch.setattr(aot, "compile_for", lambda *arguments: seen.extend(arguments))
    aot.source_forward(job, source, model.config, jax.devices()[:1])
    make = scoring.program

    def program(*arguments, **options):
        called.append(make(*arguments, **options))
        return lambda *arguments: called.extend(arguments)

    monkeypatch.setattr(scoring, "program", program)
    scorer = scoring.Scorer(
        model, k=job.cache.top_k, vocab_size=model.config.vocab_size, max_length=length,
        batch_tokens=job.cache.batch_tokens, mesh=mesh,
    )  # fmt: skip
    ids = np.ones(length, np.int32)
    batch = scoring.plan(np.array([length]), length, job.cache.batch_tokens)[0]
    scorer._start(batch, scoring.Group("", [ids], [ids]))
    assert seen[0].func is called[0].func
    assert seen[0].args[1:] == called[0].args[1:]
    described = [[(x.shape, x.dtype) for x in jax.tree.leaves(arguments[1:])] for arguments in (seen, called)]
    assert described[0] == described[1]


def test_kernels_that_the_devices_cannot_run_are_refused():
    mesh = sharding.make_mesh()
    sharding.check_kernels(config.KernelsConfig(fusion_loss="xla"), mesh)
    with pytest.raises(UserError, match=r"kernels.topk_unembed: 'tpu' needs a TPU, here is cpu"):
        sharding.check_kernels(config.KernelsConfig(topk_unembed="tpu"), mesh)


def test_one_row_after_another_is_all_of_them():
    batch = {"x": np.arange(12.0).reshape(4, 3)}
    out = sharding.one_by_one(lambda one, scale: {"y": scale * one["x"].cumsum(1)}, batch, 2.0, sharding.make_mesh())
    np.testing.assert_allclose(out["y"], 2 * batch["x"].cumsum(1))
