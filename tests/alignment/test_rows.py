"""Row maps between every pair of tokenizers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import LOSSLESS, NAMES, TEXTS, hf, tokenizer

from fusejax.alignment import MAX_CONSUMED, row_map
from fusejax.alignment.causes import CAUSES, fallback_causes
from fusejax.alignment.rows import Tokens, map_rows, misread
from fusejax.errors import UserError

METHODS = ("exact", "boundary", "inside")  # those that go by the text; `mined` has tests of its own
PAIRS = list(itertools.permutations(NAMES, 2))
LOSSLESS_PAIRS = list(itertools.permutations(LOSSLESS, 2))
AWKWARD = ["\n\n\t  x = 1\r\n", "  1234 +  5", "中文 😀👩‍👩‍👧 e\u0301", "שלום עולם", "\x00\ufeff\u200b "]
fragments = st.lists(
    st.sampled_from([*"aé \n中😀▁Ġ1\t", "e\u0301", "\u200d", "\u00a0", " the", "check", "point", " cats", "    "])
)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | fragments.map("".join)


@settings(max_examples=400, deadline=None)
@given(text=unicode_text, pair=st.sampled_from(PAIRS), method=st.sampled_from(METHODS))
def test_row_maps_point_to_rows_that_have_seen_the_same_text(text, pair, method):
    target_tok, source_tok = map(tokenizer, pair)
    rows_T2 = row_map(text, target_tok, source_tok, method)
    target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    assert rows_T2.dtype == np.int32
    assert rows_T2.shape == (len(target.ids), 2)
    assert ((rows_T2[:, 0] >= -1) & (rows_T2[:, 0] < max(len(source.ids), 1))).all()
    assert ((rows_T2[:, 1] >= 0) & (rows_T2[:, 1] <= MAX_CONSUMED)).all()
    assert method == "inside" or not rows_T2[:, 1].any()
    data = text.encode("utf-8")
    for (row, consumed), boundary in zip(rows_T2.tolist(), target.boundaries.tolist(), strict=True):
        if row < 0:
            assert consumed == 0
            continue
        assert source.boundaries[row] + consumed == boundary
        if consumed:
            piece = source_tok.canonical_bytes[source.ids[row + 1]]
            assert len(piece) > consumed
            assert data[boundary - consumed : boundary] == piece[:consumed]


@pytest.mark.parametrize("pair", LOSSLESS_PAIRS, ids="/".join)
def test_nothing_falls_back_that_the_text_allows(pair):
    target_tok, source_tok = map(tokenizer, pair)
    for text in [*TEXTS, *AWKWARD]:
        target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
        rows_T2 = map_rows(text.encode(), target, source, source_tok, "boundary")
        ends = set(source.boundaries.tolist())
        last = np.append(np.diff(target.boundaries) > 0, True)  # a dummy prefix alone has seen nothing yet
        expected = [end in ends for end in target.boundaries.tolist()]
        assert ((rows_T2[:, 0] >= 0) == (np.array(expected) & last)).all()
        inside_T2 = map_rows(text.encode(), target, source, source_tok, "inside")
        # Only what lies before the end of the source's first token has no row to stand on.
        after = target.boundaries >= source.boundaries[0]
        assert (inside_T2[:, 0] >= 0)[after & last].all()


def test_methods_on_a_text_one_can_read():
    # target: the | check | point, source: the | checkpoint, and the other way round
    target, source = tokenizer("sentencepiece"), tokenizer("byte-level coarse")
    text = "the cat checkpoint sat"
    a, b = Tokens.of(target, text), Tokens.of(source, text)
    exact = map_rows(text.encode(), a, b, source, "exact")[:, 0]
    boundary = map_rows(text.encode(), a, b, source, "boundary")[:, 0]
    spans = {(s, e): j for j, (s, e) in enumerate(zip([0, *b.boundaries], b.boundaries.tolist(), strict=False))}
    for t, (start, end) in enumerate(zip([0, *a.boundaries], a.boundaries.tolist(), strict=False)):
        assert exact[t] == spans.get((start, end), -1)
        assert boundary[t] == {e: j for (_, e), j in spans.items()}.get(end, -1)
    assert (exact >= 0).sum() <= (boundary >= 0).sum()


def test_equal_tokenizers_are_the_identity():
    for method in METHODS:
        rows_T2 = row_map(TEXTS[2], tokenizer("unigram"), tokenizer("unigram"), method)
        assert (rows_T2[:, 0] == np.arange(len(rows_T2))).all()
        assert not rows_T2[:, 1].any()


def test_transformers_tokenizers_will_do():
    rows_T2 = row_map(TEXTS[0], hf("sentencepiece"), hf("byte-level"))
    assert len(rows_T2) == len(hf("sentencepiece")(TEXTS[0], add_special_tokens=False).input_ids)
    assert (rows_T2 == row_map(TEXTS[0], tokenizer("sentencepiece"), tokenizer("byte-level"))).all()


def test_a_stretch_that_the_target_changes_falls_back_but_for_its_end():
    target_tok, source_tok = tokenizer("byte-level NFC"), tokenizer("byte-level")
    text = "the cat e\u0301 sat on the mat"
    target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    rows_T2 = map_rows(text.encode(), target, source, source_tok, "inside")
    end = text.encode().index(b"\xcc\x81") + 2
    for row, boundary in zip(rows_T2[:, 0].tolist(), target.boundaries.tolist(), strict=True):
        if boundary < end - 3 or boundary >= end:
            assert row < 0 or source.boundaries[row] <= boundary
    assert rows_T2[target.boundaries.tolist().index(end), 0] >= 0
    assert (rows_T2[target.boundaries > end, 0] >= 0).all()


def test_a_stretch_that_the_source_changes_is_never_stood_inside():
    # U+F900 is three bytes, and so is what NFKC makes of it: only a comparison of the bytes tells them apart.
    target_tok, source_tok = tokenizer("byte-level"), tokenizer("byte-level NFC")
    text = "cat \uf900 sat"
    target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    rows_T2 = map_rows(text.encode(), target, source, source_tok, "inside")
    inside = (target.boundaries > 4) & (target.boundaries < 7)
    assert inside.any()
    assert (rows_T2[inside, 0] < 0).all()


@pytest.mark.parametrize("names", [("sentencepiece", "byte-level"), ("byte-level", "sentencepiece")], ids="/".join)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_tokenizer_misreads_falls_back_on_both_sides(names, method):
    # SentencePiece writes a space '▁', and so reads one where the text has that character itself.
    text = "the cat ▁sat on the mat"
    target_tok, source_tok = map(tokenizer, names)
    rows_T2 = row_map(text, target_tok, source_tok, method)
    target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    sides = {names[0]: target, names[1]: source}
    wrong = misread(text.encode(), sides["sentencepiece"], tokenizer("sentencepiece"))
    assert not misread(text.encode(), sides["byte-level"], tokenizer("byte-level")).any()
    stretch_end = sides["sentencepiece"].boundaries[np.flatnonzero(wrong)[-1]]
    mark = text.encode().index("▁".encode())
    assert mark + 3 <= stretch_end < len(text.encode())
    inside = (target.boundaries > mark) & (target.boundaries <= stretch_end)
    assert inside.any()
    assert (rows_T2[inside, 0] < 0).all()
    causes = fallback_causes(text.encode(), target, source, target_tok, source_tok, rows_T2, method)
    assert causes[CAUSES.index("normalization")] >= inside.sum()
    assert (rows_T2[target.boundaries > stretch_end, 0] >= 0).any()


def test_canonically_equivalent_text_and_lost_white_space_are_not_misread():
    changing = tokenizer("byte-level NFC")
    for text in ("the cat e\u0301 sat", "cat \uf900 sat"):
        tokens = Tokens.of(changing, text)
        assert not changing.spells(tokens.ids, text.encode())
        assert not misread(text.encode(), tokens, changing).any()
    dropping, text = tokenizer("wordpiece"), "the cat  sat on the mat"
    tokens = Tokens.of(dropping, text)
    assert not dropping.spells(tokens.ids, text.encode())
    assert not misread(text.encode(), tokens, dropping).any()


def test_unknown_methods_and_empty_texts():
    with pytest.raises(ValueError, match="boundary"):
        row_map("x", tokenizer("unigram"), tokenizer("byte-level"), "nearest")
    assert row_map("", tokenizer("unigram"), tokenizer("byte-level")).shape == (0, 2)


def test_folders_stand_for_their_tokenizers(tmp_path):
    hf("byte-level").save_pretrained(tmp_path)
    expected = row_map(TEXTS[0], tokenizer("unigram"), tokenizer("byte-level"))
    assert np.array_equal(row_map(TEXTS[0], tokenizer("unigram"), tmp_path), expected)
    assert np.array_equal(row_map(TEXTS[0], tokenizer("unigram"), str(tmp_path)), expected)
    with pytest.raises(UserError, match="no such model folder"):
        row_map("x", tokenizer("unigram"), "./nowhere")


@pytest.mark.parametrize("text", [None, b"abc", ["abc"]])
def test_what_is_no_text_or_no_tokenizer(text):
    with pytest.raises(TypeError, match=f"a text should be a str, not {type(text).__name__}"):
        row_map(text, tokenizer("unigram"), tokenizer("byte-level"))
    with pytest.raises(TypeError, match=f"a folder or a hub name, not {type(text).__name__}"):
        row_map("x", tokenizer("unigram"), text)
