import json

import pytest

from fusejax import alignment, bench, cli, config, sources


@pytest.fixture
def job(make_job, tmp_path):
    made = make_job(batch={"sequences": 2, "steps": 3})
    sources.run(made)
    alignment.run(made)
    path = tmp_path / "job.yaml"
    path.write_text(config.dump(made))
    return path


def measured(tmp_path, *arguments):
    cli.main(["bench", *map(str, arguments), "--repeats", "2", "--json", str(tmp_path / "out.json")])
    return {case["name"]: case for case in json.loads((tmp_path / "out.json").read_text())["cases"]}


def test_data(job, tmp_path):
    cases = measured(tmp_path, "data", job)
    assert list(cases) == ["sequence", "text"]
    assert cases["sequence"]["unit"] == "s"
    assert cases["sequence"]["ratio_to"] == "text"
    assert (cases["sequence"]["sources"], cases["sequence"]["top_k"]) == (2, 5)


def test_train_against_torch(job, tmp_path):
    pytest.importorskip("torch")
    cases = measured(tmp_path, "train", job, "--random", "64x1x400", "--against", "torch")
    rates = {name: case["value"] for name, case in cases.items() if case["unit"] == "tokens/s"}
    assert {"fused", "clm", "torch clm"} <= set(rates)
    fused = cases["fused"]
    assert fused["ratio_to"] == "torch clm"
    assert fused["ratio"] == pytest.approx(rates["fused"] / rates["torch clm"])
    assert fused["parameters"] == 400 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64
    assert cases["fused: model"]["value"] == pytest.approx(fused["value"] * fused["flops_per_token"] / 1e9)
    assert cases["clm: compile"]["value"] > 0
    assert "torch clm: memory per device" not in cases  # a CPU's is not counted
    assert cases["clm: memory per device"]["value"] > 16 * fused["parameters"]  # parameters, gradient, two moments


def test_train_of_any_shape_on_what_is_drawn(tmp_path, tiny_models):
    """No stage was done, the text is nowhere: batch, tables and weights are drawn."""
    shape = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 96, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    job = {"target": "nowhere/at-all", "sources": ["nowhere/a", "nowhere/b"], "corpus": {"path": "nowhere.jsonl"},
           "max_length": 32, "batch": {"sequences": 2}, "output": str(tmp_path / "out")}  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    cases = measured(
        tmp_path, "train", tmp_path / "job.yaml", "--random", tmp_path / "config.json", "--synthetic", "--cpu-time"
    )
    assert {"fused", "clm", "fused: compile"} <= set(cases)
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16, 3 * 32 * 48
    assert cases["fused"]["parameters"] == 96 * 32 + 2 * (attention + mlp + 2 * 32) + 32
    assert (cases["fused"]["tokens"], cases["fused"]["seconds_of"]) == (64, "process")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("64x1", "should be WIDTHxLAYERSxVOCAB, for example 320x8x32000, or a config.json"),
        (
            "/nowhere",
            "--random /nowhere: /nowhere is not there; it should be the config.json of a model, or its folder",
        ),
        ("100x1x400", "multiple of 64"),
        ("64x1x8", "vocabulary of at least 352"),
    ],
)
def test_wrong_shapes_are_one_line(job, capsys, shape, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "train", str(job), "--random", shape])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_both_are_listed():
    assert {"train", "data"} <= set(bench.BENCHES)
