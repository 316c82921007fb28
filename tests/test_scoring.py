from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax import scoring, sharding
from fusejax.errors import UserError

V, D = 50, 8


@dataclass(frozen=True)
class Settings:
    """What a scorer asks of a model's configuration."""

    vocab_size: int = V
    logit_softcap: float | None = None


class RunningMean(nnx.Module):
    """The smallest causal model: the state of a token is the mean embedding so far."""

    def __init__(self, seed=0):
        keys = jax.random.split(jax.random.key(seed))
        self.embedding = nnx.Param(jax.random.normal(keys[0], (V, D)))
        self.output = nnx.Param(jax.random.normal(keys[1], (D, V)))
        self.config = Settings()

    def hidden(self, ids_BL):
        count = jnp.arange(1, ids_BL.shape[1] + 1)[None, :, None]
        return jnp.cumsum(self.embedding[...][ids_BL], axis=1) / count

    def unembedding(self):
        return self.output[...]


def by_hand(model, inputs, vocab_size=V):
    """log-probabilities of one document, float64 [n, vocab_size]."""
    embedded = np.asarray(model.embedding[...], np.float64)[inputs]
    hidden = np.cumsum(embedded, axis=0) / np.arange(1, len(inputs) + 1)[:, None]
    logits = (hidden @ np.asarray(model.output[...], np.float64))[:, :vocab_size]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def scorer(model, **options):
    options = {"k": 4, "max_length": 32, "batch_tokens": 64, "mesh": sharding.make_mesh()} | options
    return scoring.Scorer(model, **options)


def documents(n=13, seed=0):
    rng = np.random.default_rng(seed)
    lines = [rng.integers(0, V, rng.integers(2, 34)).astype(np.int32) for _ in range(n)]
    return [line[:-1] for line in lines], [line[1:] for line in lines]


def collect(run, inputs, labels):
    found = {}
    for places, scores in run(inputs, labels):
        found.update(zip(places, scores, strict=True))
    assert sorted(found) == list(range(len(inputs)))
    return [found[i] for i in range(len(inputs))]


@pytest.mark.parametrize("vocab_size", [None, 41])
def test_equals_one_document_after_another(vocab_size):
    model = RunningMean()
    inputs, labels = documents()
    labels = [np.where(label < 41, label, -1) for label in labels]
    for i, scores in enumerate(collect(scorer(model, vocab_size=vocab_size), inputs, labels)):
        expected = by_hand(model, inputs[i], vocab_size or V)
        order = np.argsort(-expected, axis=-1, kind="stable")[:, :4]
        np.testing.assert_array_equal(scores.ids, order)
        np.testing.assert_allclose(scores.logprobs, np.take_along_axis(expected, order, 1), atol=1e-5)
        ce = np.where(labels[i] >= 0, -expected[np.arange(len(labels[i])), labels[i]], 0)
        np.testing.assert_allclose(scores.ce, ce, atol=1e-5)


@pytest.mark.parametrize(("line", "label", "wrong"), [([3, V], [4, 5], V), ([3, 4], [-1, V + 1], V + 1)])
def test_ids_that_the_model_does_not_know(line, label, wrong):
    with pytest.raises(UserError, match=f"^document 1: token id {wrong} is none of the model's: 0 to {V - 1}"):
        collect(scorer(RunningMean()), [np.array([1]), np.array(line)], [np.array([2]), np.array(label)])


def test_a_broken_document_leaves_its_batch_alone():
    model = RunningMean()
    inputs, labels = documents()
    whole = collect(scorer(model), inputs, labels)
    model.embedding[...] = model.embedding[...].at[inputs[3][0]].set(jnp.nan)
    for i, (good, scores) in enumerate(zip(whole, collect(scorer(model), inputs, labels), strict=True)):
        if inputs[3][0] in inputs[i]:
            assert scores.broken
        else:
            assert not scores.broken
            np.testing.assert_array_equal(scores.ids, good.ids)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(8, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=50))),
    st.integers(1, 2000),
    st.integers(1, 4),
)
def test_plan_covers_all_within_its_bounds(case, batch_tokens, row_multiple):
    max_length, lengths = case
    batches = scoring.plan(np.array(lengths, int), max_length, batch_tokens, row_multiple)
    assert sorted(i for batch in batches for i in batch.documents) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch.documents) <= batch.rows
        assert batch.rows % row_multiple == 0
        assert batch.rows * batch.length <= batch_tokens or batch.rows == row_multiple
        assert max(lengths[i] for i in batch.documents) <= batch.length <= max_length
    assert len({(batch.length, batch.rows) for batch in batches}) <= 4
    assert all(len(batch.documents) == batch.rows for batch in batches[:-1])


def test_a_batch_takes_what_the_devices_have_free(monkeypatch):
    """The program of the batch that was chosen really needs no more, by the compiler's account."""
    model = RunningMean()
    inputs, labels = documents()
    assert scorer(model, batch_tokens=None).batch_tokens == scoring._UNKNOWN_TOKENS  # a CPU tells nothing
    chosen = []
    for free in (1 << 16, 1 << 18, 1 << 20, 1 << 40):
        monkeypatch.setattr(scoring, "_free_memory", lambda mesh, free=free: free)
        sized = scorer(model, batch_tokens=None)
        chosen.append(sized.batch_tokens)
        assert chosen[-1] % 32 == 0
        if 32 < chosen[-1] < scoring._MOST_TOKENS:
            line_BL = jax.ShapeDtypeStruct((chosen[-1] // 32, 32), jnp.int32)
            made = sized._program
            program = made.func.lower(*made.args, sized._state, line_BL, line_BL).compile()
            needed = program.memory_analysis()
            assert 0.05 * free < needed.temp_size_in_bytes + 3 * needed.output_size_in_bytes < 0.8 * free
    assert chosen == sorted(chosen)
    assert chosen[-1] == scoring._MOST_TOKENS
    for scores, one in zip(collect(sized, inputs, labels), collect(scorer(model), inputs, labels), strict=True):
        np.testing.assert_array_equal(scores.ids, one.ids)


def tokenizer(**changes):
    fields = {
        "bos_id": 1,
        "eos_id": 2,
        "adds_bos": False,
        "canonical_bytes": [None, None, None, b"a", b"b"],
    } | changes
    return SimpleNamespace(**fields)


def test_inputs_and_labels():
    ids = np.array([3, 4, 3], np.int32)
    for changes, inputs, labels in [
        ({}, [3, 4, 3], [4, 3, 2]),
        ({"adds_bos": True}, [1, 3, 4, 3], [3, 4, 3, 2]),
        ({"eos_id": None}, [3, 4, 3], [4, 3, -1]),
    ]:
        made = scoring.inputs_and_labels(ids, tokenizer(**changes))
        assert [array.tolist() for array in made] == [inputs, labels]
        assert made[0].dtype == made[1].dtype == np.int32


def test_a_tokenizer_that_does_not_fit_is_refused():
    scoring.check_fits(tokenizer(), 5, "m")
    scoring.check_fits(tokenizer(canonical_bytes=[None, None, b"a", None]), 3, "m")  # an added token without text
    with pytest.raises(UserError, match=r"m: .* token id 4, the model knows 4 tokens"):
        scoring.check_fits(tokenizer(), 4, "m")
    with pytest.raises(UserError, match="token id 9"):
        scoring.check_fits(tokenizer(bos_id=9, adds_bos=True), 5, "m")
