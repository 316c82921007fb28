"""Token maps and tables."""

import itertools

import numpy as np
import pytest
from tokenizer_zoo import LOSSY, NAMES, NORMALIZING, hf, tokenizer

from fusejax.alignment import token_map, token_table
from fusejax.alignment.tokens import prefix_hashes, table_columns

PAIRS = list(itertools.permutations(NAMES, 2))


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_prefix_maps_to_the_token_itself_or_to_its_beginning(pair):
    target, source = map(tokenizer, pair)
    exact, prefix = token_map(target, source, "exact"), token_map(target, source, "prefix")
    assert exact.dtype == prefix.dtype == np.int32
    assert exact.shape == prefix.shape == (source.vocab_size,)
    assert (exact[exact >= 0] == prefix[exact >= 0]).all()
    special = set(source.roles.values())
    n_mapped = 0
    for v, image in enumerate(prefix.tolist()):
        piece = source.canonical_bytes[v]
        if piece is None or image < 0:
            continue
        spelled = target.canonical_bytes[image]
        n_mapped += 1
        if pair[0] not in LOSSY:  # which fold some characters into others
            assert piece.startswith(spelled) or pair[0] in NORMALIZING
        assert (exact[v] >= 0) == (piece in target.ids_of_bytes)
        assert v not in special
    with_bytes = sum(piece is not None for piece in source.canonical_bytes)
    assert n_mapped == with_bytes or pair[0] in LOSSY


def test_special_tokens_map_by_role_never_by_spelling():
    target, source = tokenizer("sentencepiece"), tokenizer("byte-level")
    end = hf("byte-level").convert_tokens_to_ids("<|end|>")
    assert token_map(target, source)[end] == target.eos_id  # BOS and EOS in one: EOS, the one that is predicted
    back = token_map(source, target)
    assert back[target.bos_id] == back[target.eos_id] == end
    assert back[target.roles["unk"]] == -1  # byte-level tokenizers know no unknown


def test_equal_tokenizers_are_the_identity():
    for name in NAMES:
        tok = tokenizer(name)
        for method in ("exact", "prefix"):
            assert (token_map(tok, tok, method) == np.arange(tok.vocab_size)).all()


def test_tokenizers_that_differ_in_bos_alone_are_equal():
    from fusejax.alignment import row_map
    from fusejax.tokenizers import Tokenizer

    with_bos = tokenizer("sentencepiece")
    without = Tokenizer(hf("sentencepiece"), bos="never")
    assert with_bos.fingerprint != without.fingerprint
    assert (token_map(with_bos, without) == np.arange(with_bos.vocab_size)).all()
    rows_T2 = row_map("the cat  sat", with_bos, without)
    assert (rows_T2[:, 0] == np.arange(len(rows_T2))).all()


def test_columns_hold_what_is_left_of_each_token():
    target, source = tokenizer("sentencepiece"), tokenizer("byte-level coarse")
    columns = table_columns(source, "inside")
    assert columns == max(len(piece or b"") for piece in source.canonical_bytes)
    assert table_columns(source, "boundary") == 1
    table = token_table(target, source, "prefix", columns)
    assert table.ids.shape == table.prefix_hash.shape == (source.vocab_size, columns)
    assert (table.ids[:, 0] == token_map(target, source)).all()
    for v, piece in enumerate(source.canonical_bytes):
        for c in range(1, columns):
            rest = (piece or b"")[c:]
            if rest:
                assert table.ids[v, c] == target.map_bytes([rest])[0]
                assert table.prefix_hash[v, c] == prefix_hashes(source, columns)[v, c] != 0
            else:
                assert table.ids[v, c] == -1
                assert table.prefix_hash[v, c] == 0


def test_hashes_are_equal_where_the_first_bytes_are():
    tok = tokenizer("byte-level coarse")
    hash_VC = prefix_hashes(tok, 6)
    assert hash_VC.dtype == np.uint32
    pieces = [piece or b"" for piece in tok.canonical_bytes]
    assert len(set(hash_VC[:, 0].tolist())) == 1
    for c in range(1, 6):
        by_hash, by_bytes = {}, {}
        for v, piece in enumerate(pieces):
            if len(piece) < c:
                assert hash_VC[v, c] == 0
                continue
            assert hash_VC[v, c] != 0
            by_hash.setdefault(int(hash_VC[v, c]), set()).add(v)
            by_bytes.setdefault(piece[:c], set()).add(v)
        assert sorted(map(sorted, by_hash.values())) == sorted(map(sorted, by_bytes.values()))


def test_unknown_method():
    with pytest.raises(ValueError, match="prefix"):
        token_map(tokenizer("unigram"), tokenizer("byte-level"), "nearest")


@pytest.mark.parametrize("texts", ["abc", b"abc"])
def test_one_text_is_no_list_of_texts(texts):
    with pytest.raises(TypeError, match="should be a list of texts"):
        token_map(tokenizer("unigram"), tokenizer("byte-level"), "stats", texts=texts)
    with pytest.raises(TypeError, match="a text should be a str, not int"):
        token_map(tokenizer("unigram"), tokenizer("byte-level"), "stats", texts=[1])
