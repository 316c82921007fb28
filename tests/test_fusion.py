import doctest
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax import fusion, loss

N, S, K, V, VS = 9, 3, 4, 13, 11  # rows, sources, entries, the target's vocabulary, a source's
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def table(*ids):
    """Column 0 only: the image of each source id."""
    return fusion.TokenTable(jnp.array(ids, jnp.int32)[:, None], jnp.zeros((len(ids), 1), jnp.uint32))


def row(mapped, i=0):
    """A row as {id: probability}."""
    there = np.asarray(mapped.ids[i]) >= 0
    ids, probs = np.asarray(mapped.ids[i])[there], np.asarray(mapped.probs[i])[there]
    assert len(set(ids.tolist())) == len(ids)
    return {int(k): float(p) for k, p in zip(ids, probs, strict=True)}


def logs(*probs):
    return jnp.log(jnp.array([probs], jnp.float32))


YES = jnp.array([True])


def mapped_row(ids, probs, images, **options):
    return fusion.map_rows(jnp.array([ids]), logs(*probs), YES, table(*images), **options)


def test_ids_are_mapped_and_unmapped_ones_are_dropped():
    mapped = mapped_row([2, 0, 1, -1], [0.5, 0.25, 0.125, 0.1], [7, -1, 9])
    assert row(mapped) == pytest.approx({9: 0.5, 7: 0.25})
    assert mapped.valid[0]
    assert float(mapped.mass[0]) == pytest.approx(0.75)
    scaled = mapped_row([2, 0, 1, -1], [0.5, 0.25, 0.125, 0.1], [7, -1, 9], tail="renormalize")
    assert row(scaled) == pytest.approx({9: 2 / 3, 7: 1 / 3})
    assert float(scaled.mass[0]) == pytest.approx(0.75)


def test_collisions_add_up_or_the_first_wins():
    arguments = ([0, 1, 2], [0.5, 0.25, 0.125], [7, 8, 7])
    assert row(mapped_row(*arguments)) == pytest.approx({7: 0.625, 8: 0.25})
    assert row(mapped_row(*arguments, collisions="first")) == pytest.approx({7: 0.5, 8: 0.25})


def test_a_row_without_images_is_not_valid():
    mapped = mapped_row([0, 1], [0.5, 0.25], [-1, -1], tail="renormalize")
    assert not mapped.valid[0]
    assert row(mapped) == {}
    assert float(mapped.mass[0]) == 0


def test_ids_out_of_range_are_dropped():
    assert row(mapped_row([0, 5], [0.5, 0.25], [3, 4])) == pytest.approx({3: 0.5})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_logarithms_are_dropped(bad):
    logprobs = jnp.log(jnp.array([[0.5, 0.25, 0.125]])).at[0, 1].set(bad)
    mapped = fusion.map_rows(jnp.array([[0, 1, 2]]), logprobs, YES, table(3, 4, 5))
    assert row(mapped) == pytest.approx({3: 0.5, 5: 0.125})


def test_rounded_probabilities_never_exceed_one():
    mapped = mapped_row([0, 1], [0.75, 0.2505], [3, 4])
    assert sum(row(mapped).values()) <= 1 + 1e-6


# Source tokens 0 'ab', 1 'abc', 2 'abd', 3 'x', 4 'a'; column c holds the target id of what follows the first c bytes.
INSIDE = fusion.TokenTable(
    jnp.array([[20, 1, -1], [21, 5, 2], [22, 6, 3], [23, -1, -1], [24, -1, -1]], jnp.int32),
    jnp.array([[5, 7, 0], [5, 7, 8], [5, 7, 8], [5, 0, 0], [5, 0, 0]], jnp.uint32),
)


def inside(consumed, **options):
    ids, logprobs = jnp.array([[0, 1, 2, 3, 4]]), logs(0.4, 0.2, 0.1, 0.2, 0.05)
    return fusion.map_rows(
        ids, logprobs, YES, INSIDE, consumed=jnp.array([consumed]), source_labels=jnp.array([1]), **options
    )


def test_consumed_bytes_keep_the_tokens_that_go_on():
    assert row(inside(0)) == pytest.approx({20: 0.4, 21: 0.2, 22: 0.1, 23: 0.2, 24: 0.05})
    # The row lists 0.95 of the source's probability, and the tail keeps its share.
    assert row(inside(1)) == pytest.approx({1: 0.95 * 4 / 7, 5: 0.95 * 2 / 7, 6: 0.95 * 1 / 7})
    assert row(inside(2)) == pytest.approx({2: 0.95 * 2 / 3, 3: 0.95 * 1 / 3})
    assert inside(1).mass[0] == inside(2).mass[0] == pytest.approx(0.95)
    assert row(inside(1, tail="renormalize")) == pytest.approx({1: 4 / 7, 5: 2 / 7, 6: 1 / 7})
    assert not inside(3).valid[0]  # beyond the table


def test_inside_a_token_what_has_no_image_joins_the_tail():
    known = INSIDE._replace(ids=INSIDE.ids.at[2, 1].set(-1))  # 'abd' after its 'a': no token of the target
    options = {"consumed": jnp.array([1]), "source_labels": jnp.array([1])}
    mapped = fusion.map_rows(jnp.array([[0, 1, 2, 3, 4]]), logs(0.4, 0.2, 0.1, 0.2, 0.05), YES, known, **options)
    assert row(mapped) == pytest.approx({1: 0.95 * 4 / 7, 5: 0.95 * 2 / 7})
    assert mapped.mass[0] == pytest.approx(0.95 * 6 / 7)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_tail_a_row_inside_a_token_is_the_conditional_distribution(seed):
    """Tokens are all strings of up to three of 'ab'; the true one begins with 'a'."""
    rng = np.random.default_rng(seed)
    spelled = ["".join(s) for n in (1, 2, 3) for s in itertools.product("ab", repeat=n)]
    probs = rng.dirichlet(np.ones(len(spelled)))
    rests = fusion.TokenTable(
        jnp.array([[i, spelled.index(s[1:]) if len(s) > 1 else -1] for i, s in enumerate(spelled)], jnp.int32),
        jnp.array([[0, ord(s[0]) if len(s) > 1 else 0] for s in spelled], jnp.uint32),
    )
    order = rng.permutation(len(spelled))
    mapped = fusion.map_rows(
        jnp.array([order]), jnp.log(jnp.array([probs[order]])), YES, rests,
        consumed=jnp.array([1]), source_labels=jnp.array([spelled.index("ab")]),
    )  # fmt: skip
    going_on = {s: p for s, p in zip(spelled, probs, strict=True) if s[0] == "a" and len(s) > 1}
    expected = {spelled.index(s[1:]): p / sum(going_on.values()) for s, p in going_on.items()}
    assert row(mapped) == pytest.approx(expected, rel=1e-5)


def test_gold_chain_moves_probability_from_the_first_image():
    options = {"source_labels": jnp.array([0]), "labels": jnp.array([9])}
    arguments = ([0, 1], [0.5, 0.25], [7, 8])
    moved = mapped_row(*arguments, gold_logprobs=jnp.log(jnp.array([0.2])), **options)
    assert row(moved) == pytest.approx({7: 0.3, 8: 0.25, 9: 0.2})
    more = mapped_row(*arguments, gold_logprobs=jnp.log(jnp.array([0.6])), **options)
    assert row(more) == pytest.approx({7: 0.0, 8: 0.25, 9: 0.6})
    most = mapped_row(*arguments, gold_logprobs=jnp.log(jnp.array([0.95])), **options)
    assert row(most) == pytest.approx({7: 0.0, 8: 0.25 / 1.2, 9: 0.95 / 1.2})  # 1.2 in all: scaled to 1
    none = mapped_row(*arguments, gold_logprobs=jnp.array([-jnp.inf]), **options)
    assert row(none) == pytest.approx({7: 0.5, 8: 0.25})


def test_gold_chain_adds_to_what_the_true_token_has():
    options = {"source_labels": jnp.array([0]), "gold_logprobs": jnp.log(jnp.array([0.2]))}
    arguments = ([0, 1], [0.5, 0.25], [7, 8])
    assert row(mapped_row(*arguments, labels=jnp.array([8]), **options)) == pytest.approx({7: 0.3, 8: 0.45})
    assert row(mapped_row(*arguments, labels=jnp.array([7]), **options)) == pytest.approx({7: 0.5, 8: 0.25})


def test_gold_chain_inside_a_token_is_conditional_on_the_consumed_bytes():
    gold = {"labels": jnp.array([9]), "gold_logprobs": jnp.log(jnp.array([0.07]))}
    # 0.7 of the row's listed 0.95 begins with 'a' and goes on, so the chain's 0.07 is 0.1 of it, times 0.95; token 1's
    # rest is target 5.
    conditional = {1: 4 / 7, 5: 2 / 7 - 0.1, 6: 1 / 7, 9: 0.1}
    assert row(inside(1, **gold)) == pytest.approx({image: 0.95 * p for image, p in conditional.items()})


def example(seed):
    """Random mapped rows of S sources, some of them not valid."""
    rng = np.random.default_rng(seed)
    ids = np.stack([[rng.permutation(V)[:K] for _ in range(S)] for _ in range(N)]).astype(np.int32)
    probs = rng.dirichlet(np.ones(K + 1), (N, S))[..., :K].astype(np.float32)
    valid = rng.random((N, S)) < 0.7
    ids, probs = np.where(valid[..., None], ids, -1), np.where(valid[..., None], probs, 0).astype(np.float32)
    labels = np.where(rng.random(N) < 0.1, -1, rng.integers(0, V, N)).astype(np.int32)
    return ids, probs, valid, rng.random((N, S)).astype(np.float32) * 5, labels


fuse = jax.jit(fusion.fuse, static_argnames=("kind", "temperature", "weights", "weighting", "fallback"))


def dense(ids, probs):
    out = np.zeros((*ids.shape[:-1], V))
    for index in np.ndindex(ids.shape):
        if ids[index] >= 0:
            out[(*index[:-1], ids[index])] += probs[index]
    return out


def dense_fuse(ids, probs, valid, ce, labels, kind, fallback, temperature=1.0, weights=None):
    """The definitions, row by row, over the whole vocabulary."""
    P = dense(ids, np.float64(probs))
    fused, share = np.zeros((N, V)), np.zeros((N, S))
    for n in range(N):
        gold = np.eye(V)[labels[n]] if labels[n] >= 0 else np.zeros(V)
        part = [s for s in range(S) if valid[n, s] or fallback == "gold"]
        if kind == "min_ce":
            raw = {s: float(s == min(part, key=lambda s: (ce[n, s], s))) for s in part}
        elif kind == "avg_ce":
            raw = {s: np.exp(-np.float64(ce[n, s]) / temperature) for s in part}
        else:
            raw = {s: weights[s] for s in part}
        for s in part:
            share[n, s] = raw[s] / sum(raw.values())
            fused[n] += share[n, s] * (P[n, s] if valid[n, s] else gold)
        if not part:
            fused[n] = gold
    return fused, share


VARIANTS = [("min_ce", 1.0, None), ("avg_ce", 1.0, None), ("avg_ce", 0.3, None), ("fixed", 1.0, (0.2, 0.3, 0.5))]


@pytest.mark.parametrize("fallback", ["gold", "skip"])
@pytest.mark.parametrize(("kind", "temperature", "weights"), VARIANTS)
@few
@given(seed=seeds)
def test_fuse_is_its_definition(kind, temperature, weights, fallback, seed):
    arrays = example(seed)
    got = fuse(*arrays, kind=kind, temperature=temperature, weights=weights, fallback=fallback)
    want, share = dense_fuse(*arrays, kind, fallback, temperature, weights)
    np.testing.assert_allclose(dense(np.asarray(got.ids), np.asarray(got.probs)), want, atol=1e-6)
    np.testing.assert_allclose(got.source_weights, share, atol=1e-6)
    nobody = ~np.any((share > 0) & arrays[2], -1)
    np.testing.assert_array_equal(got.fallback, nobody)


@few
@given(seed=seeds, variant=st.sampled_from(VARIANTS[:3]), fallback=st.sampled_from(["gold", "skip"]))
def test_permuting_sources_changes_nothing(seed, variant, fallback):
    ids, probs, valid, ce, labels = example(seed)
    order = np.random.default_rng(seed).permutation(S)
    options = {"kind": variant[0], "temperature": variant[1], "fallback": fallback}
    one = fuse(ids, probs, valid, ce, labels, **options)
    other = fuse(ids[:, order], probs[:, order], valid[:, order], ce[:, order], labels, **options)
    np.testing.assert_allclose(
        dense(np.asarray(one.ids), np.asarray(one.probs)),
        dense(np.asarray(other.ids), np.asarray(other.probs)),
        atol=1e-6,
    )
    np.testing.assert_allclose(one.source_weights[:, order], other.source_weights, atol=1e-6)


@few
@given(seed=seeds)
def test_a_source_of_weight_zero_changes_nothing(seed):
    ids, probs, valid, ce, labels = example(seed)
    three = fuse(ids, probs, valid, ce, labels, kind="fixed", weights=(0.25, 0.75, 0.0))
    two = fuse(ids[:, :2], probs[:, :2], valid[:, :2], ce[:, :2], labels, kind="fixed", weights=(0.25, 0.75))
    np.testing.assert_array_equal(three.ids[:, : 2 * K], two.ids)
    np.testing.assert_array_equal(three.probs[:, : 2 * K], two.probs)
    assert np.all(np.asarray(three.ids[:, 2 * K :]) == -1)


@pytest.mark.parametrize("S", [1, 2, 4, 5])
@pytest.mark.parametrize("kind", ["min_ce", "avg_ce"])
def test_any_number_of_sources_of_one_distribution_is_that_distribution(S, kind):
    ids, probs = np.tile([[[4, 2]]], (3, S, 1)), np.tile(np.float32([[[0.5, 0.25]]]), (3, S, 1))
    fused = fusion.fuse(ids, probs, np.ones((3, S), bool), np.ones((3, S)), np.zeros(3, np.int32), kind=kind)
    np.testing.assert_allclose(
        dense(np.asarray(fused.ids), np.asarray(fused.probs)), dense(ids[:, 0], probs[:, 0]), atol=1e-6
    )


def test_ties_and_missing_ce():
    ids, probs = jnp.array([[[1], [2], [3]]]), jnp.ones((1, 3, 1))

    def winner(ce, valid=(True, True, True), **options):
        fused = fusion.fuse(ids, probs, jnp.array([valid]), jnp.array([ce]), jnp.array([0]), **options)
        return int(fused.ids[0, 0])

    assert winner([2.0, 1.0, 1.0]) == 2  # of equal ones the first
    assert winner([jnp.nan, 9.0, jnp.inf]) == 2
    assert winner([jnp.nan, jnp.nan, jnp.inf]) == 1
    assert winner([1.0, 2.0, jnp.nan], valid=(False, False, True), fallback="skip") == 3
    assert winner([1.0, 2.0, 3.0], valid=(False, True, True)) == 0  # the winner's row is missing: the label
    assert winner([1.0, 2.0, 3.0], valid=(False, False, False), fallback="skip") == 0
    average = fusion.source_weights(
        jnp.array([[1.0, jnp.nan, jnp.inf]]), jnp.ones((1, 3), bool), kind="avg_ce", temperature=0.1
    )
    np.testing.assert_allclose(average, [[1, 0, 0]], atol=1e-6)


def test_published_weighting_is_nearly_uniform():
    weights = fusion.source_weights(jnp.array([2.0, 2.3, 2.6]), jnp.ones(3, bool), kind="avg_ce", weighting="reference")
    np.testing.assert_allclose(weights, [0.344, 0.332, 0.324], atol=5e-4)


def test_wrong_arguments_are_named():
    ids, probs, valid, ce, labels = example(0)
    with pytest.raises(ValueError, match="needs 3 weights"):
        fusion.fuse(ids, probs, valid, ce, labels, kind="fixed", weights=(1.0,))
    with pytest.raises(ValueError, match="'best'"):
        fusion.fuse(ids, probs, valid, ce, labels, kind="best")
    with pytest.raises(ValueError, match="source_labels"):
        mapped_row([0], [1.0], [1], consumed=jnp.array([1]))
    for options in ({"collisions": "add"}, {"tail": "cut"}):
        with pytest.raises(ValueError, match=r"^(collisions|tail): '\w+' should be \w+ or \w+$"):
            mapped_row([0], [1.0], [1], **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"fallback": "drop"}, "^fallback: 'drop' should be gold or skip$"),
    ({"weighting": "hard"}, "^weighting: 'hard' should be softmax or reference$"),
    ({"temperature": 0.0}, "^temperature: 0 should be a finite number, greater than 0$"),
    ({"weights": (1.0, 1.0, 1.0)}, "^weights: only used with kind 'fixed'"),
    ({"kind": "fixed", "weights": (np.nan, 1.0, 1.0)}, "^weights: each should be 0, or between .* got nan$"),
    ({"kind": "fixed", "weights": (0.0, 0.0, 0.0)}, "^weights: should not all be 0"),
    ({"mass": np.zeros((2, 3))}, r"^mass: shape \(2, 3\) should be"),
    ({"fallback_ids": np.zeros(99, np.int32)}, "^fallback_ids: shape"),
    ({"target_ce": np.zeros(99, np.float32)}, "^target_ce: shape"),
])  # fmt: skip
def test_wrong_options_of_fuse_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        fusion.fuse(*example(0), **options)


@given(seeds, st.sampled_from(["min_ce", "avg_ce"]), st.sampled_from(["gold", "skip"]))
@few
def test_sources_that_the_target_has_overtaken_count_as_not_valid(seed, kind, fallback):
    ids, probs, valid, ce, labels = example(seed)
    target_ce = np.random.default_rng(seed).random(N).astype(np.float32) * 5
    gated = fusion.fuse(ids, probs, valid, ce, labels, kind=kind, fallback=fallback, target_ce=target_ce)
    ahead = ce < target_ce[:, None]
    want = fusion.fuse(ids, probs, valid & ahead, ce, labels, kind=kind, fallback=fallback)
    for mine, theirs in zip(gated[:-1], want[:-1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(gated.gated, valid.any(-1) & ~(valid & ahead).any(-1))
    assert np.asarray(gated.fallback)[np.asarray(gated.gated)].all()
    if kind == "min_ce" and fallback == "skip":
        # The best source stays where it is ahead: nothing changes but for rows that the target predicts better.
        alike = (np.asarray(gated.source_weights) == fusion.fuse(
            ids, probs, valid, ce, labels, kind=kind, fallback=fallback).source_weights).all(-1)  # fmt: skip
        assert (alike | np.asarray(gated.gated)).all()
    never = fusion.fuse(ids, probs, valid, ce, labels, target_ce=np.full(N, np.inf, np.float32))
    assert not np.asarray(never.gated).any()


@pytest.mark.parametrize("at", range(5))
def test_fuse_refuses_rows_of_different_tokens(at):
    arrays = list(example(0))
    arrays[at] = arrays[at][1:]
    with pytest.raises(ValueError, match=r"^(ids|probs|valid|ce): shape \(.*\) should be \("):
        fusion.fuse(*arrays)


def test_traced_weights_are_not_checked():
    arrays = example(0)

    @jax.jit
    def run(weights, temperature):
        return fusion.fuse(*arrays, kind="fixed", weights=weights, temperature=temperature).source_weights

    np.testing.assert_allclose(run(jnp.array([0.0, 0.0, 2.0]), 0.0)[:, 2], 1.0)


@given(seeds, st.sampled_from(["document", "token", "block"]))
@few
def test_the_targets_ce_per_byte(seed, level):
    """The nats of the rows around over the bytes that they predict, in float64."""
    rng = np.random.default_rng(seed)
    ce, units = rng.random((2, 9)), rng.integers(0, 4, (2, 9))
    segments = np.sort(rng.integers(0, 4, (2, 9)), axis=1)[:, ::-1].copy()
    found = fusion.average_per_unit(jnp.float32(ce), jnp.asarray(units), jnp.asarray(segments), level, window=3)
    for b, t in itertools.product(range(2), range(9)):
        alike = segments[b] == segments[b, t] if level != "block" else segments[b] > 0
        if level == "token":
            alike &= np.abs(np.arange(9) - t) <= 1
        alike &= (segments[b] > 0) & (units[b] > 0)
        if segments[b, t]:
            want = ce[b, alike].sum() / units[b, alike].sum() if alike.any() else np.inf
            assert found[b, t] == pytest.approx(want, rel=1e-5)


def test_aligned_ce():
    ids, probs = jnp.array([[[3, 5], [5, -1]], [[3, 5], [5, 4]]]), jnp.array([[[0.5, 0.25], [1.0, 0.0]]] * 2)
    ce = fusion.aligned_ce(ids, probs, jnp.array([[True, True], [True, False]]), jnp.array([3, -1]), 100)
    np.testing.assert_allclose(ce[0], [-np.log(0.98 * 0.5 + 0.0002), -np.log(0.0002)], rtol=1e-6)
    assert np.all(np.isinf(ce[1]))


@pytest.mark.parametrize("level", ["document", "block", "token"])
def test_average_ce_by_hand(level):
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 5, 0, 0], [3] * 10])
    ce = rng.random((2, 10, 2)).astype(np.float32)
    ce[0, 1, 0] = np.inf
    ce[0, 7, 1] = np.nan
    got = np.asarray(fusion.average_ce(ce, segments, level, window=4))
    for b, t, s in np.ndindex(ce.shape):
        near = [
            ce[b, u, s]
            for u in range(10)
            if segments[b, u] > 0
            and segments[b, t] > 0
            and np.isfinite(ce[b, u, s])
            and (level == "block" or segments[b, u] == segments[b, t])
            and (level != "token" or -1 <= u - t <= 2)
        ]
        if segments[b, t] > 0:
            np.testing.assert_allclose(got[b, t, s], np.mean(near) if near else np.inf, rtol=1e-5)


def batch_example(seed=0, B=2, L=6):
    rng = np.random.default_rng(seed)
    tables = [
        fusion.TokenTable(rng.integers(-1, V, (VS, 2)).astype(np.int32), rng.integers(0, 2, (VS, 2)).astype(np.uint32))
        for _ in range(S)
    ]
    probs = -np.sort(-rng.dirichlet(np.ones(K + 1), (B, L, S))[..., :K], -1)
    ids = np.stack([rng.permutation(VS)[:K] for _ in range(B * L * S)]).reshape(B, L, S, K).astype(np.int32)
    return tables, {
        "source_ids": ids,
        "source_logprobs": np.log(probs).astype(np.float16),
        "source_valid": rng.random((B, L, S)) < 0.8,
        "labels": rng.integers(0, V, (B, L)).astype(np.int32),
        "source_consumed": rng.integers(0, 2, (B, L, S)).astype(np.int32),
        "source_labels": rng.integers(0, VS, (B, L, S)).astype(np.int32),
        "gold_logprobs": np.where(rng.random((B, L, S)) < 0.5, -np.inf, -rng.random((B, L, S))).astype(np.float32),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]] * B, np.int32),
    }


@pytest.mark.parametrize(("kind", "aligned"), [("min_ce", True), ("avg_ce", False)])
def test_fuse_sources_is_its_parts(kind, aligned):
    tables, batch = batch_example()
    ce = None if aligned else np.random.default_rng(1).random((2, 6, S)).astype(np.float32)
    fused = jax.jit(lambda batch, ce: fusion.fuse_sources(tables, **batch, source_ce=ce, vocab_size=V, kind=kind))(
        batch, ce
    )
    rows = [
        jax.jit(fusion.map_rows)(
            batch["source_ids"][:, :, s],
            batch["source_logprobs"][:, :, s],
            batch["source_valid"][:, :, s],
            tables[s],
            consumed=batch["source_consumed"][:, :, s],
            source_labels=batch["source_labels"][:, :, s],
            gold_logprobs=batch["gold_logprobs"][:, :, s],
            labels=batch["labels"],
        )
        for s in range(S)
    ]
    stacked = [jnp.stack([r[i] for r in rows], 2) for i in range(4)]
    if aligned:
        ce = fusion.aligned_ce(*stacked[:3], batch["labels"], V)
        ce = fusion.average_ce(ce, batch["segment_ids"], "document")
    want = fusion.fuse(*stacked[:3], ce, batch["labels"], kind=kind, mass=stacked[3])
    for mine, theirs in zip(fused, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    assert np.all(np.asarray(fused.probs).sum(-1) <= 1 + 1e-5)


def test_fusion_sums():
    fused = fusion.FusedRows(
        ids=jnp.zeros((3, 1), jnp.int32),
        probs=jnp.ones((3, 1)),
        source_weights=jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        fallback=jnp.array([False, True, False]),
        mass=jnp.array([0.5, 0.0, 0.25]),
        gated=jnp.array([False, True, True]),
    )
    sums = fusion.fusion_sums(fused, jnp.array([True, True, False]))
    assert sums.won.tolist() == [1, 0]
    assert (float(sums.fallback), float(sums.gated), float(sums.mass), float(sums.count)) == (1, 1, 0.5, 2)


@pytest.mark.parametrize("kind", ["min_ce", "avg_ce"])
def test_the_published_arithmetic(kind):
    """FuseLLM as its code computes it, dense: softmax over the kept logits, the first of two colliding logits, CE per
    packed block in bfloat16, softmax(exp(−CE)), one-hot of token t (not t+1) on fallback rows, unshifted mask."""
    rng = np.random.default_rng(7)
    B, L, D, λ = 2, 5, 6, 0.9
    tokens = rng.integers(0, V, (B, L)).astype(np.int32)
    attention = np.array([[1] * L, [1] * (L - 1) + [0]], np.float32)
    labels = np.where(attention > 0, tokens, -1)
    labels = np.concatenate([labels[:, 1:], np.full((B, 1), -1)], 1).astype(np.int32)
    logits = -np.sort(-rng.normal(size=(B, L, S, K)).astype(np.float32) * 3, -1)
    ids = rng.integers(0, VS, (B, L, S, K)).astype(np.int32)
    images = rng.integers(0, V, (S, VS)).astype(np.int32)
    valid = rng.random((B, L, S)) < 0.7
    block_ce = np.float32(jnp.asarray([[2.0, 2.003, 2.5], [3.0, 2.5, 2.498]], jnp.bfloat16))  # with ties
    hidden, unembedding = rng.normal(size=(B, L, D)), rng.normal(size=(D, V))

    target_BLV = np.zeros((B, L, V))
    for b, t in np.ndindex(B, L):
        rows = []
        for s in range(S):
            kept = {}
            for i, z in zip(images[s][ids[b, t, s]], np.float64(logits[b, t, s]), strict=True):
                kept.setdefault(i, z)
            P = np.zeros(V)
            P[list(kept)] = np.exp(list(kept.values()))
            rows.append(P / P.sum() if valid[b, t, s] else np.eye(V)[tokens[b, t]])
        reward = np.exp(-np.float64(block_ce[b]))
        w = np.eye(S)[np.argmin(block_ce[b])] if kind == "min_ce" else np.exp(reward) / np.exp(reward).sum()
        target_BLV[b, t] = w @ np.stack(rows)
    log_q = np.log(jax.nn.softmax(hidden @ unembedding))
    clm = -np.mean([log_q[b, t, labels[b, t]] for b, t in np.ndindex(B, L) if labels[b, t] >= 0])
    fusion_loss = np.sum(attention * -np.sum(target_BLV * log_q, -1)) / attention.sum()

    tables = [fusion.TokenTable(images[s][:, None], np.zeros((VS, 1), np.uint32)) for s in range(S)]
    log_kept = jax.nn.log_softmax(logits, -1)  # of the kept ones: log-probabilities up to a constant of the row
    fused = fusion.fuse_sources(
        tables,
        ids,
        log_kept,
        valid,
        labels,
        source_ce=jnp.broadcast_to(block_ce[:, None], (B, L, S)),
        collisions="first",
        tail="renormalize",
        kind=kind,
        weighting="reference",
        fallback_ids=jnp.asarray(tokens),
    )
    count = np.sum(labels >= 0)
    sums = loss.fusion_loss(
        jnp.float32(hidden),
        jnp.float32(unembedding),
        labels,
        fused.ids,
        fused.probs,
        weight_clm=λ,
        tail="renormalize",
        fusion_mask=attention * (count / attention.sum()),  # the published code takes each term's own mean
    )
    np.testing.assert_allclose(sums.total / sums.count, λ * clm + (1 - λ) * fusion_loss, rtol=1e-5)


@few
@given(seed=seeds)
def test_a_source_that_never_wins_changes_nothing(seed):
    ids, probs, valid, ce, labels = example(seed)
    worst = np.concatenate([ce, np.full((N, 1), 9, np.float32)], -1)
    more = [np.concatenate([a, a[:, :1]], 1) for a in (ids, probs, valid)]
    with_it, without = fuse(*more, worst, labels), fuse(ids, probs, valid, ce, labels)
    for got, want in zip(with_it[:2], without[:2], strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(with_it.source_weights[:, :S], without.source_weights)
    np.testing.assert_array_equal(with_it.fallback, without.fallback)


@pytest.mark.parametrize("module", ["fusejax.fusion.mapping", "fusejax.fusion.combining", "fusejax.loss"])
def test_examples_of_the_docstrings(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
