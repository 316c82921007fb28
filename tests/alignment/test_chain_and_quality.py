"""Gold chains against a plain computation, and the quality report against the device's own mapping."""

import json

import numpy as np
import pytest
from tokenizer_zoo import TEXTS, shared, tokenizer

from fusejax.alignment import GoldChain, quality, token_table
from fusejax.alignment.quality import KINDS
from fusejax.alignment.rows import Tokens, map_rows
from fusejax.alignment.tokens import table_columns
from fusejax.errors import UserError
from fusejax.tokenizers import Tokenizer

TOP_K = 6
PAIRS = [
    ("byte-level coarse", "sentencepiece"),
    ("sentencepiece", "byte-level coarse"),
    ("sentencepiece coarse", "byte-level"),
    ("unigram bytes", "byte-level NFC"),
]


def made_up_rows(tok, ids, seed=0):
    """Rows of a source over its own tokens `ids`: top-k of random distributions that often favour the truth."""
    rng = np.random.default_rng(seed)
    logits_RV = rng.normal(0, 2, (len(ids), tok.vocab_size))
    truth = np.append(ids[1:], tok.eos_id)
    logits_RV[np.arange(len(ids)), truth] += 8 * rng.random(len(ids))
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(-1, keepdims=True))
    top_RK = np.argsort(-logprobs_RV, -1)[:, :TOP_K]
    return {
        "ids": top_RK.astype(np.uint16),
        "logprobs": np.take_along_axis(logprobs_RV, top_RK, -1).astype(np.float32),
        "ce": -logprobs_RV[np.arange(len(ids)), truth].astype(np.float32),
    }


def plain_chain(tok, target, source, row_map_T2, rows, t):
    """The gold chain of row t, token by token, from the definition."""
    row, stop = row_map_T2[t, 0], target.boundaries[t + 1]
    if (
        row < 0
        or stop == target.boundaries[t]
        or stop in target.boundaries[t + 2 : t + 3]
        or row + 1 >= len(source.ids)
    ):
        return -np.inf
    total, at, steps = 0.0, row, 0
    while at + 1 < len(source.ids) and source.boundaries[at + 1] <= stop:
        total -= rows["ce"][at]
        at, steps = at + 1, steps + 1
    rest = stop - source.boundaries[at]
    if rest == 0:
        return total
    if steps == 0:
        return -float(rows["ce"][at])
    label = source.ids[at + 1]
    begun = tok.canonical_bytes[label][:rest]
    mass = np.exp(-float(rows["ce"][at]))
    for i, logprob in zip(rows["ids"][at].tolist(), rows["logprobs"][at].tolist(), strict=True):
        if i != label and (tok.canonical_bytes[i] or b"").startswith(begun):
            mass += np.exp(logprob)
    return total + np.log(min(mass, 1.0))


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_gold_chain_is_the_product_along_the_true_tokens(pair):
    target_tok, source_tok = map(tokenizer, pair)
    chain, spans = GoldChain(source_tok), 0
    for text in TEXTS:
        target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
        rows = made_up_rows(source_tok, source.ids)
        row_map_T2 = map_rows(text.encode(), target, source, source_tok)
        gold_T = chain(target.boundaries, row_map_T2, source.ids, source.boundaries, rows)
        assert gold_T.dtype == np.float32
        assert gold_T[-1] == -np.inf
        for t in range(len(target.ids) - 1):
            expected = plain_chain(source_tok, target, source, row_map_T2, rows, t)
            assert gold_T[t] == pytest.approx(expected, rel=1e-5)
        spans += int((gold_T > -np.inf).sum())
    assert spans > 30


def test_a_chain_over_two_tokens_by_hand():
    tok = tokenizer("byte-level")
    ids = np.array([tok.map_bytes([byte])[0] for byte in (b"a", b"b", b"c", b"d")])
    rows = {"ids": np.zeros((4, 1), int), "logprobs": np.full((4, 1), -9.0), "ce": np.array([0.5, 0.25, 1.0, np.nan])}
    row_map_T2 = np.array([[0, 0], [2, 0], [3, 0]])
    gold_T = GoldChain(tok)(np.array([1, 3, 4]), row_map_T2, ids, np.array([1, 2, 3, 4]), rows)
    assert gold_T.tolist() == [-0.75, -1.0, -np.inf]  # 'bc' after 'a'; 'd' after 'abc'; nothing after the end


def test_empty_and_single_token_documents():
    chain, none = GoldChain(tokenizer("byte-level")), np.zeros(0, np.int32)
    rows = {"ids": np.zeros((1, 2), int), "logprobs": np.zeros((1, 2)), "ce": np.zeros(1)}
    assert chain(none, np.zeros((0, 2), np.int32), none, none, rows).shape == (0,)
    one = np.ones(1, np.int32)
    assert chain(one, np.array([[0, 0]]), one, one, rows).tolist() == [-np.inf]


@pytest.mark.parametrize("gold_chain", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_quality_measures_what_the_device_maps(pair, gold_chain):
    jnp = pytest.importorskip("jax.numpy")
    from fusejax import fusion

    target_tok, source_tok = map(tokenizer, pair)
    text = TEXTS[0]
    target, source = Tokens.of(target_tok, text), Tokens.of(source_tok, text)
    rows = made_up_rows(source_tok, source.ids)
    report = quality(rows, text, target_tok, source_tok, gold_chain=gold_chain)

    table = token_table(target_tok, source_tok, "prefix", table_columns(source_tok, "inside"))
    row_map_T2 = map_rows(text.encode(), target, source, source_tok)[:-1]
    row_T, there_T = np.maximum(row_map_T2[:, 0], 0), row_map_T2[:, 0] >= 0
    gold_T = GoldChain(source_tok)(
        target.boundaries, np.append(row_map_T2, [[-1, 0]], 0), source.ids, source.boundaries, rows
    )
    mapped = fusion.map_rows(
        jnp.asarray(rows["ids"][row_T].astype(np.int32)),
        jnp.asarray(rows["logprobs"][row_T]),
        jnp.asarray(there_T & (row_T < len(source.ids) - 1)),
        fusion.TokenTable(jnp.asarray(table.ids), jnp.asarray(table.prefix_hash)),
        consumed=jnp.asarray(row_map_T2[:, 1]),
        source_labels=jnp.asarray(np.append(source.ids[1:], -1)[row_T]),
        gold_logprobs=jnp.asarray(gold_T[:-1]) if gold_chain else None,
        labels=jnp.asarray(target.ids[1:]),
        tail="renormalize",
    )
    ce_T = fusion.aligned_ce(
        mapped.ids[:, None], mapped.probs[:, None], mapped.valid[:, None], jnp.asarray(target.ids[1:]),
        target_tok.vocab_size,
    )[:, 0]  # fmt: skip
    valid_T = np.asarray(mapped.valid)
    assert report["mapped_ce"] == pytest.approx(float(np.asarray(ce_T)[valid_T].mean()), rel=1e-3)
    outside = valid_T & (row_map_T2[:, 1] == 0)
    assert report["mass_kept"] == pytest.approx(float(np.asarray(mapped.mass)[outside].mean()), rel=1e-4)
    assert report["rows"] == len(target.ids)
    assert sum(report["kinds"].values()) == pytest.approx(1)
    assert set(report["kinds"]) == set(KINDS)


def test_equal_tokenizers_keep_the_sources_own_cross_entropy():
    tok = tokenizer("byte-level coarse")
    source = Tokens.of(tok, TEXTS[1])
    rows = made_up_rows(tok, source.ids)
    report = quality([rows, rows], [TEXTS[1], TEXTS[1]], tok, tok)
    assert report["share"] == 1
    assert report["kinds"]["same token"] == 1
    assert report["mass_kept"] == pytest.approx(float(np.exp(rows["logprobs"][:-1]).sum(-1).mean()), rel=1e-5)
    for gold_chain in (False, True):
        own = quality([rows, rows], [TEXTS[1], TEXTS[1]], tok, tok, gold_chain=gold_chain)
        assert own["source_top_ce_per_byte"] == pytest.approx(own["mapped_ce_per_byte"], rel=1e-12)
    better = quality([rows, rows], [TEXTS[1], TEXTS[1]], tok, tok, gold_chain=True)
    assert better["mapped_ce"] <= quality(rows, TEXTS[1], tok, tok, gold_chain=False)["mapped_ce"]


@pytest.mark.parametrize("gold_chain", [False, True])
def test_the_unmapped_cross_entropy_is_that_of_the_covered_rows_row_by_row(gold_chain):
    target_tok, source_tok = tokenizer("sentencepiece"), tokenizer("byte-level coarse")
    target, source = Tokens.of(target_tok, TEXTS[0]), Tokens.of(source_tok, TEXTS[0])
    rows = made_up_rows(source_tok, source.ids)
    rows["logprobs"][::4] = -np.inf  # of these nothing is left
    report = quality(rows, TEXTS[0], target_tok, source_tok, gold_chain=gold_chain)
    row_map_T2 = map_rows(TEXTS[0].encode(), target, source, source_tok)
    covered = {r for r in row_map_T2[:-1, 0].tolist() if 0 <= r < len(source.ids) - 1 and r % 4}
    nats = size = 0.0
    for r in covered:
        probs = dict(zip(rows["ids"][r].tolist(), np.exp(rows["logprobs"][r].astype(float)).tolist(), strict=True))
        label = int(source.ids[r + 1])
        if gold_chain:
            probs[label] = np.exp(-float(rows["ce"][r]))
        nats -= np.log(0.98 * probs.get(label, 0) / sum(probs.values()) + 0.02 / source_tok.vocab_size)
        size += source.boundaries[r + 1] - source.boundaries[r]
    assert covered
    assert report["source_top_ce_per_byte"] == pytest.approx(nats / size, rel=1e-5)


FIXTURES = shared() / "fixtures"


@pytest.mark.skipif(not (FIXTURES / "alignment").exists(), reason="the rows of a real source are not on this machine")
@pytest.mark.parametrize(
    ("name", "share", "ce"), [("llama", 0.964, 3.73), ("gptneox20b", 0.989, 4.35)], ids=["llama", "neox"]
)
def test_real_rows(name, share, ce):
    texts = [json.loads(line)["text"] for line in (FIXTURES / "alignment/texts.jsonl").open(encoding="utf-8")]
    saved = np.load(FIXTURES / "alignment/smollm2.npz")
    source_tok = Tokenizer.load(str(FIXTURES / "tokenizers/smollm2"))
    rows = []
    for text, a, b in zip(texts, saved["offsets"], saved["offsets"][1:], strict=False):
        assert (source_tok.encode(text)[0] == saved["ids"][a:b]).all()
        rows.append({"ids": saved["top_ids"][a:b], "logprobs": saved["top_logprobs"][a:b], "ce": saved["ce"][a:b]})
    report = quality(rows, texts, Tokenizer.load(str(FIXTURES / "tokenizers" / name)), source_tok)
    assert report["share"] >= share
    assert report["mapped_ce"] <= ce


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda rows: {name: rows[name] for name in ("ids", "logprobs")}, "has no `ce`"),
        (
            lambda rows: {name: value[:-1] for name, value in rows.items()},
            r"should be \({n}, k\), \({n}, k\), \({n},\)",
        ),
        (lambda rows: {name: np.repeat(value, 2, 0) for name, value in rows.items()}, "for each of the {n} tokens"),
        (lambda rows: rows | {"ce": rows["ce"][:-1]}, "should be"),
        (lambda rows: rows | {"logprobs": rows["logprobs"][:, :2]}, "should be"),
        (lambda rows: rows | {"ids": rows["ids"].astype(int) + 10**6}, "from 0 to {last}"),
        (lambda rows: rows | {"ids": rows["ids"].astype(int) - 10**6}, "from 0 to {last}"),
        (lambda rows: rows | {"ids": rows["ids"].astype(float)}, "ids of float64 should be a whole number"),
    ],
)
def test_rows_that_are_not_the_sources_are_refused(changed, message):
    tok = tokenizer("byte-level coarse")
    ids = Tokens.of(tok, TEXTS[1]).ids
    rows = made_up_rows(tok, ids)
    message = message.replace("{n}", str(len(ids))).replace("{last}", str(tok.vocab_size - 1))
    with pytest.raises(UserError, match=f"document 1: .*{message}"):
        quality([rows, changed(rows)], [TEXTS[1]] * 2, tok, tok)
    with pytest.raises(UserError, match="rows of 1 documents, but there are 2 texts"):
        quality([rows], [TEXTS[1]] * 2, tok, tok)


def test_padded_rows_of_an_output_layer_may_stand_where_they_are_impossible():
    tok = tokenizer("byte-level coarse")
    rows = made_up_rows(tok, Tokens.of(tok, TEXTS[1]).ids)
    padded = {"ids": np.pad(rows["ids"], ((0, 0), (0, 1)), constant_values=tok.vocab_size), "ce": rows["ce"],
              "logprobs": np.pad(rows["logprobs"], ((0, 0), (0, 1)), constant_values=-np.inf)}  # fmt: skip
    assert quality(padded, TEXTS[1], tok, tok)["mapped_ce"] == quality(rows, TEXTS[1], tok, tok)["mapped_ce"]
