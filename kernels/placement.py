"""How the arrays of a kernel lie on a device mesh."""

from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh


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
        shards = 1
        for axis in self.batch:
            shards *= self.mesh.shape[axis]
        return shards

    @property
    def vocab_shards(self) -> int:
        """Over how many devices the vocabulary is split."""
        return self.mesh.shape[self.vocab]
