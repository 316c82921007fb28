"""Jobs with everything that fusion is compared with."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import TEXTS

from fusejax import alignment, config, corpus, evaluation, export, models, report, sources, training
from fusejax.errors import UserError
from fusejax.evaluation import baselines
from fusejax.models import files


def write(path, texts):
    lines = [{"text": text, "domain": domain} for domain, group in texts.items() for text in group]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run_job(tiny_models, tmp_path):
    def run(sources_, names, clm=True):
        values = {
            "target": tiny_models["coarse"],
            "sources": sources_,
            "corpus": {"path": write(tmp_path / "train.jsonl", TEXTS), "domain_key": "domain"},
            "max_length": 64,
            "cache": {"top_k": 5, "batch_tokens": 256},
            "loss": {"weight_clm": 0.5},
            "optimizer": {"learning_rate": 3e-3},
            "batch": {"sequences": 2, "epochs": 1},
            "precision": {"compute": "float32"},
            "evaluation": {
                "corpus": {"path": write(tmp_path / "heldout.jsonl", {"prose": ["A cat and a dog sat on the mat."]})},
                "baselines": names,
                "clm": clm,
            },
            "output": str(tmp_path / "job"),
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(values))
        job = config.load(path)
        corpus.prepare(job)
        for stage in (sources, alignment, training):
            stage.run(job)
        training.export(job)
        baselines.run(job)
        evaluation.run(job)
        return job

    return run


@pytest.mark.slow
def test_every_baseline_is_a_row(run_job, tiny_models, capsys):
    names = ["distill", "exact", "avg_ce", "fusellm", "merge", "ensemble"]
    job = run_job([tiny_models["coarse"], tiny_models["fine"]], names)
    out = capsys.readouterr().out
    assert "baseline distill: from fine" in out
    assert "baseline merge: left out: " in out
    assert "only models of one architecture can be merged" in out
    report.run(job)
    found = json.loads((job.folder / "report.json").read_text())["evaluation"]["bits_per_byte"]
    trained = ["distill", "exact", "avg_ce", "fusellm"]
    assert list(found) == ["target", "coarse", "fine", "clm", *trained, "ensemble", "fused"]
    # Each was trained, each to something else.
    assert len({values["average"] for name, values in found.items() if name not in ("target", "coarse")}) == 8
    for name in trained:
        assert found[name]["average"] < found["target"]["average"]
    out = capsys.readouterr().out
    assert "exact-match alignment" in out
    # Where the alignment is the same it is shared, else it is the baseline's own.
    folder = job.folder / "baselines"
    assert (folder / "avg_ce/alignment").is_symlink()
    assert not (folder / "exact/alignment").is_symlink()
    assert list((folder / "distill/data/train").iterdir())
    baselines.run(job)
    evaluation.run(job)
    assert capsys.readouterr().out.count("done before, skipped") >= 3 * len(trained)
    # The output can be moved as a whole.
    moved = shutil.move(job.folder, job.folder.with_name("moved"))
    baselines.run(job.model_copy(update={"output": str(moved)}))


def test_weights_of_one_architecture_are_merged(run_job, tiny_models, tmp_path):
    folder = tmp_path / "other"
    hf_config, decoder_config = models.read_config(tiny_models["coarse"])
    export.save(models.init(decoder_config, 7), hf_config, folder, tokenizer_from=tiny_models["coarse"])
    job = run_job([tiny_models["coarse"], str(folder)], ["merge", "ensemble"], clm=False)
    merged, one, two = (
        files.tensors(files.local_folder(m))
        for m in (job.folder / "baselines/merge/export", tiny_models["coarse"], folder)
    )
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor.read(), (one[name].read() + two[name].read()) / 2, atol=1e-6)
    results = {name: json.loads((job.folder / f"evaluation/{name}.json").read_text()) for name in ("merge", "ensemble")}
    assert results["ensemble"]["of"] == ["coarse", "other"]
    # A mixture is at least half of its best part at every token.
    best = min(json.loads((job.folder / f"evaluation/{n}.json").read_text())["bits_per_byte"]["average"]
               for n in ("coarse", "other"))  # fmt: skip
    counts = next(iter(results["ensemble"]["counts"].values()))
    assert results["ensemble"]["bits_per_byte"]["average"] <= best + counts["tokens"] / counts["bytes"]


@pytest.mark.parametrize(("override", "message"), [
    ("evaluation.baselines=[exakt]", "evaluation.baselines.0: .*'exact'.*exakt"),
    ("sources=[]", "evaluation.baselines: there are no sources"),
    ("sources=[{model: a, name: merge}]", "a source cannot be called 'merge'"),
])  # fmt: skip
def test_mistakes_are_one_clear_line(tmp_path, override, message):
    path = tmp_path / "job.yaml"
    path.write_text("target: a\nsources: [a]\ncorpus: {path: x}\nevaluation: {baselines: [exact]}\n")
    with pytest.raises(UserError, match=message):
        config.load(path, [override])


@pytest.mark.parametrize("compat", [None, "fusellm"])
@pytest.mark.parametrize("name", ["exact", "avg_ce", "fusellm"])
def test_variants_change_what_they_stand_for_alone(compat, name):
    job = config.validate({
        "target": "a", "sources": ["a", "b"], "corpus": {"path": "x"}, "output": "o", "compat": compat, "seed": 3,
        "evaluation": {"baselines": [name]},
    })  # fmt: skip
    found = baselines.variant(job, name)
    assert found.folder == job.folder / "baselines" / name
    assert (found.optimizer, found.batch, found.seed, found.sources) == (job.optimizer, job.batch, 3, job.sources)
    assert found.compat == ("fusellm" if name == "fusellm" else None)
    assert (found.alignment.rows == "exact") == (name == "exact")
    assert (found.fusion.kind == "avg_ce") == (name == "avg_ce")


@pytest.mark.parametrize("fusion", [{"level": "token", "window": 4}, {"kind": "avg_ce", "weighting": "reference"}])
@pytest.mark.parametrize("name", ["exact", "avg_ce", "fusellm"])
def test_variants_of_any_fusion_are_valid(fusion, name):
    job = config.validate({
        "target": "a", "sources": ["a", "b"], "corpus": {"path": "x"}, "output": "o", "fusion": fusion,
        "evaluation": {"baselines": [name]},
    })  # fmt: skip
    assert baselines.variant(job, name).fusion.window == (16 if name == "fusellm" else job.fusion.window)
