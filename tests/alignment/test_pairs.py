"""Hard texts through every pair of tokenizers: the zoo's, and those of real models where they are on this machine."""

import gzip
import itertools
import json
from functools import lru_cache

import numpy as np
import pytest
from tokenizer_zoo import LOSSLESS, NAMES, shared, tokenizer

from fusejax.alignment.causes import CAUSES, fallback_causes
from fusejax.alignment.rows import MAX_CONSUMED, Tokens, row_mapper
from fusejax.tokenizers import Tokenizer

HARD = {
    "newlines": "a\n\nb\n\n\n\n    c\r\nd\n",
    "tabs": "\tx\t\ty\n\t\t\tz\t",
    "space runs": "a  b   c    d        e                                                                  f ",
    "digits": "1234567890 3.14159 1e-5 0x7F 1,000,000 2024-01-31",
    "CJK": "中文字符。日本語のテキスト、한국어 문장입니다。",
    "emoji": "👩\u200d👩\u200d👧 👍🏽 🇩🇪🇫🇷 ❤\ufe0f 1\ufe0f\u20e3",
    "combining marks": "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343a\u0328",
    "right to left": "שלום עולם مرحبا بالعالم \u200fabc\u200e 123",
}
REAL = sorted(path.name for path in (shared() / "fixtures/tokenizers").glob("*"))
RULES = ("exact", "boundary", "inside")


def check(text, target_tok, source_tok):
    """What holds for any pair and any text; returns (target's tokens, source's tokens, the map `inside`)."""
    data, target, source = text.encode(), Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    for tokens in (target, source):
        assert (np.diff(tokens.boundaries, prepend=0) >= 0).all()
        assert not len(tokens.ids) or tokens.boundaries[-1] == len(data)
    same = target_tok.text_fingerprint == source_tok.text_fingerprint
    for method in RULES:
        rows_T2 = row_mapper(target_tok, source_tok, method)(data, target, source)
        there = rows_T2[:, 0] >= 0
        row_N, consumed_N = rows_T2[there].T
        assert (source.boundaries[row_N] + consumed_N == target.boundaries[there]).all()
        assert method == "inside" or not consumed_N.any()
        assert (consumed_N <= MAX_CONSUMED).all()
        for row, consumed in zip(row_N[consumed_N > 0].tolist(), consumed_N[consumed_N > 0].tolist(), strict=True):
            piece, end = source_tok.canonical_bytes[source.ids[row + 1]], source.boundaries[row]
            assert data[end : end + consumed] == piece[:consumed]
        causes = fallback_causes(data, target, source, target_tok, source_tok, rows_T2, method)
        assert causes.sum() == (~there).sum()
        assert not same or there.all()
    return target, source, rows_T2, dict(zip(CAUSES, causes.tolist(), strict=True))


@pytest.mark.parametrize("kind", HARD)
def test_hard_texts_fall_back_nowhere_that_the_text_allows(kind):
    for pair in itertools.permutations(NAMES, 2):
        target_tok, source_tok = map(tokenizer, pair)
        target, source, rows_T2, causes = check(HARD[kind], target_tok, source_tok)
        if set(pair) <= set(LOSSLESS):
            unseen = (target.boundaries < source.boundaries[0]) & (target.boundaries != source.boundaries[0])
            deep = causes["long token"]
            assert (rows_T2[~unseen, 0] < 0).sum() == deep, pair
            assert deep == 0 or kind == "space runs"


def test_causes_are_what_they_say():
    fine, changing, unknowing = (tokenizer(name) for name in ("byte-level", "byte-level NFC", "unigram"))
    for text, target, source, cause in (
        ("cat \uf900 sat", changing, fine, "normalization"),
        ("cat 中 sat", fine, unknowing, "special"),
        ("cat sat\n\nThen", fine, tokenizer("byte-level coarse"), None),
        (" checkpoint", fine, tokenizer("byte-level coarse"), "document start"),
    ):
        causes = check(text, target, source)[3]
        assert cause is None or causes[cause] > 0, (text, causes)
    # Without `inside`, what the source's token there contains is the cause.
    target, source = fine, tokenizer("byte-level coarse")
    for text, cause in (
        ("a        b 中 x", "part of a source token"),
        ("x = 1000 10", "digits"),
        ("a\n\n\tfor\n\n\t", "newline"),
    ):
        data, a, b = text.encode(), Tokens.of(target, text), Tokens.of(source, text)
        rows_T2 = row_mapper(target, source, "boundary")(data, a, b)
        causes = dict(zip(CAUSES, fallback_causes(data, a, b, target, source, rows_T2, "boundary"), strict=True))
        assert causes[cause] > 0, (text, causes)


def test_deep_inside_a_long_token_has_its_own_cause():
    spaces = Tokenizer(_with_long_spaces())
    text = "a" + " " * 64 + "b"
    target, _, rows_T2, causes = check(text, tokenizer("byte-level"), spaces)
    assert causes["long token"] == sum(MAX_CONSUMED < end - 1 < 64 for end in target.boundaries.tolist())
    assert causes["long token"] == (rows_T2[:, 0] < 0).sum() > 0


def _with_long_spaces():
    from tokenizer_zoo import byte_level

    wrapped = byte_level()
    wrapped.backend_tokenizer.add_tokens([" " * 64])
    return wrapped


@lru_cache
def real(name):
    return Tokenizer.load(str(shared() / "fixtures/tokenizers" / name))


@lru_cache
def real_texts():
    golden = [
        row["text"]
        for path in (shared() / "golden").glob("rows-*.json")
        for row in json.loads(path.read_text())["rows"]
    ]
    with gzip.open(shared() / "fixtures/corpora/blns.jsonl.gz", "rt", encoding="utf-8") as lines:
        return list(dict.fromkeys([*HARD.values(), *golden, *(json.loads(line)["text"] for line in lines)]))


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="the tokenizers of real models are not on this machine")
@pytest.mark.parametrize("pair", [*itertools.product(REAL, repeat=2)], ids="/".join)
def test_golden_and_naughty_texts_through_real_tokenizers(pair):
    target_tok, source_tok = map(real, pair)
    texts = real_texts()
    assert len(texts) > 400
    for text in texts:
        check(text, target_tok, source_tok)
