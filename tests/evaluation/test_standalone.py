import json

import numpy as np
import pytest

from fusejax import cli, models
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.evaluation import measure, measure_corpus
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
    (["--max-length", "16", "--stride", "20"], "stride: 20 should be between 1 and the 16"),
    (["--text-key", "body"], "body"),
    (["--stride", "65"], "stride: 65 should be between 1 and the 64 tokens of a window"),
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
])  # fmt: skip
def test_what_can_be_no_model(corpus, capsys, model, message):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", model, "--corpus", str(corpus)])
    assert message in capsys.readouterr().err


def test_a_model_given_twice_is_refused(tiny_models, corpus, capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", tiny_models["fine"], tiny_models["fine"], "--corpus", str(corpus)])
    assert "named twice" in capsys.readouterr().err
