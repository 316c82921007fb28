"""The stage `align` over prepared documents."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from environment import on_cpus
from tokenizer_zoo import TEXTS, hf, tokenizer

from fusejax import alignment, config, corpus, parallel
from fusejax.alignment import (
    Chains,
    GoldChain,
    cache,
    load_token_table,
    quality,
    read_report,
    row_map,
    token_map,
    token_table,
)
from fusejax.alignment.chain import unpack_chain
from fusejax.alignment.quality import KINDS
from fusejax.alignment.tokens import table_columns
from fusejax.errors import UserError
from fusejax.store import Store, StoreWriter

TOP_K = 4
SEED = 3


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


def write_cache(job, label, name, made="up", nothing_every=0):
    """A made-up cache of a source, as the stage `sources` leaves it; every nth row may give no token anything."""
    tok, rng = tokenizer(name), np.random.default_rng(SEED)
    tokens = Store(job.folder / "data/train/tokens" / tok.fingerprint)
    writer = StoreWriter(job.folder / "sources" / label, {"made": made}, len(tokens), len(tokens))
    rows = []
    for record in tokens:
        n = len(record["ids"])
        ids = np.stack([rng.choice(tok.vocab_size, TOP_K, replace=False) for _ in range(n)])
        ids[: n - 1, 1] = record["ids"][1:]
        logprobs = np.log(np.sort(rng.dirichlet(np.ones(TOP_K + 1), n)[:, :TOP_K])[:, ::-1])
        ce = -logprobs[:, 1].astype(np.float32)
        if nothing_every:
            logprobs[::nothing_every] = -np.inf
        rows.append({"ids": ids.astype(np.uint16), "logprobs": logprobs.astype(np.float16), "ce": ce})
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
        report = read_report(job.folder, label)
        assert report["rows"] == sum(len(record["row_map"]) for record in store)
        assert report["aligned"] == sum((record["row_map"][:, 0] >= 0).sum() for record in store)
        assert sum(report["fallback_causes"].values()) == pytest.approx(report["kinds"][KINDS[-1]])
        assert report["mapped_ce"] is None  # no cache was there
    assert read_report(job.folder, "itself")["share"] == 1
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
    assert read_report(job.folder, "itself")["share"] == 1


def test_summary_measures_the_sources_rows(make_job):
    job = make_job()
    rows = write_cache(job, "other", "byte-level", nothing_every=3)
    alignment.run(job)
    texts = [record["text"] for record in Store(job.folder / "data/train/documents")]
    expected = quality(rows, texts, tokenizer("sentencepiece"), tokenizer("byte-level"))
    report = read_report(job.folder, "other")
    for key in (
        "mass_kept",
        "mapped_ce",
        "mapped_ce_per_byte",
        "source_top_ce_per_byte",
        "source_ce_per_byte",
        "empty",
    ):
        assert report[key] == pytest.approx(expected[key])
    for key in ("collisions", "kinds", "fallback_causes"):
        assert report[key] == pytest.approx(expected[key])
    assert report["fallback_causes"]["nothing left"] > 0
    assert (report["rows"], report["aligned"]) == (expected["rows"], expected["aligned"])
    assert report["documents"] == expected["documents"] | {"there": len(texts)}
    assert [row["token"] for row in report["top_tokens"]] == [row["token"] for row in expected["top_tokens"]]
    assert 0 < report["mass_kept"] < 1


def test_a_sample_is_said_and_all_numbers_are_those_of_it(make_job, monkeypatch, capfd):
    job = make_job()
    rows = write_cache(job, "other", "byte-level", nothing_every=3)
    monkeypatch.setattr(alignment.stage, "_SAMPLE", 2)
    alignment.run(job)
    texts = [record["text"] for record in Store(job.folder / "data/train/documents")]
    expected = quality(rows[::2], texts[::2], tokenizer("sentencepiece"), tokenizer("byte-level"))
    report = read_report(job.folder, "other")
    assert report["documents"] == {"counted": 2, "measured": 2, "there": 3}
    assert report["kinds"] == pytest.approx(expected["kinds"])
    assert report["empty"] == pytest.approx(expected["empty"])
    assert f"{report['share']:.1%} of {report['rows']} rows aligned (in 2 of 3 documents)" in capfd.readouterr().out
    itself = read_report(job.folder, "itself")
    assert itself["documents"] == {"counted": 3, "measured": 0, "there": 3}


def test_rows_of_a_document_without_numbers_fall_back(make_job):
    job = make_job()
    alignment.run(job)
    before = read_report(job.folder, "other")
    rows = write_cache(job, "other", "byte-level")
    shutil.rmtree(job.folder / "sources/other")
    writer = StoreWriter(job.folder / "sources/other", {"made": "up"}, len(rows), len(rows))
    writer.write(0, [{key: values[:0] for key, values in record.items()} for record in rows])
    writer.finish({})
    alignment.run(job)
    report = read_report(job.folder, "other")
    assert (report["rows"], report["aligned"], report["kinds"]["fallback"]) == (before["rows"], 0, 1)
    assert report["fallback_causes"]["nothing left"] == pytest.approx(before["share"])


def test_the_report_follows_the_gold_chain_and_the_cache(make_job):
    job = make_job()
    alignment.run(job)
    assert read_report(job.folder, "other")["mapped_ce"] is None
    rows = write_cache(job, "other", "byte-level")
    texts = [record["text"] for record in Store(job.folder / "data/train/documents")]
    measured = set()
    for gold_chain in (True, False, True):
        job = make_job(alignment={"gold_chain": gold_chain})
        alignment.run(job)
        expected = quality(rows, texts, tokenizer("sentencepiece"), tokenizer("byte-level"), gold_chain=gold_chain)[
            "mapped_ce"
        ]
        assert read_report(job.folder, "other")["mapped_ce"] == pytest.approx(expected)
        measured.add(round(expected, 6))
    assert len(measured) == 2


def test_chains_are_those_of_the_function_and_follow_the_cache(make_job, monkeypatch):
    job = make_job()
    for made, seed in (("up", 3), ("again", 4)):
        monkeypatch.setattr(sys.modules[__name__], "SEED", seed)
        shutil.rmtree(job.folder / "sources", ignore_errors=True)
        rows = write_cache(job, "other", "byte-level", made)
        if made == "again":
            with pytest.raises(UserError, match="run the stage `align` again"):
                Chains(job, job.sources[0])
        alignment.run(job)
        chains, maps = Chains(job, job.sources[0]), Store(job.folder / "alignment/other")
        target = Store(job.folder / "data/train/tokens" / tokenizer("sentencepiece").fingerprint)
        source = Store(job.folder / "data/train/tokens" / tokenizer("byte-level").fingerprint)
        chain, several = GoldChain(tokenizer("byte-level")), 0
        for i, values in enumerate(rows):
            row_map_T2 = maps[i]["row_map"]
            expected = chain(target[i]["boundaries"], row_map_T2, source[i]["ids"], source[i]["boundaries"], values)
            assert (unpack_chain(chains[i], row_map_T2, values["ce"]) == expected).all()
            several += len(chains[i]["rows"])
        assert several


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def many_documents(tmp_path, make_job):
    """Enough documents for several shards, with one source's cache."""
    lines = [TEXTS[i % 3][i % 7 :] + f" {i}" for i in range(200)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    def make(output):
        sources = [{"model": str(tmp_path / "byte-level"), "name": "other"}]
        job = make_job(corpus={"path": str(tmp_path / "many.jsonl")}, output=str(tmp_path / output), sources=sources)
        write_cache(job, "other", "byte-level")
        return job

    return make


@pytest.mark.slow
def test_processes_make_the_same_bytes(many_documents, monkeypatch):
    one, two = many_documents("one"), many_documents("two")
    alignment.run(config.validate(one.model_dump() | {"alignment": {"workers": 1}}))
    monkeypatch.setattr(parallel, "_PAYS_S", -1.0)
    alignment.run(config.validate(two.model_dump() | {"alignment": {"workers": 2}}))
    a, b = files(one.folder / "alignment"), files(two.folder / "alignment")
    assert len([path for path in a if path.suffix == ".array_record"]) == 8
    assert a == b


_HOST = """
import sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
from fusejax import alignment, config
alignment.run(config.load(sys.argv[1]))
"""


@pytest.mark.slow
def test_hosts_make_the_same_bytes(many_documents, tmp_path):
    one, two = many_documents("one"), many_documents("two")
    alignment.run(one)
    (tmp_path / "two.yaml").write_text(config.dump(two))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen([sys.executable, "-c", _HOST, str(tmp_path / "two.yaml"), str(port), str(i)], env=on_cpus())
        for i in range(2)
    ]
    assert [host.wait(timeout=300) for host in hosts] == [0, 0]
    assert files(one.folder / "alignment") == files(two.folder / "alignment")


def test_a_process_that_dies_is_said(many_documents, monkeypatch):
    job = many_documents("dying")
    monkeypatch.setattr(parallel, "_PAYS_S", -1.0)
    monkeypatch.setattr(parallel, "_open", os._exit)
    with pytest.raises(UserError, match="workers=1"):
        alignment.run(job)


def test_token_tables_are_kept_between_jobs(make_job, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []
    monkeypatch.setattr(cache.tokens, "token_table", lambda *args: made.append(args) or token_table(*args))
    alignment.run(make_job())
    assert len(made) == 2
    alignment.run(make_job(output=str(tmp_path / "another")))
    assert len(made) == 2
    kept = sorted(cache.folder().iterdir())
    assert [path.suffix for path in kept] == [".npz"] * 2
    whole = [path.read_bytes() for path in kept]
    for damaged in (whole[0][:-40], whole[0][:100] + bytes(8) + whole[0][108:], b"", whole[0] + b"x" * 30):
        kept[0].write_bytes(damaged)
        alignment.run(make_job(output=str(tmp_path / f"damaged{len(damaged)}{damaged[100:101].hex()}")))
        assert kept[0].read_bytes() == whole[0] or damaged.startswith(
            whole[0]
        )  # what follows a whole table does no harm
    expected = token_table(
        tokenizer("sentencepiece"), tokenizer("byte-level"), "prefix", table_columns(tokenizer("byte-level"), "inside")
    )
    for job in tmp_path.glob("damaged*"):
        assert (load_token_table(job / "alignment/other").ids == expected.ids).all()


def test_a_cache_that_cannot_be_written_is_no_obstacle(make_job, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    alignment.run(make_job())
    said = capfd.readouterr().err
    assert said.count("token tables are not kept") == 1  # though there are two sources
    assert "XDG_CACHE_HOME" in said
    assert "output" not in said


def test_again_does_nothing_and_says_so(make_job, capfd):
    job = make_job()
    alignment.run(job)
    files = {path: path.stat().st_mtime_ns for path in (job.folder / "alignment").rglob("*")}
    capfd.readouterr()
    alignment.run(job)
    assert capfd.readouterr().out.count("done before, skipped") == 2
    assert files == {path: path.stat().st_mtime_ns for path in (job.folder / "alignment").rglob("*")}


@pytest.mark.parametrize("at", ["write", "finish", "table", "report"])
def test_goes_on_after_an_interruption(make_job, monkeypatch, at):
    whole = make_job()
    alignment.run(whole)
    job = make_job(output=str(whole.folder) + "-killed")

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if at in ("table", "report"):
            name = {"table": "token_table.npz", "report": "report.json"}[at]
            whole_write = alignment.stage.write_atomically
            patch.setattr(
                alignment.stage,
                "write_atomically",
                lambda path, data: die() if path.name == name else whole_write(path, data),
            )
        else:
            patch.setattr(StoreWriter, at, die)
        with pytest.raises(Killed):
            alignment.run(job)
    alignment.run(job)
    for label in ("other", "itself"):
        assert len(Store(job.folder / "alignment" / label)) == 3
    assert files(whole.folder / "alignment") == files(job.folder / "alignment")


def test_going_on_counts_no_second_time(make_job, monkeypatch):
    job = make_job(alignment={"rows": "boundary", "tokens": "stats"})
    counted = []
    monkeypatch.setattr(cache.tokens, "token_table", lambda *args: counted.append(args) or token_table(*args))
    alignment.run(job)
    folder = job.folder / "alignment/other"
    whole = files(folder)
    (folder / "000000.array_record").unlink()
    n = len(counted)
    assert n
    alignment.run(job)
    assert len(counted) == n
    assert files(folder) == whole


def test_another_method_or_tokenizer_is_refused_and_named(make_job, tmp_path):
    alignment.run(make_job())
    with pytest.raises(UserError, match="made with other settings: rows"):
        alignment.run(make_job(alignment={"rows": "exact"}))
    other = {"model": str(tmp_path / "byte-level NFC"), "name": "other"}
    with pytest.raises(UserError, match="made with other settings: source_tokenizer"):
        alignment.run(make_job(sources=[other]))


def test_documents_of_another_corpus_or_length_are_refused(make_job, tmp_path):
    job = make_job()
    alignment.run(job)
    for changes, message in (
        ({"max_length": 64}, r"max_length \(512 there, 64 now\)"),
        ({"corpus": {"path": "/nonexistent.jsonl"}}, r"corpus.path \(.*x.jsonl there, /nonexistent.jsonl now\)"),
        ({"corpus": job.corpus.model_dump() | {"limit": 2}}, r"corpus.limit \(None there, 2 now\)"),
    ):
        with pytest.raises(UserError, match=message):
            alignment.run(config.validate(job.model_dump() | changes))
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "x.jsonl", tmp_path / "moved/x.jsonl")
    alignment.run(make_job(corpus={"path": str(tmp_path / "moved/x.jsonl")}))  # `prepare` found the same text there


def test_a_missing_or_damaged_token_map(make_job):
    job = make_job()
    folder = job.folder / "alignment/other"
    with pytest.raises(UserError, match="run the stage `align` first"):
        load_token_table(folder)
    alignment.run(job)
    (folder / "token_table.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(UserError, match=r"token_table.npz: cannot be read"):
        load_token_table(folder)
    np.savez(folder / "token_table.npz", ids=np.zeros((3, 2), np.int32), prefix_hash=np.zeros((3, 1), np.uint32))
    with pytest.raises(UserError, match=r"prefix_hash should be uint32\[V_source, C\], is uint32\[3, 1\]\); remove"):
        load_token_table(folder)
    made_anew = (folder / "report.json").read_bytes()
    for damaged in ({}, {"report": {}}, {"report": json.loads(made_anew)["report"] | {"share": None}}):
        (folder / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"report.json: is damaged, .*; remove it and run the stage `align` again"):
            read_report(job.folder, "other")
    alignment.run(job)
    assert (folder / "report.json").read_bytes() == made_anew


@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("damage", ["other bytes", "flipped", "missing"])
def test_a_damaged_token_map_is_made_again(make_job, damage, report):
    job = make_job()
    alignment.run(job)
    path = job.folder / "alignment/other/token_table.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {"other bytes": b"damaged", "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}
    path.write_bytes(damaged.get(damage, b""))
    if damage == "missing":
        path.unlink()
    if not report:
        path.with_name("report.json").unlink()
    alignment.run(job)
    assert path.read_bytes() == whole
