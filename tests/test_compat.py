"""`compat: fusellm` against the arithmetic of the paper's code, restated here: dense, with its rounding and ties."""

from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml

from fusejax import alignment, config, fusion, metrics, sources, training
from fusejax.batches import Batches
from fusejax.errors import UserError
from fusejax.training.step import batch_sums, means

B, L, S, K, V, VS, D = 3, 9, 3, 4, 17, 13, 8
BASE = {"target": "a/b", "sources": ["a/b", "c/d", "e/f"], "corpus": {"path": "x"}, "output": "o", "compat": "fusellm"}


def make_batch(seed):
    """Sequences of several documents, packed; in the last one padding. Cross-entropies so near that rewards tie."""
    rng = np.random.default_rng(seed)
    there = np.ones((B, L), bool)
    there[-1, 6:] = False
    ids = np.where(there, rng.integers(0, V, (B, L)), 0).astype(np.int32)
    labels = np.full((B, L), -1, np.int32)
    labels[:, :-1] = np.where(there[:, 1:], ids[:, 1:], -1)
    probs = -np.sort(-rng.dirichlet(np.ones(K + 2), (B, L, S))[..., :K], -1)
    source_ids = np.stack([rng.permutation(VS)[:K] for _ in range(B * L * S)]).reshape(B, L, S, K)
    ce = 2.3 + rng.choice([0.0, 0.003, 0.2], (B, 1, S))
    return {
        "ids": ids,
        "segment_ids": there.astype(np.int32),
        "positions": np.where(there, np.arange(L), 0).astype(np.int32),
        "labels": labels,
        "source_ids": source_ids.astype(np.int32),
        "source_logprobs": np.log(probs).astype(np.float32),
        "source_valid": (rng.random((B, L, S)) < 0.7) & there[..., None],
        "source_consumed": np.zeros((B, L, S), np.int32),
        "source_labels": np.zeros((B, L, S), np.int32),
        "source_ce": np.broadcast_to(ce, (B, L, S)).astype(np.float32),
    }


def half(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def published_loss(batch, images, logits, kind, weight_clm, temperature):
    """Row by row, over the whole vocabulary, as the paper's code computes it."""
    rewards = half(1 / half(np.exp(half(batch["source_ce"][:, 0]))))
    clm, fused, n_clm, n_fused = 0.0, 0.0, 0, 0
    for b, t in np.ndindex(B, L):
        log_q = np.log(softmax(np.float64(logits[b, t])))
        if batch["labels"][b, t] >= 0:
            clm, n_clm = clm - log_q[batch["labels"][b, t]], n_clm + 1
        if not batch["segment_ids"][b, t]:
            continue
        dists = np.zeros((S, V))
        for s in range(S):
            kept = {}
            for i, value in zip(batch["source_ids"][b, t, s], batch["source_logprobs"][b, t, s], strict=True):
                kept.setdefault(images[s][i], value)  # of tokens that meet, the first one's logit stays
            if batch["source_valid"][b, t, s]:
                dists[s, list(kept)] = softmax(np.float64(list(kept.values())) / temperature)
            else:
                dists[s, batch["ids"][b, t]] = 1  # the current token, not the next one
        weights = np.eye(S)[np.argmax(rewards[b])] if kind == "min_ce" else half(softmax(rewards[b]))  # first of ties
        target = weights @ dists
        fused, n_fused = fused - target @ log_q, n_fused + 1
    return weight_clm * clm / n_clm + (1 - weight_clm) * fused / n_fused


@pytest.mark.parametrize("kind", ["min_ce", "avg_ce"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_is_that_of_the_published_arithmetic(kind, temperature):
    for seed in range(4):
        rng = np.random.default_rng(100 + seed)
        job = config.validate(BASE | {"fusion": {"kind": kind}, "loss": {"temperature": temperature}})
        images = [rng.integers(0, V, VS) for _ in range(S)]
        tables = [
            fusion.TokenTable(jnp.asarray(image[:, None], jnp.int32), jnp.zeros((VS, 1), jnp.uint32))
            for image in images
        ]
        hidden, unembedding = rng.normal(size=(B, L, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
        model = SimpleNamespace(
            hidden=lambda *_, hidden=hidden, **__: jnp.asarray(hidden),
            unembedding=lambda unembedding=unembedding: jnp.asarray(unembedding),
            config=SimpleNamespace(vocab_size=V, logit_softcap=None),
        )
        batch = make_batch(seed)
        total, sums = batch_sums(job, model, batch, tables, jnp.float32(0.6))
        values = means(job, sums)
        want = published_loss(batch, images, hidden @ unembedding, kind, 0.6, temperature)
        assert float(total / sums["loss"].count) == float(values["loss"]) == pytest.approx(want, rel=1e-6)
        if kind == "min_ce":
            assert float(values["won"].sum() + values["fallback"]) == pytest.approx(1)


def test_rewards_of_a_hundredth_apart_tie_and_the_first_source_wins():
    ce = jnp.array([[2.303, 2.300], [2.300, 2.303], [2.5, 2.3]])
    part = jnp.ones((3, 2), bool)
    assert fusion.source_weights(ce, part, half_rewards=True).argmax(-1).tolist() == [0, 0, 1]
    assert fusion.source_weights(ce, part).argmax(-1).tolist() == [1, 0, 1]


def test_one_key_sets_all_quirks():
    job = config.validate(BASE)
    assert (job.alignment.rows, job.alignment.tokens, job.alignment.collisions) == ("mined", "mined", "first")
    assert (job.alignment.gold_chain, job.alignment.fallback) == (False, "gold")
    assert (job.fusion.level, job.fusion.ce_unit, job.fusion.weighting) == ("block", "token", "reference")
    assert job.loss.tail == "renormalize"
    assert config.validate(yaml.safe_load(config.dump(job))) == job
    agreeing = BASE | {"alignment": {"rows": "mined"}, "fusion": {"kind": "avg_ce"}}
    assert config.validate(agreeing).fusion.kind == "avg_ce"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": {"rows": "inside"}}, "sets alignment.rows to 'mined', but it is 'inside'; remove one"),
        ({"loss": {"tail": "tail"}}, "sets loss.tail to 'renormalize', but it is 'tail'"),
        ({"fusion": {"level": "document"}}, "sets fusion.level to 'block'"),
        ({"fusion": {"kind": "fixed", "weights": [1, 2, 3]}}, "knows no fusion.kind 'fixed'"),
        ({"alignment": "x"}, "alignment"),
        ({"compat": "fusechat"}, "compat: .*'fusellm'"),
    ],
)
def test_a_contradiction_is_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        config.validate(BASE | changes)
    assert "\n" not in str(raised.value)


def test_documents_of_a_sequence_are_one_segment_and_share_one_ce(make_job):
    ready = {}
    for compat in (None, "fusellm"):
        job = make_job(str(compat), compat=compat)
        sources.run(job)
        alignment.run(job)
        ready[compat] = Batches(job)
    assert ready[None].documents(0)[0].tolist() == ready["fusellm"].documents(0)[0].tolist()
    usual, batch = (ready[compat].batch(0) for compat in (None, "fusellm"))
    np.testing.assert_array_equal(batch["ids"], usual["ids"])
    there = usual["segment_ids"] > 0
    np.testing.assert_array_equal(batch["segment_ids"], there)
    assert usual["segment_ids"].max() > 1
    for ids, labels, positions, n in zip(batch["ids"], batch["labels"], batch["positions"], there.sum(1), strict=True):
        np.testing.assert_array_equal(labels[: n - 1], ids[1:n])
        assert np.all(labels[n - 1 :] == -1)
        np.testing.assert_array_equal(positions[:n], np.arange(n))
    assert all(len(set(batch["source_ce"][b, :, s].tolist())) == 1 for b in range(2) for s in range(2))
    assert np.isfinite(batch["source_ce"]).all()


def test_a_job_runs(make_job):
    job = make_job(compat="fusellm", batch={"sequences": 4, "steps": 2}, loss={"model_entropy": True})
    sources.run(job)
    alignment.run(job)
    training.train(job, "fused")
    history = metrics.read(job.folder)
    assert len(history) == 2
    assert all(np.isfinite([row["loss"], row["fusion_loss"], row["model_entropy"]]).all() for row in history)
