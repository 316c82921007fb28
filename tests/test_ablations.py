"""scripts/ablations.py on tiny models."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusejax import alignment, config, evaluation, sources, training
from fusejax.batches import Batches
from fusejax.errors import Resumable, UserError

SCRIPT = Path(__file__).parents[1] / "scripts/ablations.py"
VARIANTS = """
ours:
clm: {sources: []}
"k 2, λ 0.5": {cache.top_k: 2, loss.weight_clm: 0.5}
avg: {fusion.kind: fixed, fusion.weights: [1, 1]}
mined: {alignment.rows: mined, alignment.tokens: mined, alignment.gold_chain: false}
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("ablations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(make_job, tmp_path):
    """(the job, its file, the variants' file); documents and sources are done."""
    job = make_job(
        batch={"sequences": 2, "epochs": 1},
        optimizer={"learning_rate": 0.01},
        precision={"compute": "float32", "export": "float32"},
        evaluation={"corpus": {"path": "unused.jsonl"}, "clm": False},
    )
    sources.run(job)
    (tmp_path / "job.yaml").write_text(config.dump(job), "utf-8")
    (tmp_path / "variants.yaml").write_text(VARIANTS, "utf-8")
    return job, str(tmp_path / "job.yaml"), str(tmp_path / "variants.yaml")


@pytest.mark.slow
def test_a_variant_is_what_the_jobs_own_stages_make(script, files, tmp_path):
    job, *paths = files
    json_path, table_path = tmp_path / "all.json", tmp_path / "table.md"
    names = ["ours", "k 2, λ 0.5", "mined"]
    figure = tmp_path / "curves.svg"
    out = ["--json", str(json_path), "--markdown", str(table_path), "--svg", str(figure)]
    script.main([*paths, "--only", *names, "--points", "2", *out])
    results = {result["name"]: result for result in json.loads(json_path.read_text("utf-8"))["variants"]}
    assert list(results) == names
    for result in results.values():
        assert len(result["points"]) == 2
        assert result["points"][-1]["bits_per_byte"] == result["bits_per_byte"]
        assert result["points"][-1]["step"] == result["steps"] == len(result["curves"]["loss"])
        assert result["points"][-1]["tokens"] == sum(result["curves"]["tokens"])
    assert results["mined"]["means"]["fallback"] > results["ours"]["means"]["fallback"]
    assert results["mined"]["aligned"]["fine"] < results["ours"]["aligned"]["fine"]
    assert results["k 2, λ 0.5"]["means"]["mass_kept"] < results["ours"]["means"]["mass_kept"]
    assert len(table_path.read_text("utf-8").splitlines()) == 2 + len(results)
    assert all(name in figure.read_text("utf-8") for name in names)
    assert not list((job.folder / "ablations").rglob("checkpoints"))

    alignment.run(job)
    training.run(job)
    training.export(job)
    evaluation.run(job)
    expected = json.loads((job.folder / "evaluation/fused.json").read_text("utf-8"))["bits_per_byte"]
    assert results["ours"]["bits_per_byte"] == pytest.approx(expected, abs=1e-6)
    assert results["k 2, λ 0.5"]["bits_per_byte"]["average"] != pytest.approx(expected["average"], abs=1e-4)


def test_what_is_done_is_kept_and_other_settings_are_refused(script, files, monkeypatch):
    job, *paths = files
    script.main([*paths, "--only", "clm"])
    result = json.loads((job.folder / "ablations/clm/result.json").read_text("utf-8"))
    assert result["changes"] == {"sources": []}
    assert "fallback" not in result["means"]
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("trained again"))
    script.main([*paths, "--only", "clm"])
    with pytest.raises(UserError, match="failed, see above: clm"):
        script.main([*paths, "seed=1", "--only", "clm"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "theirs"], "no such variant; give some of 'ours' 'clm' 'k 2, λ 0.5' .*, separated by spaces"),
        (["loss.weight_clm=2"], r"job.yaml: loss.weight_clm"),
        (["sources=[]"], r"variants.yaml: avg: .*job.yaml: fusion.weights"),
        (["--points", "0"], "--points: should be at least 1"),
    ],
)
def test_mistakes_are_one_line(script, files, more, message):
    _, *paths = files
    with pytest.raises(UserError, match=message):
        script.main([*paths, *more])


def test_sigterm_ends_the_helpers_too(script):
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(SystemExit) as ended, script.ended(helper):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert helper.poll() == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_in_training_says_that_nothing_is_saved(script, files, monkeypatch):
    job, *paths = files
    fetch = Batches.batch

    def batch(self, *step):
        os.kill(os.getpid(), signal.SIGTERM)
        return fetch(self, *step)

    monkeypatch.setattr(Batches, "batch", batch)
    with pytest.raises(Resumable, match="variant clm; the same command begins this variant anew"):
        script.main([*paths, "--only", "clm"])
    assert not (job.folder / "ablations/clm/result.json").exists()
