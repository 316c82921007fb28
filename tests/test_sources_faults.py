"""The stage `sources` as a process: killed at any moment, and on ten times the text."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from fusejax import config
from fusejax.store import Store

pytestmark = pytest.mark.slow

# Shards of 3 documents, slowly written, so that a kill meets one being written.
RUN = """
import resource, sys, time
from fusejax import config, sources
from fusejax.store import StoreWriter
write = StoreWriter.write
def slow_write(*arguments):
    time.sleep(float(sys.argv[2]))
    write(*arguments)
StoreWriter.write = slow_write
sources.shard_records = lambda *_: 3
sources.run(config.load(sys.argv[1]))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def texts(n):
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "class", "Cat", "sit", "self", "return"]
    return {"prose": [" ".join(rng.choices(words, k=rng.randint(1, 12))) + "." for _ in range(n)]}


@pytest.fixture
def start(tmp_path):
    def start(job, seconds=0.0):
        path = tmp_path / f"{job.folder.name}.yaml"
        path.write_text(config.dump(job))
        command = [sys.executable, "-c", RUN, str(path), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def test_killed_twenty_times_equals_undisturbed(make_job, start):
    whole, cut = (make_job(name, texts=texts(120)) for name in ("whole", "cut"))
    process = start(whole)
    assert process.wait(timeout=300) == 0, process.stdout.read()
    rng = random.Random(1)
    for kill in range(20):
        before = len(list(cut.folder.glob("sources/*/*.array_record")))
        process = start(cut, 0.1)
        deadline = time.monotonic() + (300 if kill % 4 else 2)  # every fourth one while it starts
        while len(list(cut.folder.glob("sources/*/*.array_record"))) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None
        process.kill()
        process.wait(timeout=60)
    process = start(cut)
    assert process.wait(timeout=300) == 0, process.stdout.read()
    for label in ("coarse", "fine"):
        ours, theirs = (Store(job.folder / "sources" / label) for job in (whole, cut))
        assert ours.summary == theirs.summary
        for a, b in zip(ours, theirs, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
        assert not list((cut.folder / "sources" / label).glob(".*.tmp*"))


def test_memory_does_not_grow_with_the_corpus(make_job, start):
    peaks = []
    for n in (60, 600):
        out, _ = start(make_job(f"job{n}", texts=texts(n))).communicate(timeout=300)
        peaks.append(int(out.rpartition("peak")[2]))
    assert peaks[1] < 1.05 * peaks[0]
