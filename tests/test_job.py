"""The whole job: `train.py` on tiny models of two architectures and tokenizers, and what a kill leaves of it."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TEXTS
from environment import on_cpus

import fusejax
from fusejax import cli, config, corpus, progress
from fusejax import report as report_stage
from fusejax.batches import Batches
from fusejax.errors import UserError

TRAIN_PY = Path(__file__).parent.parent / "train.py"
HELD_OUT = ["A cat and a dog sat on the mat.", "import os\nprint(os.sep)\n", "The hills are far away."]


def load_main():
    spec = importlib.util.spec_from_file_location("train", TRAIN_PY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_corpus(path, texts):
    lines = [{"text": text, "domain": domain} for domain, group in texts.items() for text in group]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_corpus(folder / "train.jsonl", TEXTS)
    write_corpus(folder / "heldout.jsonl", {"prose": HELD_OUT[::2], "code": HELD_OUT[1:2]})
    return folder


@pytest.fixture
def write_config(inputs, tiny_models, tmp_path):
    def write(name="job", **changes):
        values = {
            "target": tiny_models["coarse"],
            "sources": [tiny_models["coarse"], tiny_models["fine"]],
            "corpus": {"path": str(inputs / "train.jsonl"), "domain_key": "domain"},
            "max_length": 64,
            "cache": {"top_k": 5, "batch_tokens": 256},
            "loss": {"weight_clm": 0.5},
            "optimizer": {"learning_rate": 3e-3},
            "batch": {"sequences": 2, "epochs": 4},
            "precision": {"compute": "float32"},
            "checkpoint": {"every": 3},
            "evaluation": {"corpus": {"path": str(inputs / "heldout.jsonl"), "domain_key": "domain"}},
            "output": str(tmp_path / name),
        } | changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def report_of(folder, without=("throughput", "config", "name")):
    report = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in report.items() if key not in without}


def refuses_other_settings(path):
    for change, told in (
        ("seed=5", r"training.json: .*seed \(0 there, 5 now\).*give `report` the settings"),
        (
            "target=elsewhere",
            r"config.yaml: .*target.model \(.*coarse there, elsewhere now\).*give `report` the settings",
        ),
        ("sources=[elsewhere]", r"config.yaml: .*sources.0.model \(.*sources.1.model \(.*fine there, None now"),
        ("cache.values=uint8", r"config.yaml: .*cache.values \(float16 there, uint8 now"),
        ("corpus.limit_bytes=70", r"data/train: .*corpus.limit_bytes \(None there, 70 now"),
        ("evaluation.corpus.limit=1", r"data/heldout: .*evaluation.corpus.limit \(None there, 1 now"),
    ):
        with pytest.raises(UserError, match=told):
            report_stage.run(config.load(path, [change]))


def refuses_damaged_files(job):
    """One line for each, and the report that was there stays."""
    told = [
        ("evaluation/clm.json", ("bits_per_byte",), {"average": 1.0}, "clm.json: has other domains than target.json"),
        ("evaluation/clm.json", ("bits_per_byte", "code"), None, r"bits_per_byte.code: Input .* valid number"),
        ("evaluation/clm.json", ("bits_per_byte", "code"), float("nan"), r"bits_per_byte.code: .*finite number"),
        ("training.json", ("throughput",), None, "training.json: is damaged, throughput: Input should be an object"),
        ("clm/training.json", ("throughput", "tokens_per_s"), "x", "throughput.tokens_per_s: Input .* valid number"),
        ("alignment/fine/report.json", ("report",), 5, "report.json: is damaged, report: Input should be an object"),
        ("alignment/fine/report.json", ("report", "documents"), {}, "report.documents.counted: Field required"),
        ("alignment/fine/report.json", ("report", "text_ce"), [["code"]], "report.text_ce.0.1: Field required"),
        ("alignment/fine/report.json", ("report", "share"), float("nan"), "report.share: .* finite number"),
    ]
    before = files(job.folder)
    for name, keys, value, message in told:
        path, whole = job.folder / name, before[Path(name)]
        damaged = json.loads(whole)
        inner = damaged
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=message):
            report_stage.run(job)
        path.write_bytes(whole)
    lines = before[Path("metrics.jsonl")].splitlines(keepends=True)
    for broken in (b'{"step": 2}\n', b"\xff\xfe\n", b"{\n"):
        (job.folder / "metrics.jsonl").write_bytes(b"".join([lines[0], broken, *lines[2:]]))
        with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged"):
            report_stage.run(job)
    (job.folder / "metrics.jsonl").write_bytes(b"".join(lines))
    (job.folder / "training.json").unlink()
    with pytest.raises(UserError, match=r"training.json: is missing, .*metrics.jsonl .*checkpoint.resume=false"):
        report_stage.run(job)
    (job.folder / "training.json").write_bytes(before[Path("training.json")])
    assert files(job.folder) == before


def test_the_whole_job_and_again(write_config, tmp_path, capsys):
    path = write_config()
    load_main()([str(path)])
    out = capsys.readouterr().out
    folder = tmp_path / "job"
    for made in ("report.json", "report.html", "metrics.jsonl", "config.yaml", "checkpoints", "export", "tensorboard"):
        assert (folder / made).exists(), made
    assert "CLM only" in out
    report = report_of(folder)
    scores = report["evaluation"]["bits_per_byte"]
    assert list(scores) == ["target", "coarse", "fine", "clm", "fused"]
    for values in scores.values():
        assert values["average"] == pytest.approx((values["prose"] + values["code"]) / 2)
    assert scores["target"] == scores["coarse"]
    assert scores["fused"]["average"] < scores["target"]["average"]
    assert report["alignment"]["coarse"]["share"] == 1.0
    assert 0 < report["alignment"]["fine"]["share"] <= 1
    won = report["training"]["fused"]["rows_won"]
    assert sum(won.values()) + report["training"]["fused"]["rows_fallback"] == pytest.approx(1, abs=1e-5)
    assert config.load(folder / "config.yaml") == config.load(path)
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 4
    wins = report["source_wins"]
    assert sorted(wins) == ["code", "prose"]
    for shares in wins.values():
        assert sum(shares.values()) == pytest.approx(1)
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    model = fusejax.load(folder / "export")
    assert np.isfinite(np.asarray(model(np.array([[5, 6, 7]])))).all()

    refuses_other_settings(path)
    refuses_damaged_files(config.load(path))
    before = files(folder)
    with pytest.raises(UserError, match=r"training.json: .*: cache.top_k of coarse \(5 there, 4 now\).*resume=false"):
        load_main()([str(path), "cache.top_k=4"])
    assert files(folder) == before  # refused before a stage replaced what the run was made from

    load_main()([str(path)])
    out = capsys.readouterr().out
    for stage in ("train fused: done", "train clm: done", "export fused: done", "source"):
        assert stage in out
    assert report_of(folder) == report

    # The export is a source for the next fusion.
    again = write_config(
        "next", target=str(folder / "export"), sources=[{"model": str(folder / "export"), "name": "x"}]
    )
    load_main()([str(again), "evaluation.clm=false", "batch.epochs=1"])
    scores = report_of(tmp_path / "next")["evaluation"]["bits_per_byte"]
    assert scores["target"]["average"] == pytest.approx(report["evaluation"]["bits_per_byte"]["fused"]["average"])


def test_dry_run_writes_nothing(write_config, tmp_path, capsys):
    path = str(write_config())
    load_main()([path, "--dry-run", "seed=1"])
    out = capsys.readouterr().out
    assert "disk needed" in out
    assert not (tmp_path / "job").exists()
    for changes in (["max_length=16"], ["batch.packed=false"]):  # documents are cut; one to a sequence
        load_main()([path, "--dry-run", *changes])
        planned = re.search(r"training: about (\d+) steps", capsys.readouterr().out)[1]
        job = config.load(path, [*changes, f"output={tmp_path / changes[0]}"])
        corpus.prepare(job)
        assert int(planned) == pytest.approx(len(Batches(job, with_sources=False)), rel=0.05)


def test_dry_run_of_the_papers_recipe(capsys):
    load_main()([str(TRAIN_PY.parent / "configs" / "fusellm-7b.yaml"), "--dry-run"])
    out = capsys.readouterr().out
    assert "1.8B" in out
    assert "meta-llama/Llama-2-7b-hf" in out


def test_dry_run_of_the_papers_three_domains(capsys):
    path = str(TRAIN_PY.parent / "configs" / "pythia-domains.yaml")
    load_main()([path, "--dry-run"])
    out = capsys.readouterr().out
    assert "100.0M" in out
    assert "train clm" in out
    expert = ["sources=[]", "evaluation.clm=false", "evaluation.baselines=[]", "corpus.domains=[NIH ExPorter]"]
    load_main()([path, *expert, "output=pythia-1b-nih", "--dry-run"])
    assert "train clm" not in capsys.readouterr().out


def test_dry_run_of_the_recipe_for_chat_models(monkeypatch, capsys):
    monkeypatch.setattr(progress.console, "_width", 200)  # it reads COLUMNS once, when the first test imports it
    load_main()([str(TRAIN_PY.parent / "configs" / "fusechat-7b.yaml"), "--dry-run"])
    out = capsys.readouterr().out
    assert "train pair/Nous-Hermes-2-SOLAR-10.7B" in out
    assert "sce of 2 copies" in out


def test_each_stage_by_itself(write_config, tmp_path, capsys):
    path = str(write_config())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", path])
    assert stopped.value.code == 2
    assert "run" in capsys.readouterr().err
    for stage in cli.STAGES:
        cli.main([stage, path, "evaluation.clm=false", "batch.epochs=1"])
    assert (tmp_path / "job" / "report.html").exists()
    cli.main(["inspect", str(tmp_path / "job" / "sources" / "fine")])
    assert "logprobs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "CONFIG.yaml"),
        (["nothing"], "invalid choice"),
        (["inspect", "/nonexistent"], "no store here"),
        (["plan", "missing.yaml"], "no such configuration"),
        (["import", "somewhere", "--source", "x", "missing.yaml", "seed=1"], "missing.yaml: no such configuration"),
        (["plan", "missing.yaml", "--frob", "a=b"], "unrecognized arguments: --frob"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_cache_of_another_text_is_refused(write_config, inputs, tmp_path):
    path = write_config(evaluation={"clm": False}, batch={"sequences": 2, "epochs": 1})
    load_main()([str(path)])
    other = tmp_path / "other.jsonl"
    write_corpus(other, {"prose": ["Quite another text."]})
    with pytest.raises(UserError, match="text"):
        load_main()([str(path), f"corpus.path={other}"])
    with pytest.raises(UserError, match="top_k"):
        load_main()([str(path), "cache.top_k=7"])


def run_until(path, marker, delay, number=signal.SIGKILL):
    """Start the job, kill it `delay` seconds after a line with `marker` (never, where it is None)."""
    process = subprocess.Popen(
        [sys.executable, str(TRAIN_PY), str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=on_cpus(),
    )  # fmt: skip
    seen = []
    deadline = time.monotonic() + 300
    for line in process.stdout:
        seen.append(line)
        if marker is not None and marker in line:
            time.sleep(delay)
            process.send_signal(number)
        assert time.monotonic() < deadline
    process.wait(timeout=60)
    return process.returncode, "".join(seen)


def test_a_pipe_that_closes_early_is_no_traceback(write_config):
    command = f"set -o pipefail; {sys.executable} {TRAIN_PY} {write_config()} --dry-run | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_is_one_line(write_config):
    code, out = run_until(write_config(), "prepare heldout", 0.0, signal.SIGINT)
    assert code == 130
    assert out.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert "Traceback" not in out


@pytest.mark.slow
def test_killed_in_every_stage_equals_undisturbed(write_config, tmp_path):
    path = write_config()
    code, out = run_until(path, None, 0)
    assert code == 0, out
    expected = report_of(tmp_path / "job")
    shutil.rmtree(tmp_path / "job")
    kills = 0
    for marker, delay in [
        ("prepare heldout", 0.0), ("prepare train", 0.0), ("source", 0.0), ("source fine", 0.0), ("align", 0.0),
        ("align", 0.3), ("train fused", 0.0), ("train clm", 0.0), ("export fused", 0.0), ("export clm", 0.2),
        ("evaluate", 0.0), ("evaluate", 0.5), ("report", 0.0),
    ]:  # fmt: skip
        code, out = run_until(path, marker, delay)
        kills += code == -signal.SIGKILL
    assert kills >= 8
    code, out = run_until(path, None, 0)
    assert code == 0, out
    assert report_of(tmp_path / "job") == expected
