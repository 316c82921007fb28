"""The plain restatement that `mined` is measured against gives the same cost and path."""

import pytest
from tokenizer_zoo import TEXTS, tokenizer

from fusejax.alignment import mined, plain


@pytest.mark.parametrize(
    "pair", [("sentencepiece", "byte-level coarse"), ("byte-level", "unigram bytes")], ids="/".join
)
@pytest.mark.parametrize("text", TEXTS)
def test_same_cost_and_path(pair, text):
    target, source = map(tokenizer, pair)
    target_ids, source_ids = target.encode(text)[0], source.encode(text)[0]
    cost, path_P2 = mined.warp_tokens(source_ids, target_ids, mined.Spellings(source), mined.Spellings(target))
    expected_cost, expected_path = plain.warp_spellings(
        [source.surfaces[i] for i in source_ids], [target.surfaces[i] for i in target_ids]
    )
    assert cost == expected_cost
    assert list(map(tuple, path_P2.tolist())) == expected_path
