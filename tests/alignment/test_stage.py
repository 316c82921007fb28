"""The stage `align` over prepared documents."""

import json

import numpy as np
import pytest
from tokenizer_zoo import TEXTS, hf, tokenizer

from fusejax import alignment, config, corpus
from fusejax.alignment import load_token_table, quality, row_map, token_map, token_table
from fusejax.alignment.tokens import table_columns
from fusejax.errors import UserError
from fusejax.store import Store, StoreWriter

TOP_K = 4


@pytest.fixture
def make_job(tmp_path):
    for name in ("sentencepiece", "byte-level", "byte-level NFC"):
        hf(name).save_pretrained(tmp_path / name)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def make(**changes):
        values = {
            "target": str(tmp_path / "sentencepiece"),
            "sources": [
                {"model": str(tmp_path / "byte-level"), "name": "other"},
                {"model": str(tmp_path / "sentencepiece"), "name": "itself"},
            ],
            "corpus": {"path": str(tmp_path / "x.jsonl")},
            "max_length": 512,
            "output": str(tmp_path / "job"),
        }
        job = config.validate(values | changes)
        corpus.prepare(job)
        return job

    return make


def write_cache(job, label, name):
    """A made-up cache of a source, as the stage `sources` leaves it."""
    tok, rng = tokenizer(name), np.random.default_rng(3)
    tokens = Store(job.folder / "data/train/tokens" / tok.fingerprint)
    writer = StoreWriter(job.folder / "sources" / label, {"made": "up"}, len(tokens))
    rows = []
    for record in tokens:
        n = len(record["ids"])
        ids = np.stack([rng.choice(tok.vocab_size, TOP_K, replace=False) for _ in range(n)])
        ids[: n - 1, 1] = record["ids"][1:]
        logprobs = np.log(np.sort(rng.dirichlet(np.ones(TOP_K + 1), n)[:, :TOP_K])[:, ::-1])
        rows.append({"ids": ids.astype(np.uint16), "logprobs": logprobs.astype(np.float16),
                     "ce": -logprobs[:, 1].astype(np.float32)})  # fmt: skip
    writer.write(0, rows)
    writer.finish({})
    return rows


def test_row_maps_and_token_tables_are_those_of_the_functions(make_job):
    job = make_job()
    alignment.run(job)
    target, source = tokenizer("sentencepiece"), tokenizer("byte-level")
    documents = Store(job.folder / "data/train/documents")
    for label, tok in (("other", source), ("itself", target)):
        store = Store(job.folder / "alignment" / label)
        for record, document in zip(store, documents, strict=True):
            assert (record["row_map"] == row_map(document["text"], target, tok)).all()
        assert store.summary["rows"] == sum(len(record["row_map"]) for record in store)
        assert store.summary["aligned"] == sum((record["row_map"][:, 0] >= 0).sum() for record in store)
        assert store.summary["mapped_ce"] is None  # no cache was there
    assert Store(job.folder / "alignment/itself").summary["share"] == 1
    table = load_token_table(job.folder / "alignment/other")
    expected = token_table(target, source, "prefix", table_columns(source, "inside"))
    assert (table.ids == expected.ids).all()
    assert (table.prefix_hash == expected.prefix_hash).all()
    assert load_token_table(job.folder / "alignment/itself").ids.shape == (target.vocab_size, 1)


@pytest.mark.parametrize(("rows", "tokens"), [("mined", "mined"), ("mined", "stats"), ("exact", "exact")])
def test_the_papers_methods(make_job, rows, tokens):
    job = make_job(alignment={"rows": rows, "tokens": tokens})
    alignment.run(job)
    target, source = tokenizer("sentencepiece"), tokenizer("byte-level")
    texts = [record["text"] for record in Store(job.folder / "data/train/documents")]
    for record, text in zip(Store(job.folder / "alignment/other"), texts, strict=True):
        assert (record["row_map"] == row_map(text, target, source, rows)).all()
    table = load_token_table(job.folder / "alignment/other")
    assert (table.ids[:, 0] == token_map(target, source, tokens, texts)).all()
    assert Store(job.folder / "alignment/itself").summary["share"] == 1


def test_summary_measures_the_sources_rows(make_job):
    job = make_job()
    rows = write_cache(job, "other", "byte-level")
    alignment.run(job)
    texts = [record["text"] for record in Store(job.folder / "data/train/documents")]
    expected = quality(rows, texts, tokenizer("sentencepiece"), tokenizer("byte-level"))
    summary = Store(job.folder / "alignment/other").summary
    assert summary["mass_kept"] == pytest.approx(expected["mass_kept"])
    assert summary["mapped_ce"] == pytest.approx(expected["mapped_ce"])
    assert 0 < summary["mass_kept"] < 1


def test_again_does_nothing_and_says_so(make_job, capfd):
    job = make_job()
    alignment.run(job)
    files = {path: path.stat().st_mtime_ns for path in (job.folder / "alignment").rglob("*")}
    capfd.readouterr()
    alignment.run(job)
    assert capfd.readouterr().out.count("done before, skipped") == 2
    assert files == {path: path.stat().st_mtime_ns for path in (job.folder / "alignment").rglob("*")}


@pytest.mark.parametrize("at", ["write", "finish", "table"])
def test_goes_on_after_an_interruption(make_job, monkeypatch, at):
    whole = make_job()
    alignment.run(whole)
    job = make_job(output=str(whole.folder) + "-killed")

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if at == "table":
            patch.setattr("fusejax.alignment.stage.write_atomically", die)
        else:  # `finish` is called twice: killed between the last shard and the summary
            method = getattr(StoreWriter, at)
            patch.setattr(StoreWriter, at, lambda self, *args: die() if args[-1] else method(self, *args))
        with pytest.raises(Killed):
            alignment.run(job)
    alignment.run(job)
    for label in ("other", "itself"):
        a, b = (Store(each.folder / "alignment" / label) for each in (whole, job))
        assert a.summary == b.summary
        assert a.summary["rows"] > 0
        assert all((one["row_map"] == two["row_map"]).all() for one, two in zip(a, b, strict=True))


def test_another_method_or_tokenizer_is_refused_and_named(make_job, tmp_path):
    alignment.run(make_job())
    with pytest.raises(UserError, match="made with another rows"):
        alignment.run(make_job(alignment={"rows": "exact"}))
    other = {"model": str(tmp_path / "byte-level NFC"), "name": "other"}
    with pytest.raises(UserError, match="made with another source_tokenizer"):
        alignment.run(make_job(sources=[other]))


def test_a_missing_or_damaged_token_map(make_job):
    job = make_job()
    folder = job.folder / "alignment/other"
    with pytest.raises(UserError, match="run the stage `align` first"):
        load_token_table(folder)
    alignment.run(job)
    (folder / "token_map.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(UserError, match=r"token_map.npz: cannot be read"):
        load_token_table(folder)
