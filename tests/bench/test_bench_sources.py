import json

import pytest

from fusejax import cli


@pytest.mark.parametrize("extra", [["--no-torch"], []])
def test_every_rate_and_the_disk_are_there(tmp_path, tiny_models, capsys, extra):
    if not extra:
        pytest.importorskip("torch")
    path, corpus = tmp_path / "bench.json", tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "the cat sat on the mat. " * i}) + "\n" for i in range(1, 5)))
    arguments = ["--corpus", str(corpus), "--documents", "3", "--max-length", "64", "--repeats", "2", "--top-k", "3"]
    cli.main(["bench", "sources", tiny_models["coarse"], *arguments, "--json", str(path), *extra])
    cases = {case["name"]: case for case in json.loads(path.read_text())["cases"]}
    rates = {"stage", "bare"} | (set() if extra else {"torch"})
    assert set(cases) == rates | {f"{name}: {of}" for name in rates for of in ("per device", "model")} | {
        "disk, per row"
    }
    assert cases["stage"]["ratio_to"] == "bare"
    assert cases["stage"]["ratio"] == pytest.approx(cases["stage"]["value"] / cases["bare"]["value"])
    assert cases["disk, per row"]["value"] > 10
    assert cases["bare: model"]["value"] > 0
    assert "tokens/s" in capsys.readouterr().out
