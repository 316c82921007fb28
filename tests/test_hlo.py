"""Collectives by kind and bytes, against programs whose exchanges are known."""

import subprocess
import sys

import pytest
from environment import on_cpus

from fusejax.hlo import collectives

MODULE = """HloModule jit_step, is_scheduled=true, num_partitions=8

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[4,512]{1,0} all-gather(%shard), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %started = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%part), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[8,4]{1,0} all-gather-done(%started)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%by_twos (state: (f32[6], u32[])) -> (f32[6], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %next = u32[]{:T(128)} add(%i, %two)
  %sent = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %got = f32[6]{0} collective-permute-done(%sent)
  ROOT %both = (f32[6]{0}, u32[]{:T(128)}) tuple(%got, %next)
}

%below_seven (state.1: (f32[6], u32[])) -> pred[] {
  %seven = u32[]{:T(128)} constant(7)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  ROOT %less.1 = pred[] compare(%i.1, %seven), direction=LT
}

%inner (p: f32[]) -> f32[] {
  %sum.2 = (f32[], s32[16]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[2] {
  %whole = f32[16]{0} all-reduce(%p), to_apply=%add
  ROOT %own = f32[2]{0} dynamic-slice(%whole, %i), dynamic_slice_sizes={2}
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]) while(%tuple), condition=%c2, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %fused = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %while.3 = (f32[6], u32[]) while(%tuple), condition=%below_seven, body=%by_twos
  ROOT %out = f32[8]{0} reduce-scatter(%x), channel_id=3, to_apply=%add
}
"""


def test_counted_as_often_as_their_loop_runs():
    assert collectives(MODULE) == {
        "all-gather": (8, 4 * (4 * 512 * 2 + 8 * 4 * 4) * 3 // 4),
        "all-reduce": (3, 3 * (4 + 16 * 4)),
        "reduce-scatter": (2, 64 * 7 // 8 + 8 * 32 * 7 // 8),
        "collective-permute": (4, 4 * 24),
    }


OVERLAPPED = """HloModule jit_step, is_scheduled=true, num_partitions=4

%start (p.1: bf16[1,64]) -> (bf16[1,64], bf16[4,64]) {
  %g.1 = bf16[4,64]{1,0} all-gather(%p.1), channel_id=5, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}

%step (p.2: bf16[1,64]) -> (bf16[8,8], bf16[4,64]) {
  %g.2 = bf16[4,64]{1,0} all-gather(%p.2), channel_id=5, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}

%end (p.3: bf16[1,64]) -> bf16[4,64] {
  %g.3 = bf16[4,64]{1,0} all-gather(%p.3), channel_id=5, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="0"}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %async-collective-start = (bf16[1,64]{1,0}, bf16[4,64]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %product = (bf16[8,8]{1,0}, bf16[4,64]{1,0}) fusion(%x), kind=kOutput, calls=%step
  %async-collective-done = bf16[4,64]{1,0} fusion(%x), kind=kCustom, calls=%end
  %other = bf16[4,64]{1,0} all-gather(%y), channel_id=6, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %send = (f32[10,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%z, %after), channel_id=7, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_parts_of_an_overlapped_collective_are_one():
    """A TPU's all-gather beside a product stands there three times; another slice is reached by a send to the host."""
    assert collectives(OVERLAPPED) == {"all-gather": (6, 6 * 4 * 64 * 2 * 3 // 4), "between slices": (1, 320)}


# A loop over 5 matrices [64, 64] that 4 devices split; their gradients are summed over all 8 and split again.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from fusejax.hlo import collectives
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
shape = lambda size, *spec: jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
def loss(w, x):
    return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).sum()
run = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P(None, "b")))
print(collectives(run.lower(shape((5, 64, 64), None, "b"), shape((16, 64), ("a", "b"))).compile().as_text()))
"""


def test_of_a_real_program_on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=on_cpus(8), timeout=120, check=True
    )
    found = eval(done.stdout, {"Traffic": lambda times, bytes: (times, bytes)})
    matrix = 64 * 64 * 4
    # Each matrix is gathered for the forward and again for the backward pass.
    assert found["all-gather"] == (10, 10 * matrix * 3 // 4)
    # CPUs have no reduce-scatter: the whole gradient over the 4 that split it, then each one's part over the 2 copies.
    assert found["all-reduce"] == pytest.approx((10, 5 * 2 * matrix * 3 // 4 + 5 * 2 * (matrix // 4) // 2))
