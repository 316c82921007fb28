"""Which of several processes under `jax.distributed` this one is, for stages that divide their work by shard.

The processes share the output folder. Nothing here starts JAX: without it, or alone, there is one host.
"""

import sys
from collections.abc import Sequence


def index_and_count() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def is_own(shard: int) -> bool:
    """Whether this host writes the shard; by number, so that hosts agree whatever each one found missing."""
    index, count = index_and_count()
    return shard % count == index


def own(shards: Sequence[tuple[int, range]]) -> list[tuple[int, range]]:
    """The shards that this host writes."""
    return [(shard, span) for shard, span in shards if is_own(shard)]


def wait_for_all(what: str) -> None:
    """Go on when every host is here."""
    if index_and_count()[1] > 1:
        from fusejax import distributed

        distributed.barrier(what)
