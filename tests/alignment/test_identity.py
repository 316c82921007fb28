"""A source with the target's own tokenizer: its rows are used as they are, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer_zoo import NAMES, TEXTS, tokenizer

from fusejax import fusion, loss
from fusejax.alignment import GoldChain, row_map, token_table
from fusejax.alignment.rows import METHODS
from fusejax.alignment.tokens import METHODS as TOKEN_METHODS

TOP_K = 5


@pytest.mark.parametrize("name", NAMES)
def test_row_maps_and_token_maps_are_the_identity(name):
    tok = tokenizer(name)
    for text in [*TEXTS, "", " e\u0301 \ufb01\n"]:
        for method in METHODS:
            rows_T2 = row_map(text, tok, tok, method)
            assert (rows_T2[:, 0] == np.arange(len(tok.encode(text)[0]))).all()
            assert not rows_T2[:, 1].any()
    for method in TOKEN_METHODS:
        assert (token_table(tok, tok, method, sample=[]).ids[:, 0] == np.arange(tok.vocab_size)).all()


def made_up(tok, text, seed=0):
    rng, ids = np.random.default_rng(seed), tok.encode(text)[0]
    top = np.stack([rng.choice(tok.vocab_size, TOP_K, replace=False) for _ in ids]).astype(np.int32)
    top[::2, 1] = np.append(ids[1:], 0)[::2]
    logprobs = np.log(np.sort(rng.dirichlet(np.ones(TOP_K + 1), len(ids))[:, :TOP_K])[:, ::-1]).astype(np.float16)
    return ids, top, logprobs


def test_the_training_loss_is_that_of_the_rows_themselves():
    tok = tokenizer("sentencepiece")
    ids, top, logprobs = made_up(tok, TEXTS[1])
    rows_T2 = row_map(TEXTS[1], tok, tok)[:-1]
    row_T, labels_T = rows_T2[:, 0], ids[1:]
    table = fusion.TokenTable(*map(jnp.asarray, token_table(tok, tok)))
    valid_T1 = jnp.ones((len(row_T), 1), bool)
    fused = fusion.fuse_sources(
        [table], jnp.asarray(top[row_T])[:, None], jnp.asarray(logprobs[row_T])[:, None], valid_T1,
        jnp.asarray(labels_T), source_ce=jnp.zeros((len(row_T), 1)),
        source_consumed=jnp.asarray(rows_T2[:, 1])[:, None], source_labels=jnp.asarray(labels_T)[:, None],
    )  # fmt: skip
    # A row that names a token twice is none that a model gives.
    once = np.array([len(set(row)) == TOP_K for row in top[:-1].tolist()])
    assert (np.asarray(fused.ids)[once] == top[:-1][once]).all()
    probs = jnp.exp(jnp.asarray(logprobs[:-1]).astype(jnp.float32))
    assert (np.asarray(fused.probs)[once] == np.asarray(probs)[once]).all()

    key = jax.random.key(0)
    hidden = jax.random.normal(key, (1, int(once.sum()), 8))
    unembedding = jax.random.normal(jax.random.fold_in(key, 1), (8, tok.vocab_size))

    def total(target_ids, target_probs):
        sums = loss.fusion_loss(
            hidden, unembedding, jnp.asarray(labels_T[once])[None], target_ids[None], target_probs[None],
            weight_clm=0.9, kind="ce",
        )  # fmt: skip
        return float(sums.total)

    aligned = total(fused.ids[once], fused.probs[once])
    direct = total(jnp.asarray(top[:-1][once]), probs[once])
    assert aligned == direct


def test_the_gold_chain_adds_nothing_but_the_true_tokens_own_probability():
    tok = tokenizer("byte-level coarse")
    ids, boundaries = tok.encode(TEXTS[0])
    rng = np.random.default_rng(0)
    rows = {
        "ids": np.zeros((len(ids), 1), int),
        "logprobs": np.zeros((len(ids), 1)),
        "ce": rng.exponential(2, len(ids)).astype(np.float32),
    }
    gold_T = GoldChain(tok)(boundaries, row_map(TEXTS[0], tok, tok), ids, boundaries, rows)
    assert (gold_T[:-1] == -rows["ce"][:-1]).all()
    assert gold_T[-1] == -np.inf
