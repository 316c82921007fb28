"""Corpora of every form, their faults, splitting, and the stage `prepare`."""

import gzip
import itertools
import json
from collections import Counter
from hashlib import sha256

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import TEXTS, byte_level, hf, tokenizer
from tokenizers.normalizers import Replace

from fusejax import config, corpus, reading
from fusejax.config import CorpusConfig
from fusejax.corpus import Document, local_size, prepare, read_documents, split_document
from fusejax.errors import UserError
from fusejax.splitting import fits, split_text
from fusejax.store import Store
from fusejax.tokenizers import Tokenizer


def write_jsonl(path, records, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return str(path)


def read(path, **settings):
    return list(read_documents(CorpusConfig(path=str(path), **settings)))


def mistake(path, **settings):
    """The message of the UserError that reading gives; it must be one line."""
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Reading


def test_jsonl_plain_and_compressed(tmp_path):
    records = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    plain = read(write_jsonl(tmp_path / "prose.jsonl", records))
    assert [document.text for document in plain] == TEXTS
    assert plain[0].id == sha256(TEXTS[0].encode()).hexdigest()[:16]
    assert {document.domain for document in plain} == {"prose"}
    assert read(write_jsonl(tmp_path / "prose.jsonl.gz", records, gzip.open)) == plain


def test_text_and_domain_keys_reach_into_records(tmp_path):
    records = [{"meta": {"set": name, "body": f"text {n}"}} for n, name in enumerate("aba")]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    documents = read(path, text_key="meta.body", domain_key="meta.set")
    assert [(document.domain, document.text) for document in documents] == [
        ("a", "text 0"), ("b", "text 1"), ("a", "text 2"),
    ]  # fmt: skip


def test_parquet(tmp_path):
    table = pyarrow.table({"content": TEXTS, "kind": ["x", "y", "x"], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    documents = read(tmp_path / "t.parquet", text_key="content", domain_key="kind")
    assert [(document.domain, document.text) for document in documents] == list(zip("xyx", TEXTS, strict=True))
    assert "columns there: content, kind, other" in mistake(tmp_path / "t.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing of the kind")
    assert "broken.parquet" in mistake(tmp_path / "broken.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert "row 1" in mistake(tmp_path / "null.parquet")


def test_text_files_and_folders_in_order(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nletter")
    (tmp_path / "letters" / "a.txt").write_text("first letter")
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / "notes.md").write_text("not read either")
    write_jsonl(tmp_path / "code.jsonl", [{"text": "x = 1"}])
    documents = read(tmp_path)
    assert [(document.domain, document.text) for document in documents] == [
        ("code", "x = 1"), ("letters", "first letter"), ("letters", "second\r\nletter"),
    ]  # fmt: skip
    assert read(tmp_path / "letters" / "a.txt")[0].domain == "a"


def test_domains_and_limits(tmp_path):
    records = [{"text": f"{name} {n:03}", "d": name} for n in range(5) for name in "abc"]
    path = write_jsonl(tmp_path / "x.jsonl", records)

    def kept(**settings):
        return [document.text for document in read(path, domain_key="d", **settings)]

    assert kept(domains=["c", "a"], limit=2) == ["a 000", "c 000", "a 001", "c 001"]
    assert kept(limit_bytes=11) == [f"{name} {n:03}" for n in range(2) for name in "abc"]
    assert "domains there: a, b, c" in mistake(path, domain_key="d", domains=["z"])
    assert "longer than corpus.limit_bytes" in mistake(path, domain_key="d", limit_bytes=1)


def test_repeated_documents_count_once(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in ("a", "b", "a", "a")])
    counts = Counter()
    documents = list(read_documents(CorpusConfig(path=path, limit=2), counts))
    assert [document.text for document in documents] == ["a", "b"]
    assert counts["duplicates"] == 2


def test_files_beyond_the_limit_are_not_opened(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    path = tmp_path / "sub"
    path.mkdir()
    (path / "a.jsonl").write_bytes(b"\xff not JSON at all")  # the same domain: its limit is reached before
    assert [document.text for document in read(tmp_path, limit=2)] == ["one", "two"]
    assert "sub/a.jsonl:1: not UTF-8" in mistake(tmp_path, limit=3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "x.jsonl:2: not valid JSON"),
        (b'{"text": "a"}\n["b"]\n', "x.jsonl:2: should be an object"),
        (
            b'{"text": "a"}\n{"body": "b", "id": 1}\n',
            "x.jsonl:2: no key 'text' (corpus.text_key); keys there: body, id",
        ),
        (b'{"text": "a"}\n\n{"text": " \\n"}\n', "x.jsonl:3: the text is empty"),
        (b'{"text": ""}\n', "x.jsonl:1: the text is empty"),
        (b'{"text": null}\n', "x.jsonl:1: key 'text' should hold a text, it holds a value of type null"),
        (b'{"text": ["a"]}\n', "of type list"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "x.jsonl:2: not UTF-8 (byte 13: 0xe9)"),
        (b'{"text": "\\ud83d"}\n', "x.jsonl:1: the text holds half a surrogate pair"),
        (b"[" * 100_000, "x.jsonl:1: not valid JSON (maximum recursion depth"),
        (b"", "no documents"),
        (b"\n\n", "no documents"),
    ],
)
def test_faults_of_jsonl_name_file_and_line(tmp_path, content, expected):
    (tmp_path / "x.jsonl").write_bytes(content)
    assert expected in mistake(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (None, "x.jsonl:2: key 'd' should name a domain, it holds a value of type null"),
        (["a"], "x.jsonl:2: key 'd' should name a domain, it holds a value of type list"),
        ({"a": 1}, "of type dict"),
        (True, "of type bool"),
        ("\ud83d", "x.jsonl:2: the domain holds half a surrogate pair"),
        ("average", "x.jsonl:2: a domain cannot be called 'average'"),
    ],
)
def test_domains_that_cannot_be(tmp_path, domain, expected):
    lines = ({"text": "a", "d": 7}, {"text": "b", "d": domain})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert expected in mistake(tmp_path / "x.jsonl", domain_key="d")
    if domain == "average":
        assert [document.domain for document in read(tmp_path / "x.jsonl", domain_key="d", domains=["7"])] == ["7"]


def test_half_a_surrogate_pair_in_a_conversation(tmp_path):
    says = [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"chat": says}))
    assert "x.jsonl:1: the text holds half a surrogate pair" in mistake(tmp_path / "x.jsonl", messages_key="chat")


def test_other_faults(tmp_path):
    (tmp_path / "average.txt").write_text("a")
    assert "average.txt: a domain cannot be called 'average'" in mistake(tmp_path / "average.txt")
    (tmp_path / "average.txt").unlink()
    assert "xxx.txt: cannot be read (File name too long)" in mistake("x" * 300 + ".txt")
    with pytest.raises(UserError, match="File name too long"):
        local_size(CorpusConfig(path="x" * 300))
    assert mistake("stdlib:", domains=["none"]).startswith("stdlib: no documents of corpus.domains none")
    assert "no such corpus file or folder" in mistake(tmp_path / "missing.jsonl")
    assert "holds no file that ends in" in mistake(tmp_path)
    (tmp_path / "x.csv").write_text("text\na\n")
    assert "should end in .jsonl" in mistake(tmp_path / "x.csv")
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    assert "x.txt: not UTF-8 (byte 3: 0xe9)" in mistake(tmp_path / "x.txt")
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz: cannot be read" in mistake(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    assert "no.jsonl.gz: not a gzip file" in mistake(tmp_path / "no.jsonl.gz")
    path = write_jsonl(tmp_path / "y.jsonl", [{"text": "a"}])
    assert "y.jsonl: split 'test' means nothing there" in mistake(path, split="test")
    assert "z.jsonl: no such corpus file" in mistake(tmp_path / "z.jsonl", split="test")
    assert "domain_key" in mistake(path, domain_key="source")


def test_data_sets_of_the_hub(monkeypatch):
    class Rows(list):
        pass

    rows = Rows([{"text": b"bytes"}, {"text": ""}, {"text": "str"}])
    monkeypatch.setattr(reading, "_huggingface", lambda settings, rest: (rows, rest))
    counts = Counter()
    documents = list(read_documents(CorpusConfig(path="huggingface:some/set"), counts))
    assert [(document.domain, document.text) for document in documents] == [("some_set", "bytes"), ("some_set", "str")]
    assert counts["empty"] == 1


def test_a_package_that_is_missing_is_named(monkeypatch):
    import builtins

    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("datasets", "tensorflow_datasets"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install datasets" in mistake("huggingface:some/set")
    assert "pip install tensorflow-datasets importlib_resources" in mistake("tfds:some_set")


def test_a_hub_out_of_reach(monkeypatch):
    pytest.importorskip("datasets")
    import socket

    def refuse(*args, **kwargs):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    assert "cannot be reached" in mistake("huggingface:no-such-owner/no-such-set")


def test_a_local_data_set_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    assert [document.text for document in read(f"huggingface:{tmp_path}")] == TEXTS
    assert "datasets cannot give it" in mistake(f"huggingface:{tmp_path}", split="nothing")


def test_a_tfds_folder(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Letters(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "kind": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["only one"])}

        def _generate_examples(self, texts):
            for n, text in enumerate(texts):
                yield n, {"text": text, "kind": f"k{n % 2}"}

    builder = Letters(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    folder = builder.data_path
    documents = read(folder, domain_key="kind")
    assert sorted(document.text for document in documents) == sorted(TEXTS)
    assert {document.domain for document in documents} == {"k0", "k1"}
    assert [document.text for document in read(folder, split="test")] == ["only one"]
    assert "it has test, train" in mistake(folder, split="validation")
    assert "keys there" in mistake(folder, text_key="body")


def test_local_size(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "aé"}, {"text": "b"}])
    assert local_size(CorpusConfig(path=path)) == 4
    assert local_size(CorpusConfig(path="huggingface:some/set")) is None
    with pytest.raises(UserError, match="no such corpus"):
        local_size(CorpusConfig(path=str(tmp_path / "missing")))


# Splitting

SPLITTERS = ["byte-level", "sentencepiece", "unigram"]


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            [
                "the cat ",
                "checkpoint",
                "\n",
                "\r\n",
                "   ",
                "é",
                "e\u0301",
                "👩‍👩‍👧",
                "🇩🇪🇫🇷",
                "中文",
                "\u200d",
                "x" * 30,
            ]
        )
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        max_size=60,
    ).map("".join),
    most=st.sampled_from([24, 33, 64]),
)
def test_parts_fit_every_tokenizer_and_join_to_the_text(text, most):
    known = [tokenizer(name) for name in SPLITTERS]
    parts = split_text(text, known, most)
    assert "".join(parts) == text
    assert all(parts)
    for part in parts:
        assert fits(part, known, most)
    for before, after in itertools.pairwise(parts):
        assert (before[-1], after[0]) != ("\r", "\n")


def test_parts_end_after_lines_else_words_else_characters():
    known = [tokenizer("byte-level")]
    lines = split_text("one two three\n" * 30, known, 32)
    assert len(lines) > 3
    assert all(part.endswith("\n") for part in lines)
    words = split_text("cat " * 100, known, 32)
    assert all(part.endswith(" ") and part[0] == "c" for part in words)
    for unit in ("👩‍👩‍👧", "e\u0301\u0302", "👍🏽", "🇩🇪"):
        parts = split_text(unit * 40, known, 64)
        assert len(parts) > 1
        assert all(part == unit * (len(part) // len(unit)) for part in parts)


def test_one_long_cluster_is_cut_between_characters_rather_than_refused():
    text = "e" + "\u0301" * 500
    parts = split_text(text, [tokenizer("byte-level")], 64)
    assert "".join(parts) == text


def test_a_length_that_fits_nothing_is_refused():
    with pytest.raises(UserError, match="max_length 1 is too small"):
        split_text("two words", [tokenizer("byte-level")], 1)


def test_long_documents_take_linear_time(monkeypatch):
    encoded = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encoded.append(len(text)) or encode(self, text))
    for repeats in (20, 200, 1000):
        text = TEXTS[0] * repeats
        encoded.clear()
        split_text(text, [tokenizer("byte-level coarse")], 128)
        assert sum(encoded) < 4 * len(text) + 10_000


def test_parts_are_documents():
    document = Document("0123456789abcdef", "prose", TEXTS[0] * 3)
    parts = split_document(document, [tokenizer("byte-level")], 64)
    assert [part.id for part in parts] == [f"{document.id}.{p}" for p in range(len(parts))]
    assert "".join(part.text for part in parts) == document.text
    assert split_document(document, [tokenizer("byte-level")], 5000) == [document]


# The stage


@pytest.fixture
def make_job(tmp_path):
    for name in ("sentencepiece", "byte-level", "byte-level coarse", "unigram"):
        hf(name).save_pretrained(tmp_path / name)
    train = [{"text": text} for text in [*TEXTS, "x" + TEXTS[0] * 5, TEXTS[1], "held out"]]
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "heldout.jsonl", [{"text": "held out"}, {"text": "also held out"}])

    def make(**changes):
        values = {
            "target": str(tmp_path / "sentencepiece"),
            "sources": [str(tmp_path / "byte-level"), {"model": str(tmp_path / "sentencepiece"), "name": "itself"}],
            "corpus": {"path": str(tmp_path / "train.jsonl")},
            "evaluation": {"corpus": {"path": str(tmp_path / "heldout.jsonl")}},
            "max_length": 128,
            "output": "job",
        } | changes
        return config.validate(values | {"output": str(tmp_path / values["output"])})

    return make


def test_prepare_writes_documents_and_tokens(make_job, tmp_path, capfd):
    job = make_job()
    prepare(job)
    said = capfd.readouterr().out
    assert "left out: 1 that repeat another, 1 that are held out" in said
    documents = Store(job.folder / "data/train/documents")
    records = list(documents)
    whole = {}
    for record in records:
        whole[record["id"].split(".")[0]] = whole.get(record["id"].split(".")[0], "") + record["text"]
    assert sorted(whole.values()) == sorted([*TEXTS, "x" + TEXTS[0] * 5])
    assert documents.summary["documents"] == 4
    assert documents.summary["parts"] == len(records) > 4
    for name in ("sentencepiece", "byte-level"):
        tok = tokenizer(name)
        tokens = Store(job.folder / "data/train/tokens" / tok.fingerprint)
        assert len(tokens) == len(records)
        for record, document in zip(tokens, records, strict=True):
            ids, boundaries = tok.encode(document["text"])
            assert (record["ids"] == ids).all()
            assert (record["boundaries"] == boundaries).all()
            assert len(ids) + 1 + tok.adds_bos <= job.max_length
    heldout = [record["text"] for record in Store(job.folder / "data/heldout/documents")]
    assert heldout == ["held out", "also held out"]


def test_prepare_again_does_nothing_and_says_so(make_job, capfd):
    job = make_job()
    prepare(job)
    files = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*") if path.is_file()}
    capfd.readouterr()
    prepare(job)
    assert capfd.readouterr().out.count("done before, skipped") == 2
    assert files == {path: path.stat().st_mtime_ns for path in job.folder.rglob("*") if path.is_file()}


def test_another_source_only_adds_its_tokens(make_job, tmp_path):
    prepare(make_job(max_length=64))
    folder = make_job().folder / "data/train"
    before = list(Store(folder / "documents"))
    prepare(make_job(max_length=64, sources=[str(tmp_path / "byte-level coarse")]))
    assert list(Store(folder / "documents")) == before
    assert len(Store(folder / "tokens" / tokenizer("byte-level coarse").fingerprint)) == len(before)
    with pytest.raises(UserError, match=r"split for other tokenizers than that of .*unigram.*; remove"):
        prepare(make_job(max_length=64, sources=[str(tmp_path / "unigram")]))


def test_another_text_or_length_is_refused_and_named(make_job, tmp_path):
    prepare(make_job())
    with pytest.raises(UserError, match="made with other settings: max_length"):
        prepare(make_job(max_length=64))
    write_jsonl(tmp_path / "train.jsonl", [{"text": "something else"}])
    with pytest.raises(
        UserError, match=r"data/train/documents: was made with other settings: text .* remove .*data/train"
    ):
        prepare(make_job())


def test_prepare_goes_on_after_an_interruption(make_job, monkeypatch):
    class Killed(BaseException):
        pass

    monkeypatch.setattr(corpus, "_SHARD_DOCUMENTS", 2)
    whole = make_job(output="whole")
    prepare(whole)
    job = make_job(output="killed")
    write = corpus.StoreWriter.write
    writes = []

    def write_once(self, shard, records):
        if writes:
            raise Killed
        writes.append(shard)
        write(self, shard, records)

    monkeypatch.setattr(corpus.StoreWriter, "write", write_once)
    kills = 0
    while True:
        writes.clear()
        try:
            prepare(job)
            break
        except Killed:
            kills += 1
            assert kills < 50
    assert kills > 5
    for store in (path.parent.relative_to(whole.folder) for path in whole.folder.rglob("manifest.json")):
        a, b = Store(whole.folder / store), Store(job.folder / store)
        assert (a.inputs, a.summary, len(a)) == (b.inputs, b.summary, len(b))
        for one, other in zip(a, b, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[key], other[key]) for key in one)


def test_all_training_documents_held_out(make_job, tmp_path):
    job = make_job(corpus={"path": str(tmp_path / "heldout.jsonl")})
    with pytest.raises(UserError, match="every document is also held out"):
        prepare(job)


def test_a_document_without_tokens_is_left_out(make_job, tmp_path, capfd):
    byte_level(normalizer=Replace("\u200b", "")).save_pretrained(tmp_path / "byte-level")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "the cat"}, {"text": "\u200b\u200b"}, {"text": "the mat"}])
    job = make_job()
    prepare(job)
    assert [record["text"] for record in Store(job.folder / "data/train/documents")] == ["the cat", "the mat"]
    assert "is left out: a tokenizer has no token for part of it" in capfd.readouterr().out
