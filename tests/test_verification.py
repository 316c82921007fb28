import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax import cli, sources
from fusejax.errors import UserError
from fusejax.source_cache import decode, topk_record
from fusejax.store import StoreWriter
from fusejax.verification import row_problem, verify


def make_rows(n=6, k=4):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, 50))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, -1)[:, :k]
    return ids, np.take_along_axis(logprobs, ids, -1), rng.random(n)


def write(folder, n=9, rows=None):
    writer = StoreWriter(folder, {"top_k": 4, "tokenizer": "t"}, n, 4)
    for shard, span in writer.missing():
        writer.write(shard, [topk_record(*(rows or make_rows()), 50, "float16") for _ in span])
    writer.finish({"rows": 6 * n})
    return folder


def test_a_whole_store_passes(tmp_path, capsys):
    verify(str(write(tmp_path / "s")))
    assert "9 records, 54 rows, every checksum right" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_rows_that_the_manifest_does_not_count_are_found(make_job, capsys, kind):
    job = make_job(cache={"kind": kind})
    sources.run(job)
    path = job.folder / "sources/fine/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["summary"]["rows"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="1 problems"):
        verify(str(path.parent))
    assert "its manifest says" in capsys.readouterr().out


@given(st.integers(0, 2), st.floats(0, 1, exclude_max=True))
def test_any_flipped_byte_is_found_and_its_shard_named(tmp_path_factory, shard, where):
    folder = write(tmp_path_factory.mktemp("v"))
    path = folder / f"{shard:06d}.array_record"
    data = bytearray(path.read_bytes())
    used = np.flatnonzero(np.frombuffer(bytes(data), np.uint8))  # the format pads shards with zeros
    data[used[int(where * len(used))]] ^= 0x10
    path.write_bytes(bytes(data))
    intact = [topk_record(*make_rows(), 50, "float16")] * 9
    try:
        verify(str(folder))
    except UserError:
        return
    # A byte that the reader does not need (ArrayRecord's footer holds some) must not have changed a record.
    from fusejax.store import Store

    for record, right in zip(Store(folder), intact, strict=True):
        for name in right:
            np.testing.assert_array_equal(record[name], right[name])


def test_a_shard_in_anothers_place_is_found(tmp_path):
    folder = write(tmp_path / "s")
    first, second = (folder / f"{i:06d}.array_record" for i in (0, 1))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    with pytest.raises(UserError, match="8 problems"):
        verify(str(folder))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda ids, logprobs, ce: logprobs.__setitem__((2, 0), np.nan),
            "row 2 has log-probabilities that are not num",
        ),
        (lambda ids, logprobs, ce: logprobs.__setitem__(1, logprobs[1, ::-1].copy()), "row 1 has .* descending order"),
        (lambda ids, logprobs, ce: logprobs.__setitem__(0, -0.5), "row 0 has probabilities that add up to more than 1"),
        (lambda ids, logprobs, ce: ids.__setitem__((3, 1), ids[3, 0]), "row 3 has a token twice"),
        (lambda ids, logprobs, ce: ce.__setitem__(5, np.nan), "row 5 has a cross-entropy that is not a number"),
    ],
)
def test_rows_that_no_model_gives_are_found(tmp_path, capsys, change, what):
    rows = make_rows()
    change(*rows)
    with pytest.raises(UserError, match="problems"):
        verify(str(write(tmp_path / "s", rows=rows)))
    out = capsys.readouterr().out
    assert "record 0" in out
    assert re.search(what, out)


def test_right_rows_have_no_problem():
    assert row_problem(decode(topk_record(*make_rows(), 50, "uint8"))) == ""


def test_commands(make_job, capsys):
    job = make_job()
    sources.run(job)
    store = str(job.folder / "sources/fine")
    cli.main(["inspect", store, "--verify"])
    assert "every checksum right" in capsys.readouterr().out
    cli.main(["inspect", store, "--record", "1", "--row", "3"])
    out = capsys.readouterr().out
    assert "row 3 follows: " in out
    assert "the true next" in out or "all others" in out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", store, "--row", "100000"])
    assert "has no row 100000; the last one is" in capsys.readouterr().err
