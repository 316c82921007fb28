"""Run by test_meshes.py with eight simulated devices: CONFIG MESH... → JSON of each mesh's losses and layouts."""

import contextlib
import json
import sys
import warnings
from unittest import mock

import jax

from fusejax import config, sharding, training
from fusejax.batches import Batches
from fusejax.models import loading


@contextlib.contextmanager
def watching(parts):
    """The share of each larger parameter that a device holds, whenever one was read or a tensor written into it."""

    def watched(function):
        def run(*arguments):
            made = function(*arguments)
            if made.size > 4096:
                parts.append(max(shard.data.size for shard in made.addressable_shards) / made.size)
            return made

        return run

    with mock.patch.multiple(loading, **{name: watched(getattr(loading, name)) for name in ("_whole", "_write")}):
        yield


def curve(job):
    batches, parts = Batches(job), []
    with watching(parts):
        trainer = training.Trainer.make(job, len(batches), with_sources=True)
    n = job.batch.sequences
    first = sharding.put_batch(batches.batch(0), trainer.mesh)
    compiled = trainer.step.lower(trainer.state, trainer.fixed, first, trainer.tables).compile()
    (state_in, _, batch_in, _), _ = compiled.input_shardings
    declared = jax.tree.map(lambda leaf: leaf.sharding, trainer.state)

    def same(a, b):
        return jax.tree.all(jax.tree.map(lambda x, y, leaf: x.is_equivalent_to(y, leaf.ndim), a, b, trainer.state))

    split = sharding.batch_sharding(trainer.mesh)
    checks = {
        "state in": same(state_in, declared),
        "state out": same(compiled.output_shardings[0], declared),
        "batch in": all(batch_in[name].is_equivalent_to(split, first[name].ndim) for name in batch_in),
    }
    largest = max(
        leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(trainer.state) if leaf.size > 4096
    )
    state, losses = trainer.state, []
    for _, batch in batches.iterate(rows=sharding.local_rows(n, trainer.mesh)):
        on_mesh = sharding.put_batch(batch, trainer.mesh, n)
        state, values = trainer.step(state, trainer.fixed, on_mesh, trainer.tables)
        losses.append(float(values["loss"]))
    return {"losses": losses, "checks": checks, "largest": largest, "while loading": max(parts)}


def main(path, *meshes):
    warnings.simplefilter("error", DeprecationWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="(?!fusejax|jax)")
    made = {}
    for mesh in meshes:
        data, fsdp, tensor = map(int, mesh.split(","))
        made[mesh] = curve(config.load(path, [f"mesh={{data: {data}, fsdp: {fsdp}, tensor: {tensor}}}"]))
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
