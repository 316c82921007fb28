import numpy as np
import pytest

from fusejax import alignment, cli, config, importing, sources
from fusejax.batches import Batches
from fusejax.errors import UserError
from fusejax.source_cache import SourceCache
from fusejax.store import Store
from fusejax.tokenizers import Tokenizer

datasets = pytest.importorskip("datasets")
PLAIN = {"alignment": {"gold_chain": False}, "cache": {"top_k": 5, "values": "float32"}}
K, LENGTH = 7, 80


@pytest.fixture
def saved(make_job, tiny_models, tmp_path):
    """(the fine source's cache made by us, a folder with the same rows as FuseLLM saves them, shuffled and padded)."""
    job = make_job("ours", cache={"top_k": K, "values": "float32"})
    sources.run(job)
    tokenizer = Tokenizer.load(tiny_models["fine"])
    cache, tokens = (
        SourceCache(job.folder / "sources/fine"),
        Store(job.folder / "data/train/tokens" / tokenizer.fingerprint),
    )
    rng, rows = np.random.default_rng(0), []
    for i in rng.permutation(len(cache)).tolist():
        ids, n = tokens[i]["ids"].tolist(), len(tokens[i]["ids"])
        logits, indices = np.zeros((LENGTH, K)), np.zeros((LENGTH, K), int)
        logits[:n], indices[:n] = cache[i]["logprobs"] + rng.normal(size=(n, 1)), cache[i]["ids"]
        text = [*ids, tokenizer.eos_id]
        pad = LENGTH - len(text)
        rows.append(
            {
                "input_ids": text + [tokenizer.eos_id] * pad,
                "attention_mask": [1] * len(text) + [0] * pad,
                "per_step_logits": logits.tolist(),
                "per_step_indices": indices.tolist(),
                "metric_ce": float(cache[i]["ce"].mean()),
            }
        )
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return cache, str(folder)


def test_rows_come_over(saved, make_job, tmp_path, capsys):
    ours, folder = saved
    job = make_job("theirs", **PLAIN)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(job))
    cli.main(["import", folder, str(path), "--source", "fine"])
    cache = SourceCache(job.folder / "sources/fine")
    assert cache.summary["imported"] == folder
    for i in range(len(ours)):
        np.testing.assert_array_equal(cache[i]["ids"], ours[i]["ids"][:, :5])
        kept = np.exp(ours[i]["logprobs"][:, :5])
        np.testing.assert_allclose(np.exp(cache[i]["logprobs"]), kept / kept.sum(-1, keepdims=True), rtol=1e-4)
        np.testing.assert_allclose(cache[i]["ce"], ours[i]["ce"].mean(), rtol=1e-5)
    capsys.readouterr()
    sources.run(job)
    assert "source fine: done before, skipped" in capsys.readouterr().out
    alignment.run(job)
    assert Batches(job).batch(0)["source_valid"].any()


@pytest.mark.parametrize("changes", [{"alignment": {}}, {"fusion": {"level": "token"}}])
def test_what_an_import_does_not_hold_is_refused(saved, make_job, changes):
    with pytest.raises(UserError, match="needs each token's cross-entropy"):
        importing.run(saved[1], make_job("theirs", **PLAIN | changes), "fine")
    job = make_job("theirs", **PLAIN)
    importing.run(saved[1], job, "fine")
    sources.run(job)
    alignment.run(job)
    changed = make_job("theirs", **PLAIN | changes)
    for use in (alignment.run, Batches) if changed.alignment.gold_chain else (Batches,):
        with pytest.raises(UserError, match="was imported and has one cross-entropy a document"):
            use(changed)


def test_other_text_is_named(saved, make_job):
    job = make_job("theirs", texts={"prose": ["The cat sat on the mat.", "Nobody has seen this."]}, **PLAIN)
    with pytest.raises(UserError, match=r"\d of 2 documents are not in it by their tokens, the first being document"):
        importing.run(saved[1], job, "fine")
    assert not (job.folder / "sources/fine").exists()


def test_imported_rows_and_the_sources_own_do_not_mix(saved, make_job, monkeypatch):
    for module in (sources, importing):
        monkeypatch.setattr(module, "shard_records", lambda tokens, max_length: 3)
    for first, second, message in (
        (lambda job: importing.run(saved[1], job, "fine"), sources.run, "holds a part of an import"),
        (sources.run, lambda job: importing.run(saved[1], job, "fine"), "holds a part of the source's own rows"),
    ):
        job = make_job(message.replace(" ", "-"), **PLAIN)
        first(job)
        shard = job.folder / "sources/fine/000001.array_record"
        shard.unlink()
        with pytest.raises(UserError, match=message):
            second(job)
        assert not shard.exists()
        first(job)
        assert shard.exists()


def test_no_such_data_set(saved, make_job, tmp_path):
    job = make_job("theirs", **PLAIN)
    with pytest.raises(UserError, match="is not a folder that datasets' save_to_disk wrote"):
        importing.run(str(tmp_path), job, "fine")
    with pytest.raises(UserError, match="no source of this name; it has coarse, fine"):
        importing.run(saved[1], job, "other")
    datasets.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(str(tmp_path / "poor"))
    with pytest.raises(UserError, match="lacks the column attention_mask; it has input_ids"):
        importing.run(str(tmp_path / "poor"), job, "fine")
    with pytest.raises(UserError, match=r"cache.top_k 9 needs as many rows as tokens, of at least 9 entries"):
        importing.run(saved[1], make_job("nine", **PLAIN | {"cache": {"top_k": 9}}), "fine")
