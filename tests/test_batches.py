import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from conftest import MAX_LENGTH, TEXTS

from fusejax import alignment, aot, models, sharding, sources
from fusejax.batches import Batches, token_counts, token_tables
from fusejax.errors import UserError
from fusejax.store import Store
from fusejax.tokenizers import Tokenizer
from fusejax.training import run_inputs

ALL_TEXTS = list(itertools.chain(*TEXTS.values()))


@pytest.fixture
def make_ready(make_job, tmp_path_factory):
    """`make_job`, with sources and alignment done."""

    def make(*arguments, **changes):
        job = make_job(*arguments, **changes)
        sources.run(job)
        alignment.run(job)
        return job

    return make


def spans(batches, step):
    """(sequence, first position, positions, document) of every document in a batch."""
    for b, documents in enumerate(batches.documents(step)):
        at = 0
        for document in documents.tolist():
            n = int(batches._lengths[document])
            yield b, at, n, document
            at += n


def test_sequences_hold_whole_documents_that_do_not_see_each_other(make_job, tiny_models):
    job = make_job(sources=[])
    batches, tokenizer = Batches(job), Tokenizer.load(tiny_models["coarse"])
    seen = []
    for step in range(len(batches)):
        batch = batches.batch(step)
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            name: ((2, MAX_LENGTH), np.int32) for name in ("ids", "segment_ids", "positions", "labels")
        }
        used = np.zeros((2, MAX_LENGTH), bool)
        for b, at, n, document in spans(batches, step):
            expected = [*tokenizer.encode(ALL_TEXTS[document])[0], tokenizer.eos_id]
            span = slice(at, at + n)
            assert batch["ids"][b, span].tolist() == expected
            assert batch["labels"][b, span].tolist() == [*expected[1:], -1]
            assert batch["positions"][b, span].tolist() == list(range(n))
            assert len(set(batch["segment_ids"][b, span].tolist())) == 1
            used[b, span] = True
            seen.append(document)
        np.testing.assert_array_equal(batch["segment_ids"] > 0, used)
        assert (batch["labels"][~used] == -1).all()
        for line in batch["segment_ids"]:
            assert (np.diff(line[line > 0]) >= 0).all()
            assert set(line[line > 0].tolist()) == set(range(1, line.max() + 1))
    assert sorted(seen) == sorted([*range(len(ALL_TEXTS))] * 2)  # two epochs


def test_a_target_with_bos_gets_it(make_ready, tiny_models):
    job = make_ready(target=tiny_models["fine"])
    batches, tokenizer = Batches(job), Tokenizer.load(tiny_models["fine"])
    batch = batches.batch(0)
    for b, at, n, document in spans(batches, 0):
        text = tokenizer.encode(ALL_TEXTS[document])[0].tolist()
        assert batch["ids"][b, at : at + n].tolist() == [tokenizer.bos_id, *text, tokenizer.eos_id]
        assert batch["labels"][b, at : at + n].tolist() == [*text, tokenizer.eos_id, -1]
        assert not batch["source_valid"][b, at].any()  # no source has a row for BOS
        assert batch["source_valid"][b, at + 1 : at + n - 1, 1].all()  # the target is the second source


@pytest.mark.parametrize(("target", "rows"), [("coarse", "exact"), ("fine", "inside")])
def test_source_rows_stand_beside_the_tokens_they_predict(make_ready, tiny_models, target, rows):
    job = make_ready(target=tiny_models[target], alignment={"rows": rows})
    batches, names = Batches(job), ["coarse", "fine"]
    tokenizers = [Tokenizer.load(tiny_models[name]) for name in names]
    front, itself = int(target == "fine"), names.index(target)
    caches, row_maps = ([Store(job.folder / stage / name) for name in names] for stage in ("sources", "alignment"))
    consumed = 0
    for step in range(len(batches)):
        batch = batches.batch(step)
        assert batch["source_ids"].shape == batch["source_logprobs"].shape == (2, MAX_LENGTH, 2, 5)
        for name in ("source_valid", "source_consumed", "source_labels", "source_ce", "gold_logprobs"):
            assert batch[name].shape == (2, MAX_LENGTH, 2), name
        filled = np.zeros((2, MAX_LENGTH, 2), bool)
        for (b, at, n, document), s in itertools.product(spans(batches, step), range(2)):
            labels = [*tokenizers[s].encode(ALL_TEXTS[document])[0][1:], tokenizers[s].eos_id]
            row_map = row_maps[s][document]["row_map"]
            assert len(row_map) == n - front - 1
            for t, (row, eaten) in enumerate(row_map.tolist()):
                place = (b, at + front + t, s)
                assert batch["source_valid"][place] == (row >= 0)
                if row < 0:
                    continue
                filled[place] = True
                consumed += eaten
                np.testing.assert_array_equal(batch["source_ids"][place], caches[s][document]["ids"][row])
                stored = caches[s][document]["logprobs"][row].astype(np.float32)
                np.testing.assert_array_equal(batch["source_logprobs"][place], stored)
                assert batch["source_consumed"][place] == eaten
                assert batch["source_labels"][place] == labels[row]
        np.testing.assert_array_equal(batch["source_valid"], filled)
        assert (batch["source_ids"][~filled] == -1).all()
        assert (batch["source_labels"][~filled] == -1).all()
        # Where the target is its own source, its rows predict its own labels.
        own = filled[..., itself]
        np.testing.assert_array_equal(batch["source_labels"][..., itself][own], batch["labels"][own])
    assert (consumed > 0) == (rows == "inside")


@pytest.mark.parametrize("target", ["coarse", "fine"])
def test_bytes_of_the_labels_are_those_that_sources_are_measured_on(make_ready, tiny_models, target):
    job = make_ready(target=tiny_models[target], fusion={"gate": "target"})
    batches, tokenizer = Batches(job), Tokenizer.load(tiny_models[target])
    front = int(target == "fine")
    for step in range(len(batches)):
        batch = batches.batch(step)
        for b, at, n, document in spans(batches, step):
            boundaries = tokenizer.encode(ALL_TEXTS[document])[1]
            bytes_ = batch["label_bytes"][b, at : at + n]
            assert bytes_.sum() == boundaries[-1] - boundaries[0]
            assert bytes_.tolist() == [0] * front + np.diff(boundaries).tolist() + [0] * (
                n - front - len(boundaries) + 1
            )
        assert (batch["label_bytes"][batch["segment_ids"] == 0] == 0).all()
    assert "label_bytes" not in Batches(
        make_ready(output="aligned", fusion={"gate": "target", "ce_unit": "aligned"})
    ).batch(0)


@pytest.mark.parametrize(
    ("unit", "gate", "chain"), [("byte", None, True), ("byte", "target", False), ("aligned", "target", True)]
)
def test_programs_are_compiled_ahead_of_time_for_these_arrays(make_ready, unit, gate, chain):
    job = make_ready(fusion={"gate": gate, "ce_unit": unit}, alignment={"gold_chain": chain})
    declared = aot.abstract_batch(job, len(job.sources), sharding.make_mesh(job.mesh))
    made = Batches(job).batch(0)
    assert {name: (array.shape, array.dtype) for name, array in made.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in declared.items()
    }


def test_gold_chain_can_be_left_out_and_tables_match_the_sources(make_ready):
    job = make_ready(alignment={"gold_chain": False})
    assert "gold_logprobs" not in Batches(job).batch(0)
    tables = token_tables(job)
    assert [len(table.ids) for table in tables] == [330, 280]
    assert "source_ids" not in Batches(job, with_sources=False).batch(0)


def test_tokens_that_the_target_has_no_row_for_are_none(make_ready, monkeypatch):
    job = make_ready()
    values, target = models.read_config(job.target.model)
    fewer = dataclasses.replace(target, vocab_size=300)
    monkeypatch.setattr(models, "read_config", lambda *_: (values, fewer))
    before = alignment.load_token_table(job.folder / "alignment" / job.sources[0].label)
    assert before.ids.max() >= 300
    np.testing.assert_array_equal(token_tables(job)[0].ids, np.where(before.ids < 300, before.ids, -1))


def test_gold_of_a_whole_token_is_its_own_probability(make_ready):
    """The first source is the target itself: its gold is its probability of the true token."""
    job = make_ready(cache={"top_k": 5, "values": "float32"})
    batches = Batches(job)
    batch = batches.batch(0)
    cache = Store(job.folder / "sources/coarse")
    for b, at, n, document in spans(batches, 0):
        gold = batch["gold_logprobs"][b, at : at + n - 2, 0]
        np.testing.assert_allclose(gold, -cache[document]["ce"][:-1], atol=1e-5)


def test_any_step_at_once(make_ready):
    job = make_ready()
    straight = dict(Batches(job).iterate())
    assert list(straight) == list(range(Batches(job).steps_total))
    for step in reversed(list(straight)):
        alone = Batches(job).batch(step)
        for name in alone:
            np.testing.assert_array_equal(alone[name], straight[step][name])
    part = Batches(job).batch(1, rows=range(1, 2))
    np.testing.assert_array_equal(part["source_logprobs"][0], straight[1]["source_logprobs"][1])
    late = dict(Batches(job).iterate(2))
    assert list(late) == list(straight)[2:]


@pytest.mark.parametrize("packed", [True, False])
def test_the_same_documents_on_any_number_of_processes(make_job, packed):
    """Each process makes its own rows; also of a run that goes on from a step, on another number of them."""
    job = make_job(sources=[], batch={"sequences": 4, "steps": 5, "packed": packed})
    straight = dict(Batches(job).iterate())
    for start, processes in ((0, 2), (2, 4), (3, 1)):
        shares = [range(i * 4 // processes, (i + 1) * 4 // processes) for i in range(processes)]
        parts = [dict(Batches(job).iterate(start, rows=share)) for share in shares]
        assert all(list(part) == list(range(start, 5)) for part in parts)
        for step in range(start, 5):
            for name, array in straight[step].items():
                np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), array)


def test_with_and_without_sources_the_documents_are_the_same(make_ready):
    job = make_ready()
    for (_, fused), (_, plain) in zip(Batches(job).iterate(), Batches(job, with_sources=False).iterate(), strict=True):
        for name in plain:
            np.testing.assert_array_equal(fused[name], plain[name])


def test_steps_go_on_through_as_many_epochs_as_they_need(make_job):
    job = make_job(sources=[], batch={"sequences": 3, "epochs": 1, "steps": 9})
    batches = Batches(job)
    assert batches.steps_total == len(list(batches.iterate())) == 9
    documents = np.concatenate([d for step in range(9) for d in batches.documents(step)])
    n = len(ALL_TEXTS)
    assert len(documents) > 2 * n
    assert sorted(documents[:n].tolist()) == sorted(documents[n : 2 * n].tolist()) == list(range(n))
    assert documents[:n].tolist() != documents[n : 2 * n].tolist()
    with pytest.raises(IndexError):
        batches.batch(9)


def test_the_last_batch_is_filled_with_empty_sequences(make_job):
    job = make_job(sources=[], batch={"sequences": 64, "epochs": 1})
    batch = Batches(job).batch(0)
    assert len(Batches(job)) == 1
    empty = (batch["segment_ids"] == 0).all(axis=1)
    assert 0 < empty.sum() < 64
    assert (batch["labels"][empty] == -1).all()


def test_an_error_in_the_background_reaches_the_caller(make_ready):
    job = make_ready()
    batches = Batches(job)
    for path in (job.folder / "sources/fine").glob("*.array_record"):
        path.unlink()
    with pytest.raises(UserError, match="sources/fine"):
        list(batches.iterate())


def test_what_was_made_from_something_else_is_named(make_ready, make_job):
    make_ready()
    with pytest.raises(UserError, match=r"sources/coarse: was made with other settings: top_k \(5 there, 7 now\)"):
        Batches(make_job(cache={"top_k": 7}))
    job = make_job()
    shutil.rmtree(job.folder / "data")
    with pytest.raises(UserError, match="other settings: text"):
        Batches(make_job(texts={"prose": TEXTS["prose"][:2]}))
    shutil.rmtree(job.folder / "alignment")
    with pytest.raises(UserError, match="alignment/coarse"):
        shutil.rmtree(job.folder / "data")
        Batches(make_job())


def test_a_cache_of_more_entries_serves_as_the_one_of_fewer(make_ready):
    """Sources, chains, batches and what a run is known by: all as if the cache had been made with fewer entries."""
    for values in ("float16", "uint8"):
        few = make_ready(f"few-{values}", cache={"top_k": 2, "values": values})
        more = make_ready(f"more-{values}", cache={"top_k": 5, "values": values})
        maps = [Store(job.folder / "alignment/fine/chain").inputs for job in (few, more)]
        assert maps[0] != maps[1]
        shard = next((more.folder / "sources/fine").glob("*.array_record"))
        before = shard.stat().st_mtime_ns
        again = make_ready(f"more-{values}", cache={"top_k": 2, "values": values})
        assert shard.stat().st_mtime_ns == before
        for one, other in zip(Batches(few).iterate(), Batches(again).iterate(), strict=True):
            assert one[0] == other[0]
            assert one[1]["source_ids"].shape[-1] == 2
            for name, array in one[1].items():
                np.testing.assert_array_equal(array, other[1][name])
        assert run_inputs(again, "fused") == run_inputs(few, "fused") != run_inputs(more, "fused")
        reports = [alignment.read_report(job.folder, "fine") for job in (few, again)]
        assert reports[0] == reports[1]


def test_token_counts_are_kept(make_job, monkeypatch):
    job = make_job()
    folder = next((job.folder / "data/train/tokens").iterdir())
    counts = token_counts(Store(folder))
    assert counts.tolist() == [len(record["ids"]) for record in Store(folder)]
    monkeypatch.setattr(Store, "__getitem__", lambda *_: pytest.fail("read the store again"))
    np.testing.assert_array_equal(token_counts(Store(folder)), counts)


def test_bos_is_left_out_where_the_configuration_says_so(make_job, tiny_models):
    from fusejax import tokenizers

    fine = {"model": tiny_models["fine"], "bos": "never"}
    with_bos, without = tokenizers.Tokenizer.load(tiny_models["fine"]), tokenizers.Tokenizer.load(**fine)
    assert with_bos.adds_bos
    assert not without.adds_bos
    assert with_bos.fingerprint != without.fingerprint


def test_sources_of_different_widths(make_ready, make_job):
    """A narrower source's rows are padded with empty entries."""
    wide = make_ready(cache={"top_k": 5})
    models = [source.model_dump() for source in wide.sources]
    models[1]["top_k"] = 2
    mixed = make_job("mixed", sources=models, cache={"top_k": 5})
    for stage in (sources.run, alignment.run):
        stage(mixed)
    assert Store(mixed.folder / "sources/fine")[0]["ids"].shape[1] == 2
    for (_, a), (_, b) in zip(Batches(wide).iterate(), Batches(mixed).iterate(), strict=True):
        np.testing.assert_array_equal(a["source_ids"][..., 0, :], b["source_ids"][..., 0, :])
        np.testing.assert_array_equal(a["source_ids"][..., 1, :2], b["source_ids"][..., 1, :2])
        np.testing.assert_array_equal(a["source_logprobs"][..., 1, :2], b["source_logprobs"][..., 1, :2])
        assert (b["source_ids"][..., 1, 2:] == -1).all()
