import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusejax.source_cache import (
    SourceCache,
    decode,
    decode_logprobs,
    encode_logprobs,
    entries,
    sampled_record,
    topk_record,
)
from fusejax.store import StoreWriter
from fusejax.verification import row_problem


def make_rows(n=300, k=10, vocab=49152, seed=0):
    """Rows shaped as a language model's: Zipf's law for ids, a softmax of widely spread logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, vocab // 64)) * rng.uniform(1, 6, size=(n, 1))
    logprobs = np.sort(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), -1)[:, : -k - 1 : -1]
    ids = np.minimum(rng.zipf(1.2, size=(n, k)), vocab - 1)
    return ids.astype(np.int32), logprobs.astype(np.float32), rng.exponential(2.5, n).astype(np.float32)


@given(hnp.arrays(np.float32, 50, elements=st.floats(-70, 0, width=32)))
def test_codes_keep_order_and_their_documented_errors(logprobs):
    logprobs = np.sort(logprobs)[::-1]
    back = decode_logprobs(encode_logprobs(logprobs))
    assert (np.diff(back) <= 0).all()
    assert (back <= 0).all()
    assert np.abs(np.exp(back.astype(np.float64)) - np.exp(logprobs.astype(np.float64))).max() <= 0.0053
    inside = logprobs >= -40
    assert (np.abs(back - logprobs)[inside] <= 0.0087 * (0.5 - logprobs[inside]) + 1e-5).all()


def test_mean_error_of_codes():
    _, logprobs, _ = make_rows()
    error = np.abs(np.exp(decode_logprobs(encode_logprobs(logprobs))) - np.exp(logprobs))
    assert error.mean() < 0.0008


@pytest.mark.parametrize(("values", "tolerance"), [("float32", 0), ("float16", 1e-3), ("uint8", 6e-3)])
@pytest.mark.parametrize(("vocab", "dtype"), [(65536, np.uint16), (65537, np.uint32), (262144, np.uint32)])
def test_what_goes_in_comes_out(values, tolerance, vocab, dtype):
    ids, logprobs, ce = make_rows(vocab=vocab)
    ids[0, 0] = vocab - 1
    record = topk_record(ids, logprobs, ce, vocab, values)
    assert record["ids"].dtype == dtype
    back = decode(record)
    np.testing.assert_array_equal(back["ids"], ids)
    np.testing.assert_array_equal(back["ce"], ce)
    np.testing.assert_allclose(np.exp(back["logprobs"]), np.exp(logprobs), atol=tolerance)
    assert (np.exp(back["logprobs"].astype(np.float64)).sum(-1) <= 1 + 2e-3).all()
    if values == "uint8":
        assert (np.exp(back["logprobs"].astype(np.float64)).sum(-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize(("values", "most"), [("float16", 44), ("uint8", 33)])
def test_bytes_per_row_on_disk(tmp_path, values, most):
    """All in: shards, notes, manifest."""
    documents = [make_rows(n=400, seed=i) for i in range(256)]
    writer = StoreWriter(tmp_path, {}, len(documents), 64)
    for shard, span in writer.missing():
        writer.write(shard, [topk_record(*documents[i], 49152, values) for i in span], {"rows": 1})
    writer.finish({})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / (256 * 400) <= most
    assert len(SourceCache(tmp_path)[255]["ce"]) == 400


def test_rows_of_nothing():
    record = topk_record(np.zeros((0, 10), np.int32), np.zeros((0, 10)), np.zeros(0), 100, "uint8")
    assert [array.shape for array in decode(record).values()] == [(0, 10), (0, 10), (0,)]


@given(hnp.arrays(np.int32, st.tuples(st.integers(0, 6), st.integers(1, 60)), elements=st.integers(0, 40)))
def test_draws_come_back_as_shares(draws):
    n, rounds = draws.shape
    record = sampled_record(draws, np.zeros(n), 41)
    rows = decode(record)
    assert rows["ids"].dtype == np.int32
    assert entries(record) == (max(len(set(row)) for row in draws.tolist()) if n else 0)
    for ids, logprobs, drawn in zip(rows["ids"], rows["logprobs"], draws, strict=True):
        shares = {i: np.exp(x) for i, x in zip(ids.tolist(), logprobs.tolist(), strict=True) if i >= 0}
        values, counts = np.unique(drawn, return_counts=True)
        assert shares == pytest.approx(dict(zip(values.tolist(), counts / rounds, strict=True)), rel=1e-5)
        assert (logprobs[1:] <= logprobs[:-1]).all()
        assert np.isneginf(logprobs[ids < 0]).all()
    assert row_problem(rows) == ""
