"""Pairwise fusion: each source into a copy of the target, then the copies into one."""

import json

import numpy as np
import pytest
import yaml

from fusejax import alignment, config, evaluation, export, models, report, sources, training
from fusejax.errors import UserError
from fusejax.models import files


@pytest.fixture
def third(tiny_models, tmp_path):
    """A source of the target's architecture with other weights."""
    folder = tmp_path / "third"
    hf_config, decoder_config = models.read_config(tiny_models["coarse"])
    export.save(models.init(decoder_config, 7), hf_config, folder, tokenizer_from=tiny_models["coarse"])
    return str(folder)


def run(job):
    sources.run(job)
    alignment.run(job)
    training.run(job)
    training.export(job)
    evaluation.run(job)
    report.run(job)


def weights(folder):
    return {
        name: np.asarray(t.read(), np.float64) for name, t in files.tensors(files.local_folder(str(folder))).items()
    }


def sce(base, copies):
    """FuseChat's SCE with everything selected, restated for one tensor: weighted mean over elements of one sign."""
    deltas = np.stack([copy - base for copy in copies])
    squares = (deltas**2).reshape(len(deltas), -1).sum(1)
    shares = squares / squares.sum() if squares.sum() else np.full(len(deltas), 1 / len(deltas))
    sign = np.where(deltas.sum(0) >= 0, 1, -1)
    kept = np.sign(deltas) == sign
    spread = shares.reshape(-1, *[1] * base.ndim) * kept
    total = spread.sum(0)
    return base + (deltas * spread).sum(0) / np.where(total == 0, 1, total)


def test_copies_are_made_and_merged(make_job, tiny_models, third, capsys):
    target, fine = tiny_models["coarse"], tiny_models["fine"]
    job = make_job(
        sources=[target, fine, {"model": third, "name": "third"}],
        fusion={"kind": "pairwise", "merge": "sce"}, loss={"weight_clm": 0.3}, batch={"sequences": 2, "epochs": 1},
        optimizer={"learning_rate": 3e-3},
    )  # fmt: skip
    assert training.runs(job) == ["pair/fine", "pair/third", "clm"]
    run(job)
    folders = [job.folder / "pairs" / name / "export" for name in ("fine", "third")]
    base, fused, *copies = (weights(folder) for folder in (target, job.folder / "export", *folders))
    for name, tensor in fused.items():
        np.testing.assert_allclose(tensor, sce(base[name], [copy[name] for copy in copies]), atol=2e-6)
    assert any(np.abs(copies[0][name] - copies[1][name]).max() > 1e-4 for name in base)

    found = json.loads((job.folder / "report.json").read_text())
    assert list(found["evaluation"]["bits_per_byte"]) == [
        "target", "coarse", "fine", "third", "clm", "pair/fine", "pair/third", "fused",
    ]  # fmt: skip
    for name in ("fine", "third"):  # the target takes part in each pair
        assert sorted(found["training"][f"pair/{name}"]["rows_won"]) == sorted(["coarse", name])
    assert "copy with fine" in capsys.readouterr().out

    # Again: nothing is done twice; another method merges anew and trains nothing.
    run(job)
    out = capsys.readouterr().out
    for line in ("train pair/fine: done before", "export pair/third: done before", "export: done before, skipped"):
        assert line in out
    linear = config.validate(job.model_dump(mode="json") | {"fusion": {"kind": "pairwise", "merge": "linear"}})
    training.run(linear)
    training.export(linear)
    assert "train pair/fine: done before" in capsys.readouterr().out
    for name, tensor in weights(job.folder / "export").items():
        np.testing.assert_allclose(tensor, (copies[0][name] + copies[1][name]) / 2, atol=1e-6)


def test_a_copy_is_a_job_of_its_source(make_job, tiny_models, third):
    """A pair trains what a job with that source alone trains, to the last bit."""
    fine = tiny_models["fine"]
    same = {"batch": {"sequences": 2, "epochs": 1}, "evaluation": {"clm": False}}
    alone = make_job("alone", sources=[fine], fusion={"kind": "min_ce"}, **same)
    pairs = make_job("pairs", sources=[fine, third], fusion={"kind": "pairwise", "merge": "sce"}, **same)
    for job in (alone, pairs):
        sources.run(job)
        alignment.run(job)
    training.train(alone, "fused")
    training.train(pairs, "pair/fine")
    training.export_run(alone, "fused")
    training.export_run(pairs, "pair/fine")
    ours, theirs = weights(pairs.folder / "pairs/fine/export"), weights(alone.folder / "export")
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


METHODS = [
    "linear", "slerp", "task_arithmetic", {"method": "ties", "density": 0.5}, {"method": "dare_ties", "density": 0.5},
    {"method": "sce", "top": 0.1, "select": "weigh"},
    {"method": "greedy_soup", "corpus": {"path": "choose.jsonl"}},
]  # fmt: skip


@pytest.mark.parametrize("merge", METHODS, ids=str)
def test_every_method_makes_a_valid_merge(tiny_models, third, tmp_path, merge):
    """Also after its configuration was written down, with every key."""
    values = {
        "target": tiny_models["coarse"], "sources": [tiny_models["fine"], third], "corpus": {"path": "x.jsonl"},
        "output": str(tmp_path / "job"), "fusion": {"kind": "pairwise", "merge": merge},
    }  # fmt: skip
    job = config.validate(values)
    assert config.validate(yaml.safe_load(config.dump(job))) == job
    merged = training.pair_merge(job)
    assert [model.model for model in merged.models] == [
        str(tmp_path / "job/pairs" / name / "export") for name in ("fine", "third")
    ]
    assert (merged.base is not None) == (merged.method not in ("linear", "slerp", "greedy_soup"))
    assert {model.density for model in merged.models} == {0.5 if merged.method in ("ties", "dare_ties") else 1.0}


@pytest.mark.parametrize(("changes", "message"), [
    ({"fusion": {"kind": "pairwise"}}, "fusion.merge: kind 'pairwise' needs a method"),
    ({"fusion": {"merge": "sce"}}, "fusion.merge: only used with fusion.kind 'pairwise'"),
    ({"fusion": {"kind": "pairwise", "merge": "sec"}}, "fusion.merge.method: .*'sce'.*sec"),
    ({"fusion": {"kind": "pairwise", "merge": {"method": "linear", "top": 0.5}}}, "top: not used by method 'linear'"),
    ({"fusion": {"kind": "pairwise", "merge": {"method": "sce", "density": 0.5}}}, "density: not used by method 'sce'"),
    ({"fusion": {"kind": "pairwise", "merge": "greedy_soup"}}, "corpus: method 'greedy_soup' needs"),
    ({"fusion": {"kind": "pairwise", "merge": "sce"}, "sources": ["a", "b"]}, "two or more sources .* here are 1"),
    ({"fusion": {"kind": "pairwise", "merge": "slerp"}, "sources": ["b", "c", "d"]}, "needs two sources .* are 3"),
    ({"fusion": {"kind": "pairwise", "merge": "sce"}, "compat": "fusellm"}, "knows no fusion.kind 'pairwise'"),
])  # fmt: skip
def test_mistakes_are_one_clear_line(changes, message):
    values = {"target": "a", "sources": ["a", "b", "c"], "corpus": {"path": "x"}, "output": "o"} | changes
    with pytest.raises(UserError, match=message):
        config.validate(values)
