"""scripts/domain_corpus.py: splits that share no text."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from fusejax.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts/domain_corpus.py"
SPEC = importlib.util.spec_from_file_location("domain_corpus", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
domain_corpus = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(domain_corpus)


def _write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def _texts(seed: int, n: int, words: int = 120) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["\n".join(" ".join(f"w{i}é" for i in rng.integers(5000, size=10)) for _ in range(words // 10)) + "\n"
            for _ in range(n)]  # fmt: skip


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def test_splits_share_no_text_although_the_corpus_repeats_itself(tmp_path):
    originals = _texts(0, 40)
    versions = [f"Version {i} of this text. {text}" for i, text in enumerate(originals)]
    law = _write(tmp_path / "law.jsonl", originals + versions)
    poems = _write(tmp_path / "poems.jsonl", _texts(1, 60))
    arguments = ["--corpus", f"law={law}", f"poems={poems}", "--split", "heldout=4000", "train=9000"]
    domain_corpus.main([str(tmp_path / "out"), *arguments])
    heldout, train = (_read(tmp_path / f"out/{name}.jsonl") for name in ("heldout", "train"))
    for domain in ("law", "poems"):
        parts = [[line["text"] for line in split if line["domain"] == domain] for split in (heldout, train)]
        sizes = [sum(len(text.encode()) for text in part) for part in parts]
        assert 3600 < sizes[0] <= 4000
        assert 8400 < sizes[1] <= 9000
        ours, theirs = (set().union(*map(_runs, part)) for part in parts)
        assert not ours & theirs

    domain_corpus.main([str(tmp_path / "more"), *arguments, "experts=3000"])  # one more split changes no other
    for name in ("heldout", "train"):
        assert (tmp_path / f"more/{name}.jsonl").read_bytes() == (tmp_path / f"out/{name}.jsonl").read_bytes()
    seen = {line["text"] for line in heldout + train}
    assert not seen & {line["text"] for line in _read(tmp_path / "more/experts.jsonl")}


def test_one_long_text_is_not_the_whole_split():
    long = "\n".join(_texts(2, 50))
    splits = domain_corpus.divide({"a": [long, *_texts(3, 30)]}, {"train": 8000})["a"]
    assert max(len(text.encode()) for text in splits["train"]) <= 1000
    assert any(long.startswith(text) and text.endswith("\n") for text in splits["train"])


def test_cuts_stand_between_characters_words_and_lines():
    assert domain_corpus.head("ab cd\nef gh ij", 12) == "ab cd\nef gh "
    assert domain_corpus.head("ab cd\nef gh ij", 9) == "ab cd\n"
    assert domain_corpus.head("ééé", 5) == "éé"
    assert domain_corpus.head("short", 5) == "short"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "law", "--split", "a=1"], "NAME=VALUE"),
        (["--corpus", "law={law}", "law={law}", "--split", "a=1"], "given twice"),
        (["--corpus", "law={law}", "--split", "a=many"], "number of bytes"),
        (["--corpus", "law={law}", "--split", "a=9000000", "b=10"], "nothing is left for split 'b'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, arguments, message):
    law = _write(tmp_path / "law.jsonl", _texts(4, 4))
    with pytest.raises(UserError, match=message):
        domain_corpus.main([str(tmp_path / "out"), *(value.format(law=law) for value in arguments)])
    assert not (tmp_path / "out").exists()


def test_a_text_of_two_domains_serves_one_split():
    shared = _texts(5, 20)
    texts = {"a": [*shared, *_texts(6, 20)], "b": [*shared, *_texts(7, 20)]}
    divided = domain_corpus.divide(texts, {"heldout": 3000, "train": 20000})
    held = {text for splits in divided.values() for text in splits["heldout"]}
    assert held
    assert not held & {text for splits in divided.values() for text in splits["train"]}
