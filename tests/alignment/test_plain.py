"""The plain restatement that `mined` is measured against gives the same cost and path."""

import pytest
from tokenizer_zoo import TEXTS, tokenizer

from fusejax.alignment import mined, plain
from fusejax.alignment.rows import Tokens


@pytest.mark.parametrize(
    "pair", [("sentencepiece", "byte-level coarse"), ("byte-level", "unigram bytes")], ids="/".join
)
@pytest.mark.parametrize("text", TEXTS)
def test_same_cost_and_path(pair, text):
    target, source = map(tokenizer, pair)
    spellings = mined.Spellings(source), mined.Spellings(target)
    cost, path_P2 = mined.warp_tokens(Tokens.of(source, text), Tokens.of(target, text), *spellings)
    expected_cost, expected_path = plain.warp_spellings(
        *([tok.surfaces[i] for i in tok.encode(text)[0]] for tok in (source, target))
    )
    assert cost == expected_cost
    assert list(map(tuple, path_P2.tolist())) == expected_path
