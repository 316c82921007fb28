import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax import aot, config, models, sharding, training
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


MODULE = """HloModule jit_step, is_scheduled=true

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[4,512]{1,0} all-gather(%shard), channel_id=1, dimensions={0}
  %started = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%part), channel_id=2, dimensions={0}
  %done = f32[8,4]{1,0} all-gather-done(%started)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner (p: f32[]) -> f32[] {
  %sum.2 = (f32[], s32[16]{0}) all-reduce(%a, %b), to_apply=%add
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]) while(%tuple), condition=%c2, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[8]{0} reduce-scatter(%x), channel_id=3, to_apply=%add
}
"""


def test_collectives_are_counted_as_often_as_their_loop_runs():
    assert aot.collectives(MODULE) == {
        "all-gather": (8, 4 * (4 * 512 * 2 + 8 * 4 * 4)),
        "all-reduce": (3, 3 * (4 + 16 * 4)),
        "reduce-scatter": (1, 32),
    }


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


def test_adapters_are_refused():
    job = config.validate({"target": "t", "corpus": {"path": "c"}, "lora": {}}, "test")
    with pytest.raises(UserError, match="lora"):
        aot.train_step(job, models.DecoderConfig(8, 8, 1, 1, 1, 8, 8, 8), jax.devices())


def test_kernels_that_the_devices_cannot_run_are_refused():
    mesh = sharding.make_mesh()
    sharding.check_kernels(config.KernelsConfig(fusion_loss="xla"), mesh)
    with pytest.raises(UserError, match=r"kernels.topk_unembed: 'tpu' needs a TPU, here is cpu"):
        sharding.check_kernels(config.KernelsConfig(topk_unembed="tpu"), mesh)


def test_one_row_after_another_is_all_of_them():
    batch = {"x": np.arange(12.0).reshape(4, 3)}
    out = sharding.one_by_one(lambda one, scale: {"y": scale * one["x"].cumsum(1)}, batch, 2.0, sharding.make_mesh())
    np.testing.assert_allclose(out["y"], 2 * batch["x"].cumsum(1))
