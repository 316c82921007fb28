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
    call = aot.Call(run, (jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=whole),))
    program = call.compile()
    assert program.arguments == call.argument_bytes == 64 * 32 * 4
    assert program.collectives == {}
    assert program.flops >= 2 * 64 * 64 * 32
    assert program.peak >= program.arguments


def test_a_step_from_shapes_alone_is_the_trainers_step(make_job):
    """The shapes and layouts of the abstract step are those that training uses."""
    job = make_job()
    _, model_config = models.read_config(job.target.model)
    call = aot.train_call(job, model_config, jax.devices()[:1], source_vocabularies=(352, 280), table_columns=4)
    state, fixed, batch, tables = call.arguments
    trainer = training.Trainer.make(job, 10, with_sources=False)
    real = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), trainer.state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == real
    assert fixed == trainer.fixed == {}
    assert [table.ids.shape for table in tables] == [(352, 4), (280, 4)]
    assert batch["source_logprobs"].shape == (2, 64, 2, 5)
    assert set(batch) >= {"ids", "labels", "segment_ids", "positions", "source_ids", "gold_logprobs"}


@pytest.mark.parametrize("changes", [{"lora": {"rank": 4}}, {"optimizer": {"frozen": ["embedding", "blocks.0"]}}])
def test_adapters_and_frozen_parameters_as_the_trainer_has_them(make_job, changes):
    job = make_job(**changes)
    _, model_config = models.read_config(job.target.model)
    seen = aot.train_call(job, model_config, jax.devices()[:1]).arguments
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
    call, called = aot.source_call(job, source, model.config, jax.devices()[:1]), []
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
    assert call.function.func is called[0].func
    assert call.function.args[1:] == called[0].args[1:]
    described = [[(x.shape, x.dtype) for x in jax.tree.leaves(inputs)] for inputs in (call.arguments, called[1:])]
    assert described[0] == described[1]


@pytest.mark.parametrize(
    ("said", "needed", "available"),
    [
        ("RESOURCE_EXHAUSTED: Used 18.71G of 15.75G hbm. Exceeded hbm capacity by 2.96G.", 18.71, 15.75),
        ("... the total memory required for HLO temporaries (240.00G) exceeds available HBM (30.75G). HLO", 240, 30.75),
    ],
)
def test_the_compilers_refusals_are_read(said, needed, available):
    assert aot._shortage(said)[:2] == (round(needed * (1 << 30)), round(available * (1 << 30)))
    assert aot._shortage("RESOURCE_EXHAUSTED: something new\nmore") == (None, None, "RESOURCE_EXHAUSTED: something new")


def test_kernels_that_the_devices_cannot_run_are_refused():
    mesh = sharding.make_mesh()
    sharding.check_kernels(config.KernelsConfig(fusion_loss="xla"), mesh)
    with pytest.raises(UserError, match=r"kernels.topk_unembed: 'tpu' needs a TPU, here is cpu"):
        sharding.check_kernels(config.KernelsConfig(topk_unembed="tpu"), mesh)


def test_one_row_after_another_is_all_of_them():
    batch = {"x": np.arange(12.0).reshape(4, 3)}
    out = sharding.one_by_one(lambda one, scale: {"y": scale * one["x"].cumsum(1)}, batch, 2.0, sharding.make_mesh())
    np.testing.assert_allclose(out["y"], 2 * batch["x"].cumsum(1))
