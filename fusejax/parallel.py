"""Work over the shards of a store, spread over processes of this machine where that pays."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from fusejax.errors import UserError
from fusejax.progress import Bar, progress

Shard = tuple[int, range]
Work = Callable[[int, range], None]

_PAYS_S = 10.0  # a process takes seconds to start


def run_shards(title: str, make: Callable[[], Work], shards: Sequence[Shard], workers: int | None = None) -> None:
    """Call `make()(shard, span)` for every (shard, span), with a bar titled `title` over their records.

    make: opens what the work needs, once in each process that works; picklable. The work must depend on the shard
    alone, so that the result does not depend on how many processes there are. workers: at most so many processes; the
    default is one for each CPU that this process may use. Others are started only where the rest of the work, by
    what was done so far, takes longer than starting them. Raises UserError where a process dies.
    """
    if not shards:
        return
    limit = workers or usable_cpus()
    left = list(shards)
    with progress(title, sum(len(span) for _, span in shards)) as bar:
        work, started, done = make(), time.monotonic(), 0
        while left:
            rest_s = (time.monotonic() - started) / done * len(left) if done else 0.0
            if limit > 1 and len(left) > 1 and rest_s > _PAYS_S:
                _in_processes(make, left, min(limit, len(left)), bar)
                return
            shard, span = left.pop(0)
            work(shard, span)
            done += 1
            bar.advance(len(span))


def usable_cpus() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: Work


def _in_processes(make: Callable[[], Work], shards: Sequence[Shard], workers: int, bar: Bar) -> None:
    # JAX has threads, which a forked process does not survive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(make,)) as pool:
        spans = {pool.submit(_do, shard, span): span for shard, span in shards}
        try:
            for future in as_completed(spans):
                future.result()
                bar.advance(len(spans[future]))
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, perhaps for want of memory; run the same command again with fewer of them "
                "(alignment.workers=1)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _open(make: Callable[[], Work]) -> None:
    """What a worker does first."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = make()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(shard: int, span: range) -> None:
    _work(shard, span)
