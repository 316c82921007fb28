import gc
import shutil

import jax
import numpy as np
import pytest
from conftest import MAX_LENGTH, TEXTS, write_documents
from flax import nnx

from fusejax import models, sources
from fusejax.errors import UserError
from fusejax.scoring import inputs_and_labels
from fusejax.source_cache import SourceCache
from fusejax.store import Store, StoreWriter
from fusejax.tokenizers import Tokenizer


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 3 documents, so that a few documents make several."""
    monkeypatch.setattr(sources, "shard_records", lambda tokens, max_length: 3)


def make_dense(folder, k):
    """ids of a document → (ids, log-probabilities, ce) from the model's logits, float64; the BOS row left out."""
    tokenizer, model = Tokenizer.load(folder), models.load(folder)
    logits_of = nnx.jit(lambda model, ids: model(ids))
    front = int(tokenizer.adds_bos)

    def dense(ids):
        inputs, labels = inputs_and_labels(ids, tokenizer)
        padded = np.zeros((1, MAX_LENGTH), np.int32)
        padded[0, : len(inputs)] = inputs
        logits = np.asarray(logits_of(model, padded), np.float64)[0, : len(inputs), : tokenizer.vocab_size]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k]
        ce = -logprobs[np.arange(len(labels)), labels]
        return order[front:], np.take_along_axis(logprobs, order, 1)[front:], ce[front:]

    return dense


def test_records_are_the_models_distributions(make_job, tiny_models):
    job = make_job()
    sources.run(job)
    for label, folder in tiny_models.items():
        cache = Store(job.folder / "sources" / label)
        tokens = Store(job.folder / "data/train/tokens" / Tokenizer.load(folder).fingerprint)
        assert len(cache) == len(tokens) == sum(map(len, TEXTS.values()))
        dense = make_dense(folder, 5)
        for i in range(len(cache)):
            ids, logprobs, ce = dense(tokens[i]["ids"])
            record = cache[i]
            assert [record[name].dtype for name in ("ids", "logprobs", "ce")] == [np.uint16, np.float16, np.float32]
            np.testing.assert_array_equal(record["ids"], ids)
            np.testing.assert_allclose(record["logprobs"], logprobs, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(record["ce"], ce, atol=1e-4)
            assert (np.diff(record["logprobs"], axis=1) <= 0).all()
            assert (record["logprobs"] <= 0).all()


def test_values_do_not_depend_on_the_batch(make_job, compiled_as_a_job):
    small = make_job("small", cache={"top_k": 5, "batch_tokens": 1, "values": "float32"})
    large = make_job("large", cache={"top_k": 5, "batch_tokens": 4096, "values": "float32"})
    sources.run(small)
    sources.run(large)
    for label in ("coarse", "fine"):
        for a, b in zip(Store(small.folder / "sources" / label), Store(large.folder / "sources" / label), strict=True):
            np.testing.assert_array_equal(a["ids"], b["ids"])
            np.testing.assert_allclose(a["logprobs"], b["logprobs"], atol=1e-5)
            np.testing.assert_allclose(a["ce"], b["ce"], atol=1e-5)


def test_goes_on_after_a_kill_and_ends_the_same(make_job, monkeypatch, small_shards):
    whole, cut = make_job("whole"), make_job("cut")
    sources.run(whole)

    class Killed(BaseException):
        pass

    real, written = StoreWriter.write, []

    def write(self, shard, records, note):
        if len(written) == 2:
            raise Killed
        written.append(shard)
        real(self, shard, records, note)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", write)
        with pytest.raises(Killed):
            sources.run(cut)
    assert written == [0, 1]
    paths = [cut.folder / f"sources/coarse/{shard:06d}.array_record" for shard in written]
    untouched = [path.stat().st_mtime_ns for path in paths]
    sources.run(cut)
    assert [path.stat().st_mtime_ns for path in paths] == untouched
    for label in ("coarse", "fine"):
        a, b = (Store(job.folder / "sources" / label) for job in (whole, cut))
        assert a.summary == b.summary
        for left, right in zip(a, b, strict=True):
            for name in left:
                np.testing.assert_array_equal(left[name], right[name])


def test_a_finished_cache_is_not_made_again(make_job, monkeypatch, capsys):
    job = make_job()
    sources.run(job)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded a model"))
    sources.run(job)
    assert "source fine: done before, skipped" in capsys.readouterr().out


def test_a_damaged_shard_that_was_removed_is_made_again(make_job, small_shards):
    job = make_job()
    sources.run(job)
    path = job.folder / "sources/coarse/000001.array_record"
    before = path.read_bytes()
    path.unlink()
    sources.run(job)
    assert path.read_bytes() == before


def test_another_text_or_setting_is_named(make_job):
    sources.run(make_job())
    with pytest.raises(UserError, match="was made with other settings: top_k"):
        sources.run(make_job(cache={"top_k": 6}))
    job = make_job()
    shutil.rmtree(job.folder / "data")
    with pytest.raises(UserError, match="was made with other settings: text"):
        sources.run(make_job(texts={"prose": TEXTS["prose"][:3]}))


def test_more_entries_than_tokens_are_refused(make_job):
    with pytest.raises(UserError, match=r"cache\.top_k: 300 is more than the 280 tokens"):
        sources.run(make_job(sources=[make_job().sources[1].model_dump()], cache={"top_k": 300}))


@pytest.fixture
def broken_embedding(monkeypatch, tiny_models):
    """broken_embedding(piece): from now on every model loaded has a damaged embedding row for a token of `piece`."""
    real = models.load

    def break_row(piece):
        bad = Tokenizer.load(tiny_models["coarse"]).encode(piece)[0][0]

        def load(*arguments, **options):
            model = real(*arguments, **options)
            model.embedding[...] = model.embedding[...].at[bad].set(np.nan)
            return model

        monkeypatch.setattr(models, "load", load)

    return break_row


def test_a_source_that_gives_no_numbers_at_all_is_refused(make_job, broken_embedding):
    broken_embedding(" ")
    with pytest.raises(UserError, match=r"gives values that are not numbers on \d+ of 11 documents, the first"):
        sources.run(make_job())


def test_a_document_without_numbers_is_counted_and_poisons_no_other(make_job, broken_embedding, capsys):
    whole, broken = make_job("whole"), make_job("broken")
    sources.run(whole)
    broken_embedding("class")
    sources.run(broken)
    said = capsys.readouterr().out
    assert "source coarse: gave values that are not numbers on 1 of 11 documents, the first being" in said
    assert "document10" in said
    right, wrong = (SourceCache(job.folder / "sources/coarse") for job in (whole, broken))
    assert right.summary["broken"] == 0
    assert wrong.summary["broken"] == 1
    assert right.summary["rows"] == sum(len(record["ce"]) for record in right)
    assert wrong.summary["rows"] == sum(len(record["ce"]) for record in wrong)
    for i in range(10):
        np.testing.assert_array_equal(right[i]["ids"], wrong[i]["ids"])
        np.testing.assert_allclose(right[i]["logprobs"], wrong[i]["logprobs"], atol=1e-3)
    assert len(wrong[10]["ce"]) == 0 < len(right[10]["ce"])


def test_odd_documents_are_counted_and_leave_the_others_alone(make_job, tiny_models, broken_embedding, capsys):
    tokenizer = Tokenizer.load(tiny_models["coarse"])
    full = next(text for n in range(400) if len(tokenizer.encode(text := "z" * n)[0]) == MAX_LENGTH - 1)
    plain = TEXTS["prose"][:2] + TEXTS["code"][:2]
    source = [{"model": tiny_models["coarse"], "name": "coarse"}]
    alone = make_job("alone", texts={"a": plain}, sources=source)
    odd = make_job("odd", texts={"a": [plain[0], "", plain[1], "x", full, plain[2], "class", plain[3]]}, sources=source)
    sources.run(alone)
    capsys.readouterr()
    broken_embedding("class")
    sources.run(odd)
    said = capsys.readouterr().out
    assert "rows of 8 documents (1 empty, 1 of one token, 1 as long as max_length)" in said
    assert "gave values that are not numbers on 1 of 8 documents, the first being document6" in said
    right, wrong = (SourceCache(job.folder / "sources/coarse") for job in (alone, odd))
    counted = {key: wrong.summary[key] for key in ("empty", "one_token", "full", "broken", "first_broken")}
    assert counted == {"empty": 1, "one_token": 1, "full": 1, "broken": 1, "first_broken": "document6"}
    assert [len(rows["ce"]) for rows in wrong][1::2] == [0, 1, len(right[2]["ce"]), len(right[3]["ce"])]
    assert (len(wrong[4]["ce"]), len(wrong[6]["ce"])) == (MAX_LENGTH - 1, 0)
    for i, j in enumerate((0, 2, 5, 7)):
        np.testing.assert_array_equal(right[i]["ids"], wrong[j]["ids"])
        np.testing.assert_allclose(right[i]["logprobs"], wrong[j]["logprobs"], atol=1e-3)


def test_no_bos_where_none_is_wanted(make_job, tiny_models):
    """`bos: never` is another cache than the tokenizer's own way, with as many rows."""
    caches = []
    for name, bos in (("with", "auto"), ("without", "never")):
        job = make_job(name, sources=[{"model": tiny_models["fine"], "name": "fine", "bos": bos}])
        fingerprint = Tokenizer.load(tiny_models["fine"], bos=bos).fingerprint
        tokens = job.folder / "data/train/tokens"
        if not (tokens / fingerprint).exists():
            write_documents(job.folder / "data/train", TEXTS, [Tokenizer.load(tiny_models["fine"], bos=bos)])
        sources.run(job)
        caches.append(SourceCache(job.folder / "sources/fine"))
    ones, others = caches
    assert ones.summary["rows"] == others.summary["rows"]
    assert ones.inputs["tokenizer"] != others.inputs["tokenizer"]
    assert any((one["ids"] != other["ids"]).any() for one, other in zip(ones, others, strict=True))


def test_a_source_is_freed_before_the_next_is_loaded(make_job, monkeypatch):
    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    real, before = models.load, []
    monkeypatch.setattr(models, "load", lambda *given, **options: (before.append(held()), real(*given, **options))[1])
    job = make_job()
    gc.collect()
    gc.disable()  # what only the collector frees may still be there when the next source needs the room
    try:
        base = held()
        sources.run(job)
        assert before == [base, base]
        assert held() == base
    finally:
        gc.enable()


def test_sampled_rows_are_draws_whatever_the_batch(make_job, tiny_models):
    cache = {"kind": "sampled", "rounds": 40}
    small, large = (make_job(str(size), cache=cache | {"batch_tokens": size}) for size in (1, 4096))
    for job in (small, large):
        sources.run(job)
    folder = tiny_models["fine"]
    one, other = (SourceCache(job.folder / "sources/fine") for job in (small, large))
    tokens = Store(small.folder / "data/train/tokens" / Tokenizer.load(folder).fingerprint)
    assert one.width == max(rows["ids"].shape[1] for rows in one)
    dense, errors = make_dense(folder, 280), []
    for i in range(len(one)):
        ids, logprobs, ce = dense(tokens[i]["ids"])
        np.testing.assert_allclose(one[i]["ce"], ce, atol=1e-4)
        n = len(ce)
        probs, shares, others = (np.zeros((n, 281)) for _ in range(3))
        np.put_along_axis(probs, ids, np.exp(logprobs), 1)
        np.put_along_axis(shares, one[i]["ids"], np.exp(one[i]["logprobs"]), 1)
        np.put_along_axis(others, other[i]["ids"], np.exp(other[i]["logprobs"]), 1)
        # A number within rounding of the border between two tokens may fall to either.
        assert np.abs(shares - others)[:, :280].sum() * 40 / 2 <= 1 + n * 40 / 1000
        np.testing.assert_allclose(shares[:, :280].sum(-1), 1, rtol=1e-5)
        errors.append((shares - probs)[:, :280].mean(0))
    # Shares of 40 draws err by less than 1 / sqrt(40) in a row; over all rows the errors cancel.
    assert np.abs(np.concatenate(errors)).max() < 0.3
    assert np.abs(np.mean(errors, 0)).max() < 0.02
