"""The paper's row and token maps: against plain restatements, by hand, and against the reference's own outputs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import NAMES, TEXTS, shared, tokenizer

from fusejax.alignment import mined, row_map, token_map
from fusejax.alignment.rows import Tokens
from fusejax.tokenizers import Tokenizer


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


words = st.lists(st.text("abcé▁", max_size=6), min_size=1, max_size=12, unique=True)


@settings(max_examples=100, deadline=None)
@given(queries=words, choices=words)
def test_nearest_strings_are_the_first_of_the_nearest(queries, choices):
    index_Q, distance_Q = mined.nearest_strings(queries, choices)
    for query, index, distance in zip(queries, index_Q.tolist(), distance_Q.tolist(), strict=True):
        distances = [levenshtein(query, choice) for choice in choices]
        assert distance == min(distances)
        assert index == distances.index(min(distances))


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    strings = ["".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(300)]
    whole = mined.nearest_strings(strings[:150], strings[150:])
    monkeypatch.setattr(mined, "_CHUNK", 64)
    parts = mined.nearest_strings(strings[:150], strings[150:])
    assert all((a == b).all() for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    "pair", [("sentencepiece", "byte-level"), ("byte-level coarse", "unigram bytes")], ids="/".join
)
def test_the_token_map_is_minimal_and_keeps_shared_spellings(pair):
    target, source = map(tokenizer, pair)
    images = token_map(target, source, "mined")
    choices = [(i, s) for i, s in enumerate(target.surfaces) if target.canonical_bytes[i] is not None]
    for v, (surface, piece) in enumerate(zip(source.surfaces, source.canonical_bytes, strict=True)):
        if piece is None:
            assert images[v] == -1 or v in source.roles.values()
            continue
        distance, image = min((levenshtein(surface, other), i) for i, other in choices)
        assert images[v] == image
        assert (distance == 0) == (surface in {other for _, other in choices})


def test_rows_on_a_text_one_can_read():
    # By the definition: one source token on the path, and equal spellings or the image of it.
    target_tok, source_tok = tokenizer("sentencepiece"), tokenizer("byte-level coarse")
    images = token_map(target_tok, source_tok, "mined")
    for text in TEXTS:
        target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
        spellings = mined.Spellings(source_tok), mined.Spellings(target_tok)
        _, path_P2 = mined.warp_tokens(source, target, *spellings)
        rows_T2 = row_map(text, target_tok, source_tok, "mined")
        assert not rows_T2[:, 1].any()
        for t, row in enumerate(rows_T2[:, 0].tolist()):
            matched = path_P2[path_P2[:, 1] == t, 0].tolist()
            spelled = target_tok.surfaces[target.ids[t]]
            agrees = False
            if len(matched) == 1:
                v = source.ids[matched[0]]
                agrees = spelled in (source_tok.surfaces[v], target_tok.surfaces[images[v]])
                agrees |= t == 0 and spelled == "▁" + source_tok.surfaces[v]
            assert row == (matched[0] if agrees else -1)


def test_the_first_token_needs_no_mark_of_a_space():
    target_tok, source_tok = tokenizer("sentencepiece"), tokenizer("byte-level coarse")
    assert target_tok.writes_dummy_prefix
    assert not source_tok.writes_dummy_prefix
    text = "The cat"
    first = [tok.surfaces[tok.encode(text)[0][0]] for tok in (target_tok, source_tok)]
    assert first == ["▁The", "The"]
    assert row_map(text, target_tok, source_tok, "mined")[0, 0] == 0
    assert token_map(target_tok, source_tok, "mined")[source_tok.encode("The")[0][0]] != target_tok.encode("The")[0][0]


def test_stats_is_the_most_frequent_match():
    target, source = tokenizer("sentencepiece"), tokenizer("byte-level coarse")
    by_distance, by_count = token_map(target, source, "mined"), token_map(target, source, "stats", TEXTS)
    counts = {}
    spellings = mined.Spellings(source), mined.Spellings(target)
    for text in TEXTS:
        a, b = Tokens.of(source, text), Tokens.of(target, text)
        for i, j in mined.warp_tokens(a, b, *spellings)[1].tolist():
            counts.setdefault(a.ids[i], {}).setdefault(b.ids[j], 0)
            counts[a.ids[i]][b.ids[j]] += 1
    changed = 0
    for v, (surface, piece) in enumerate(zip(source.surfaces, source.canonical_bytes, strict=True)):
        if piece is None or v not in counts or surface in target.surfaces:
            assert by_count[v] == by_distance[v]
            continue
        ranked = [(-n, levenshtein(surface, target.surfaces[t]), t) for t, n in counts[v].items()]
        assert by_count[v] == min(ranked)[2]
        changed += by_count[v] != by_distance[v]
    assert changed  # the counts say something that distances do not


def test_stats_needs_texts():
    with pytest.raises(ValueError, match="sample of texts"):
        token_map(tokenizer("sentencepiece"), tokenizer("byte-level"), "stats")


@pytest.mark.parametrize("name", NAMES)
def test_equal_tokenizers_are_the_identity(name):
    tok = tokenizer(name)
    for method in ("mined", "stats"):
        assert (token_map(tok, tok, method, TEXTS) == np.arange(tok.vocab_size)).all()
    assert (row_map(TEXTS[0], tok, tok, "mined")[:, 0] == np.arange(len(tok.encode(TEXTS[0])[0]))).all()


@pytest.mark.parametrize("text", ["", "x", "\n\n\n", "\ud7ff\U0010ffff", "   "])
def test_odd_texts(text):
    for pair in (("sentencepiece", "byte-level"), ("byte-level NFC", "unigram"), ("unigram", "sentencepiece")):
        target, source = map(tokenizer, pair)
        rows_T2 = row_map(text, target, source, "mined")
        assert rows_T2.shape == (len(target.encode(text)[0]), 2)
        assert (rows_T2[:, 0] < max(1, len(source.encode(text)[0]))).all()


golden = pytest.mark.skipif(
    not (shared() / "golden").exists(), reason="the reference's outputs are not on this machine"
)


def real(name):
    return Tokenizer.load(str(shared() / "fixtures/tokenizers" / name))


@golden
@pytest.mark.parametrize("name", ["llama-from-mistral", "llama-from-gptneox20b", "gptneox20b-from-llama"])
def test_golden_rows(name):
    saved = json.loads((shared() / f"golden/rows-{name}.json").read_text(encoding="utf-8"))
    target, source = real(saved["target"]), real(saved["source"])
    spellings = mined.Spellings(source), mined.Spellings(target)
    n_rows = n_equal = 0
    for row in saved["rows"]:
        target_tokens, source_tokens = Tokens.of(target, row["text"]), Tokens.of(source, row["text"])
        assert target_tokens.ids.tolist() == row["target_ids"]
        assert source_tokens.ids.tolist() == row["source_ids"]
        cost, path_P2 = mined.warp_tokens(source_tokens, target_tokens, *spellings)
        assert cost == row["dtw_cost"]
        matched = [path_P2[path_P2[:, 1] == t, 0].tolist() for t in range(len(target_tokens.ids))]
        n_rows += len(matched)
        n_equal += sum(a == b for a, b in zip(matched, row["dtw_target_to_source"], strict=True))
    assert n_rows > 400
    assert n_equal == n_rows


@golden
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "source"), [("llama-to-neox", "gptneox20b", "llama"), ("neox-to-llama", "llama", "gptneox20b")]
)
def test_golden_token_maps(name, target, source):
    saved = json.loads((shared() / f"golden/tokens-{name}.json").read_text(encoding="utf-8"))
    target, source = real(target), real(source)
    images = token_map(target, source, "mined")
    ids = {surface: v for v, surface in enumerate(source.surfaces)}
    for row in saved["rows"]:
        image = target.surfaces[images[ids[row["source"].replace(saved["source_marker"], "▁")]]]
        image = image.replace("▁", saved["target_marker"])
        assert levenshtein(row["translated"], image) == row["distance"]
        assert row["nearest"] is None or image in row["nearest"]
