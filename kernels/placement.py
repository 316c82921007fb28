"""How the arrays of a kernel lie on a device mesh."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


class Placement(NamedTuple):
    """Mesh axes: `batch` splits the tokens, `vocab` the unembedding's columns, `embed` its rows while it is at rest.

    `embed` is one of `batch`: the rows are gathered for the computation, and the gradient is left split like them.
    """

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    vocab: str
    embed: str

    @property
    def batch_shards(self) -> int:
        """Over how many devices the tokens are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    @property
    def vocab_shards(self) -> int:
        """Over how many devices the vocabulary is split."""
        return self.mesh.shape[self.vocab]

    def padded(self, unembedding_DV: Array, by_token: Any) -> tuple[Array, Any]:
        """The columns, and the pytree of arrays [T, …], filled up with zeros to where the mesh divides them."""

        def rows(x: Array) -> Array:
            return jnp.pad(x, [(0, -x.shape[0] % self.batch_shards)] + [(0, 0)] * (x.ndim - 1))

        pad_V = -unembedding_DV.shape[1] % self.vocab_shards
        return jnp.pad(unembedding_DV, ((0, 0), (0, pad_V))), jax.tree.map(rows, by_token)

    def own_columns(self, width: int, vocab_size: int) -> tuple[Array, Array | None]:
        """Inside `shard_map`, of this device's `width` columns: (the first's id, how many are below `vocab_size`).

        None for the second where no device has others.
        """
        first = jax.lax.axis_index(self.vocab) * width
        cut = width * self.vocab_shards > vocab_size
        return first, jnp.clip(vocab_size - first, 0, width) if cut else None


def platform_of(placement: Placement | None) -> str:
    """`cpu`, `gpu` or `tpu`: the mesh's, which need not be here."""
    mesh = None if placement is None else placement.mesh
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def own_ids(ids: Array, first: Array | int, width: int) -> Array:
    """Ids of the vocabulary as columns of the part first .. first + width of it, −1 where they are elsewhere."""
    return jnp.where((ids >= first) & (ids < first + width), ids - first, -1)


def on_mesh(
    run: Callable[..., Any], placement: Placement, hidden_TD: Array, unembedding_DV: Array, *others: Array
) -> Any:
    """run(hidden, unembedding, *others) by each device, of its own columns and tokens.

    others: arrays [T, …], as is what `run` returns. The unembedding is cast to the hidden states' dtype beforehand.
    """
    columns_DV, rows = placement.padded(unembedding_DV.astype(hidden_TD.dtype), (hidden_TD, *others))
    tokens, columns = PartitionSpec(placement.batch), PartitionSpec(None, placement.vocab)
    specs = (tokens, columns, *[tokens] * len(others))
    mapped = jax.shard_map(run, mesh=placement.mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return jax.tree.map(lambda x: x[: len(hidden_TD)], mapped(rows[0], columns_DV, *rows[1:]))
