"""`fusejax bench align` on small tokenizers: all cases are there, whatever they are; nothing here asserts a time."""

import json

import pytest
from tokenizer_zoo import TEXTS, hf

from fusejax import cli


@pytest.fixture
def folders(tmp_path):
    for name in ("sentencepiece", "byte-level"):
        hf(name).save_pretrained(tmp_path / name)
    (tmp_path / "x.txt").write_text("".join(TEXTS), encoding="utf-8")
    return tmp_path


def run(folder, *arguments):
    path = folder / "bench.json"
    cli.main(["bench", "align", *arguments, "--repeats", "1", "--tokens", "50", "--json", str(path)])
    return {case["name"]: case for case in json.loads(path.read_text())["cases"]}


def test_cases_of_two_folders(folders, capsys):
    target, source = str(folders / "sentencepiece"), str(folders / "byte-level")
    cases = run(folders, "--target", target, "--source", source, "--text", str(folders / "x.txt"))
    names = [f"byte-level: row map {method}" for method in ("exact", "mined", "boundary", "inside")]
    names += [f"byte-level: token map {method}" for method in ("prefix", "prefix for inside", "mined")]
    (size,) = {name.partition("mined ")[2] for name in cases if name.endswith(" x 50")} - {""}
    names += [f"byte-level: mined {size}", f"byte-level: plain restatement {size}"]
    assert set(names) <= set(cases)
    assert cases[names[0]]["unit"] == "tokens/s"
    assert cases[names[-1]]["ratio_to"] == f"byte-level: mined {size}"
    assert all(case["value"] >= 0 for case in cases.values())
    assert "plain restatement" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "{}/byte-level"], "--target and --source go together"),
        (["x.yaml", "--target", "{}/byte-level", "--source", "{}/byte-level"], "not both"),
        (["--target", "{}/byte-level", "--source", "{}/byte-level"], "nothing to align"),
        (["--target", "{}/byte-level", "--source", "{}/none"], "no such model folder"),
        (["--target", "{}/byte-level", "--source", "{}/sentencepiece", "--text", "{}/y.txt"], "--text"),
    ],
)
def test_a_mistake_is_one_line(folders, arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", "align", *(argument.format(folders) for argument in arguments)])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_without_tokenizers_and_without_the_default(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit):
        cli.main(["bench", "align"])
    assert "name a configuration, or --target and --source" in capsys.readouterr().err
