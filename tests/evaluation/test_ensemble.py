"""Ensembles against dense distributions in float64, and by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax import models
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.errors import UserError
from fusejax.evaluation import ensemble, measure, measure_ensemble
from fusejax.evaluation.ensemble import Member, common_cuts, segment_logprobs
from fusejax.evaluation.standalone import measure_ensemble_of
from fusejax.tokenizers import Tokenizer

TEXTS = [
    ("prose", "The cat sat on the mat, and the dog sat on the log."),
    ("prose", "Ünïcödé and 😀 take more than one byte each."),
    ("code", "def add(a, b):\n    return a + b\n"),
]
DOCUMENTS = [{"id": str(i), "domain": domain} for i, (domain, _) in enumerate(TEXTS)]
OPTIONS = {"max_length": 80, "batch_tokens": 256}


def member(folder, model, name="m"):
    tokenizer = Tokenizer.load(folder)
    tokens = [dict(zip(("ids", "boundaries"), tokenizer.encode(text), strict=True)) for _, text in TEXTS]
    return Member(name, tokenizer, tokens, lambda: model)


def other(folder, seed):
    """A model of the same shape with other weights."""
    return models.init(models.read_config(folder)[1], seed)


def dense(m):
    """float64 log-probabilities [n labels, V] of each document, and its labels; a BOS in front where there is one."""
    decoder = m.load()
    for text in m.tokens:
        front = [m.tokenizer.bos_id] if m.tokenizer.adds_bos else []
        line = np.array([*front, *text["ids"]], np.int32)
        logits = np.asarray(decoder(line[None]), np.float64)[0, :-1]
        logits -= logits.max(1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(1, keepdims=True)), line[1:]


def by_domain(values):
    sums = {}
    for document, value in zip(DOCUMENTS, values, strict=True):
        sums[document["domain"]] = sums.get(document["domain"], 0) + value
    return sums


@pytest.mark.parametrize("name", ["coarse", "fine"])
@pytest.mark.parametrize("average", ["probability", "log_probability"])
def test_one_tokenizer_equals_dense_distributions(tiny_models, name, average):
    weights = [3.0, 1.0] if name == "fine" else None
    folder = tiny_models[name]
    pair = [member(folder, models.load(folder)), member(folder, other(folder, 9))]
    w = np.array(weights or [1.0, 1.0]) / sum(weights or [1.0, 1.0])
    wanted = []
    for (a, labels), (b, _) in zip(dense(pair[0]), dense(pair[1]), strict=True):
        if average == "probability":
            mixed = np.log(w[0] * np.exp(a) + w[1] * np.exp(b))
        else:
            mixed = w[0] * a + w[1] * b
            mixed -= np.log(np.exp(mixed).sum(1, keepdims=True))
        wanted.append(-mixed[np.arange(len(labels)), labels].sum())
    found = measure_ensemble(pair, DOCUMENTS, weights=weights, average=average, **OPTIONS)
    alone = measure(pair[0].load(), pair[0].tokenizer, DOCUMENTS, pair[0].tokens, **OPTIONS)
    for domain, nats in by_domain(wanted).items():
        assert found[domain].nats == pytest.approx(nats, rel=1e-5)
        assert (found[domain].bytes, found[domain].tokens) == (alone[domain].bytes, alone[domain].tokens)


@pytest.mark.parametrize("average", ["probability", "log_probability"])
def test_a_model_with_itself_is_itself(tiny_models, average):
    m = member(tiny_models["fine"], models.load(tiny_models["fine"]))
    found = measure_ensemble([m, m], DOCUMENTS, average=average, **OPTIONS)
    alone = measure(m.load(), m.tokenizer, DOCUMENTS, m.tokens, **OPTIONS)
    for domain in alone:
        assert found[domain].nats == pytest.approx(alone[domain].nats, rel=1e-5)


def test_few_distributions_at_a_time_give_the_same(tiny_models, monkeypatch):
    folder = tiny_models["coarse"]
    pair = [member(folder, models.load(folder)), member(folder, other(folder, 9))]
    whole = measure_ensemble(pair, DOCUMENTS, average="log_probability", **OPTIONS)
    monkeypatch.setattr(ensemble, "_HOST_BYTES", 1)
    parts = measure_ensemble(pair, DOCUMENTS, average="log_probability", max_length=16, stride=16, batch_tokens=256)
    enough = OPTIONS | {"batch_tokens": 10**12}  # no more rows than the text needs
    again = measure_ensemble(pair, DOCUMENTS, average="log_probability", **enough)
    for domain in whole:
        assert again[domain].nats == pytest.approx(whole[domain].nats, rel=1e-5)
        assert parts[domain].tokens == whole[domain].tokens


def test_two_tokenizers_equal_dense_distributions(tiny_models):
    """Cuts and products from characters and whole distributions, with none of the module's arithmetic."""
    pair = [member(folder, models.load(folder)) for folder in tiny_models.values()]
    assert pair[0].tokenizer.text_fingerprint != pair[1].tokenizer.text_fingerprint
    w, wanted, sizes, counts = [0.3, 0.7], [], [], []
    for i, pieces in enumerate(zip(*(dense(m) for m in pair), strict=True)):
        ends = [[int(b) for b in m.tokens[i]["boundaries"]] for m in pair]
        size = len(TEXTS[i][1].encode())
        # `coarse` has no BOS: its first token is not predicted.
        cuts = [b for b in range(size + 1) if all(b in e for e in ends) and b >= ends[0][0]]
        total = 0.0
        for start, stop in pairwise(cuts):
            mixed = 0.0
            for share, end, (logprobs, labels) in zip(w, ends, pieces, strict=True):
                first_label = len(end) - len(labels)
                inside = [t for t, b in enumerate(end) if start < b <= stop]
                mixed += share * np.exp(sum(logprobs[t - first_label, labels[t - first_label]] for t in inside))
            total -= np.log(mixed)
        wanted.append(total)
        sizes.append(cuts[-1] - cuts[0])
        counts.append(len(cuts) - 1)
    found = measure_ensemble(pair, DOCUMENTS, weights=w, **OPTIONS)
    for domain, nats in by_domain(wanted).items():
        assert found[domain].nats == pytest.approx(nats, rel=1e-5)
        assert found[domain].bytes == by_domain(sizes)[domain]
        assert found[domain].tokens == by_domain(counts)[domain]


@given(st.lists(st.sets(st.integers(1, 30), min_size=1), min_size=1, max_size=4), st.data())
def test_cuts_are_common_and_segments_add_up(sets, data):
    ends = [np.array(sorted(s | {31})) for s in sets]
    firsts = [data.draw(st.sampled_from([0, int(e[0])])) for e in ends]
    cuts = common_cuts(ends, firsts)
    assert cuts[-1] == 31
    for b in range(32):
        everywhere = all(b in e or (b == 0 and f == 0) for e, f in zip(ends, firsts, strict=True))
        assert (b in cuts) == (everywhere and b >= max(firsts))
    ce = np.arange(1, len(ends[0]) + 1, dtype=np.float32)
    inside = ce[(ends[0] > cuts[0])].sum()
    assert -segment_logprobs(ends[0], ce, cuts).sum() == pytest.approx(inside)


@pytest.mark.parametrize(("options", "message"), [
    ({"weights": [1.0]}, "one weight above 0 for each of 2 models"),
    ({"weights": [1.0, 0.0]}, "one weight above 0"),
    ({"average": "log_probability"}, "log-probabilities of m and m cannot be averaged: their tokenizers differ"),
])  # fmt: skip
def test_mistakes_are_one_clear_line(tiny_models, options, message):
    pair = [member(folder, None) for folder in tiny_models.values()]
    with pytest.raises(UserError, match=message):
        measure_ensemble(pair, DOCUMENTS, **options, **OPTIONS)


def test_of_folders_on_a_corpus(tiny_models, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0][1] + "\n\n" + TEXTS[2][1])
    corpus, given_models = CorpusConfig(path=str(path)), [ModelConfig(model=m) for m in tiny_models.values()]
    sums = measure_ensemble_of(given_models, corpus, max_length=80)
    assert list(sums) == ["text"]
    assert 0 < sums["text"].bits_per_byte < 20
