"""The quickstart's corpus: same splits everywhere, nothing held out that was trained on."""

import ast
import unicodedata

import pytest

from fusejax import stdlib_corpus
from fusejax.errors import UserError


@pytest.fixture(scope="module")
def splits():
    return {split: list(stdlib_corpus.documents(split)) for split in stdlib_corpus.SPLITS}


def _modules(texts):
    return {t.name.partition(".")[0] for t in texts if t.domain == "code"}


def test_every_split_has_enough_of_every_domain(splits):
    least = {"heldout": 50_000, "fusion": 100_000, "train": 500_000}
    for split, texts in splits.items():
        for domain in stdlib_corpus.DOMAINS:
            size = sum(len(t.text.encode()) for t in texts if t.domain == domain)
            assert size > least[split], (split, domain, size)
            names = [t.name for t in texts if t.domain == domain]
            assert len(names) == len(set(names))


def test_splits_share_no_package_and_no_text(splits):
    train, fusion, heldout = (_modules(splits[s]) for s in ("train", "fusion", "heldout"))
    assert not train & (fusion | heldout)
    assert not fusion & heldout
    for domain in stdlib_corpus.DOMAINS:
        texts = [{t.text for t in splits[s] if t.domain == domain and len(t.text) > 200} for s in splits]
        assert sum(map(len, texts)) == len(set.union(*texts))


def test_held_out_code_has_hardly_a_passage_in_common_with_training(splits):
    def passages(split):
        found = set()
        for t in splits[split]:
            lines = [line.strip() for line in t.text.splitlines() if line.strip()]
            if t.domain == "code":
                found |= {"\n".join(lines[i : i + 5]) for i in range(len(lines) - 4)}
        return found

    heldout = passages("heldout")
    assert len(heldout & passages("train")) < 0.01 * len(heldout)


def test_a_module_lies_in_one_split_with_code_docs_and_relatives(splits):
    for split, texts in splits.items():
        low, high = stdlib_corpus.SPLITS[split]
        for t in texts:
            if t.domain == "unicode":
                assert low <= stdlib_corpus._position(t.name) < high
            elif not t.name.startswith("topic "):
                assert low <= stdlib_corpus._position(stdlib_corpus._family(t.name)) < high
    for modules in (("_pyio", "io"), ("lzma", "bz2"), ("ntpath", "posixpath"), ("_pydatetime", "datetime")):
        assert len({stdlib_corpus._family(name) for name in modules}) == 1


def test_the_splits_never_change(splits):
    """Models in configs/quickstart were trained on `train` as it is here: these must stay held out for ever."""
    assert {"dis", "enum", "pickle", "xml", "zipfile"} <= _modules(splits["heldout"])
    assert {"U+0900", "U+1600", "U+1F780"} <= {t.name for t in splits["heldout"]}


def test_code_is_python_without_docstrings_and_comments(splits):
    texts = [t for t in splits["heldout"] if t.domain == "code"]
    for t in texts:
        for node in ast.walk(ast.parse(t.text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                assert ast.get_docstring(node) is None, t.name
    enum = next(t.text for t in texts if t.name == "enum")
    assert "class EnumType(type):" in enum
    assert "# " not in enum


def test_docs_hold_docstrings_with_their_names_and_comments(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\n# First comment,\n# second line.\nclass A:\n    """Class A."""\n    def f(self):\n'
        '        """Method f."""\n    def g(self):\n        return 1  # not a passage\n',
        "utf-8",
    )
    code, docs = stdlib_corpus._code_and_docs("m", path)
    assert docs == "m\nModule.\n\nFirst comment,\nsecond line.\n\nm.A\nClass A.\n\nm.A.f\nMethod f.\n"
    assert code == "class A:\n\n    def f(self):\n        pass\n\n    def g(self):\n        return 1\n"


def test_unicode_lines_are_the_database(splits):
    block = next(t for t in splits["heldout"] if t.name == "U+0900")
    for line in block.text.splitlines():
        point, character, category, name = line.split(" ", 3)
        assert chr(int(point[2:], 16)) == character
        assert (category, name) == (unicodedata.category(character), unicodedata.name(character))


def test_order_is_that_of_the_hash(splits):
    names = [t.name for t in splits["fusion"] if t.domain == "code"]
    assert names == sorted(names, key=stdlib_corpus._position)
    assert names != sorted(names)


def test_unknown_split():
    with pytest.raises(UserError, match="no split 'test'; it has heldout, fusion, train"):
        next(stdlib_corpus.documents("test"))


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    stdlib_corpus._texts.cache_clear()
    with pytest.raises(UserError, match=r"needs the library's \.py files"):
        next(stdlib_corpus.documents("train"))
