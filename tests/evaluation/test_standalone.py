import json
import re

import numpy as np
import pytest

from fusejax import cli, models
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.evaluation import measure, measure_corpus
from fusejax.evaluation.perplexity import DomainSums
from fusejax.evaluation.standalone import show
from fusejax.tokenizers import Tokenizer

TEXTS = {
    "prose": ["The cat sat on the mat, and the dog sat on the log. " * 8, "Ünïcödé and 😀."],
    "code": ["def add(a, b):\n    return a + b\n" * 5],
}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [{"text": text, "kind": domain} for domain, texts in TEXTS.items() for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_equals_measuring_the_documents_themselves(tiny_models, corpus, name):
    folder = tiny_models[name]
    found = measure_corpus(ModelConfig(model=folder), CorpusConfig(path=str(corpus), domain_key="kind"), max_length=32)
    tokenizer = Tokenizer.load(folder)
    records = [{"id": text, "domain": domain} for domain, texts in TEXTS.items() for text in texts]
    tokens = [dict(zip(("ids", "boundaries"), tokenizer.encode(record["id"]), strict=True)) for record in records]
    wanted = measure(models.load(folder), tokenizer, records, tokens, max_length=32, batch_tokens=512)
    assert list(found) == ["prose", "code"]
    for domain in TEXTS:
        assert found[domain].nats == pytest.approx(wanted[domain].nats, rel=1e-5)
        assert (found[domain].bytes, found[domain].tokens) == (wanted[domain].bytes, wanted[domain].tokens)
    # All bytes of the text, but for those of a first token that nothing stands before.
    size = sum(len(text.encode()) for text in TEXTS["prose"])
    first = 0 if tokenizer.adds_bos else sum(int(tokenizer.encode(text)[1][0]) for text in TEXTS["prose"])
    assert found["prose"].bytes == size - first


def test_the_command(tiny_models, corpus, tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["evaluate", *tiny_models.values(), "--corpus", str(corpus), "--domain-key", "kind"]
    cli.main([*arguments, "--max-length", "32", "--stride", "8", "--json", str(file)])
    out = capsys.readouterr().out
    values = json.loads(file.read_text())
    assert list(values) == ["coarse", "fine"]
    for model in values.values():
        scores = model["bits_per_byte"]
        assert scores["average"] == pytest.approx(np.mean([scores["prose"], scores["code"]]))
        assert f"{scores['prose']:.4f}" in out
        counts = model["counts"]["code"]
        assert scores["code"] == pytest.approx(counts["nats"] / np.log(2) / counts["bytes"])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--corpus", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--corpus", ""], "--corpus: path: String should have at least 1 character"),
    (["--max-length", "0"], "--max-length: 0 should be at least 1"),
    (["--max-length", "16", "--stride", "20"], "--stride: 20 should be between 1 and the 16"),
    (["--text-key", "body"], "body"),
    (["--corpus", "x" * 300], "xxx: cannot be read (File name too long)"),
    (["--batch-tokens", "999999999999"], "--batch-tokens: 999999999999 should be at most 16777216"),
    (["--stride", "65"], "--stride: 65 should be between 1 and the 64 tokens of a window"),
    (["--json", "."], ".: cannot be written (Is a directory): choose another path"),
    (["--json", "gs:/bucket/numbers.json"], "gs:/bucket/numbers.json: an address begins with gs://, as in gs://bucket/"),
    (["--ensemble", "probability", "--weights", "1", "2"], "needs one weight above 0 for each of 1 models"),
    (["--ensemble", "probability", "--weights", "-1"], "needs one weight above 0 for each of 1 models, not [-1.0]"),
    (["--ensemble", "probability", "--weights", "nan"], "needs one weight above 0"),
    (["--ensemble", "probability", "--weights", "1e308"], "ensemble: weights: each should be 0, or between 1e-30"),
])  # fmt: skip
def test_mistakes_end_with_one_line_and_no_model_is_loaded(
    tiny_models, corpus, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(models, "load", None)
    given = arguments if "--corpus" in arguments else ["--corpus", str(corpus), *arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", tiny_models["coarse"], *given])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_faulty_second_model_is_found_before_the_first_is_loaded(tiny_models, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", None)
    given = [tiny_models["coarse"], str(tmp_path), "--corpus", str(corpus)]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *given])
    assert "not a whole model folder" in capsys.readouterr().err
    given = [*tiny_models.values(), "--corpus", str(corpus), "--ensemble", "log_probability"]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *given])
    assert "coarse and fine cannot be averaged: their tokenizers differ" in capsys.readouterr().err


def test_a_second_model_that_is_nowhere_is_found_before_the_first_is_loaded(tiny_models, corpus, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", tiny_models["coarse"], "nope/nope", "--corpus", str(corpus)])
    assert ended.value.code == 2
    assert "model 'nope/nope' is neither a folder here nor in the local cache" in capsys.readouterr().err


def test_names_are_no_markup_and_numbers_are_written_before_they_are_shown(
    tiny_models, corpus, tmp_path, monkeypatch, capsys
):
    corpus.write_text(json.dumps({"text": TEXTS["code"][0], "kind": "[/red]"}))
    arguments = ["evaluate", tiny_models["fine"], "--corpus", str(corpus), "--domain-key", "kind"]
    cli.main([*arguments, "--json", str(tmp_path / "out.json")])
    assert "┃ [/red] ┃" in capsys.readouterr().out
    monkeypatch.setattr("fusejax.evaluation.standalone.show", None)
    with pytest.raises(TypeError):
        cli.main([*arguments, "--json", str(tmp_path / "again.json")])
    assert (tmp_path / "again.json").read_text() == (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(("width", "terminal"), [(30, True), (120, True), (200, True), (80, False)])
def test_the_table_cuts_no_number_and_no_name(monkeypatch, capsys, width, terminal):
    monkeypatch.setattr("fusejax.progress.console.width", width)
    monkeypatch.setattr("fusejax.progress.console._force_terminal", terminal)
    sums = DomainSums(nats=1e6, bytes=1_234_567, tokens=345_678, documents=9_876)
    names = ("llama-generalist", "neox", "/a/folder/much/deeper/than/others/with/a-model-in-it")
    show({name: {domain: sums for domain in ("prose", "programs", "documentation pages")} for name in names})
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    if terminal and width > 100:  # what the numbers need
        assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    assert "…" not in shown
    for number, times in (("1.1686", 4 * 3), ("18.04", 3), ("1,037,034", 3), ("3,703,701", 3), ("29,628", 3)):
        assert shown.count(number) == times
    pieces = [line[1:].split("│")[0].strip() for line in lines if line.startswith("│")]
    assert names[-1] in "".join(pieces)


def test_windows_beyond_the_context_are_a_warning(tiny_models, corpus, capsys):
    cli.main(["evaluate", tiny_models["fine"], "--corpus", str(corpus), "--max-length", "80"])
    assert "was made for 64 tokens, --max-length asks for 80; it may do worse there" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["job.yaml", "--stride", "3", "--split", "x"], "evaluate without --corpus: has no use for --split, --stride"),
    (["job.yaml", "--batch-tokens", "8192"], "has no use for --batch-tokens"),
    (["model", "--corpus", "text.txt", "--weights", "1", "2"], "evaluate without --ensemble: has no use for --weights"),
])  # fmt: skip
def test_options_that_would_do_nothing_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("model", "message"), [
    ("", "evaluate: model: String should have at least 1 character"),
    ("s3://bucket/model", "evaluate: model: s3://bucket/model is in a bucket"),
    ("x" * 300, "xxx: should be a model folder or a hub name (File name too long)"),
    ("~nobody-of-this-name/x", "~nobody-of-this-name/x: should be a model folder or a hub name"),
])  # fmt: skip
def test_what_can_be_no_model(corpus, capsys, model, message):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", model, "--corpus", str(corpus)])
    assert message in capsys.readouterr().err


def test_a_model_given_twice_is_refused(tiny_models, corpus, capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", tiny_models["fine"], tiny_models["fine"], "--corpus", str(corpus)])
    assert "named twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", tiny_models["fine"], f"{tiny_models['fine']}/./", "--corpus", str(corpus)])
    assert "named twice" in capsys.readouterr().err


def test_a_model_called_as_the_ensemble_keeps_its_row(tiny_models, corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "ensemble").symlink_to(tiny_models["fine"])
    monkeypatch.chdir(tmp_path)
    given = [tiny_models["coarse"], "--corpus", str(corpus), "--ensemble", "probability", "--json", "out.json"]
    cli.main(["evaluate", "./ensemble", *given])
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["./ensemble", tiny_models["coarse"], "ensemble"]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "ensemble", *given])
    assert "ensemble: results have a row of this name; write the folder as ./ensemble" in capsys.readouterr().err
