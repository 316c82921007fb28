import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from fusejax import cli, export, merging, models, settings
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.errors import UserError
from fusejax.evaluation.standalone import average, measure_corpus
from fusejax.merging import checkpoints, config
from fusejax.models import files
from fusejax.tokenizers import Tokenizer


def make(folder, tokenizer, seed, family="llama", **changes):
    values = {
        "vocab_size": 352, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_mlp": 16,
        "max_length": 64, "rotary_dim": 8, "initializer_std": 0.5,
    } | changes  # fmt: skip
    decoder_config = models.DecoderConfig(**values)
    hf_config = models.hf_config(decoder_config, family)
    export.save(models.init(decoder_config, seed), hf_config, folder, tokenizer_from=tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def three(tiny_models, tmp_path_factory):
    """Folders of a base and two models of its kind; 352 rows for 330 tokens."""
    folder = tmp_path_factory.mktemp("merged")
    return [make(folder / name, tiny_models["coarse"], seed) for seed, name in enumerate(["base", "one", "two"])]


def merge(tmp_path, **values):
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), **values}))
    return merging.merge(merging.load(path))


def tensors(folder):
    return {name: stored.read() for name, stored in files.tensors(files.local_folder(folder)).items()}


def test_linear_equals_numpy_and_loads(three, tmp_path):
    pairs = [{"model": three[1], "weight": 0.3}, {"model": three[2], "weight": 0.7}]
    folder = merge(tmp_path, method="linear", models=pairs)
    one, two, found = tensors(three[1]), tensors(three[2]), tensors(folder)
    assert found.keys() == one.keys()
    for name in found:
        np.testing.assert_allclose(found[name], 0.3 * one[name] + 0.7 * two[name], rtol=1e-5, atol=1e-6)
    # Padded rows are merged like any other; the tokenizer came along.
    assert found["model.embed_tokens.weight"].shape == (352, 16)
    assert Tokenizer.load(str(folder)).fingerprint == Tokenizer.load(three[1]).fingerprint
    logits = models.load(folder)(np.arange(8, dtype=np.int32)[None])
    assert np.isfinite(np.asarray(logits)).all()
    assert not list(tmp_path.glob(".out*"))


def test_the_result_loads_in_transformers(three, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = merge(tmp_path, method="slerp", models=three[1:], t=0.4)
    ids = np.arange(8)[None]
    with torch.no_grad():
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(models.load(folder)(ids.astype(np.int32))), reference, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(folder)("The cat").input_ids


@pytest.mark.parametrize(("method", "options"), [
    ("task_arithmetic", {"scale": 0.5}),
    ("ties", {"models": [{"density": 0.3}, {"density": 0.6, "weight": 2}]}),
    ("dare_linear", {"models": [{"density": 0.5}, {"density": 0.9}], "seed": 3}),
    ("dare_ties", {"models": [{"density": 0.5}, {"density": 0.9}], "normalize": True}),
    ("sce", {"top": 0.3}),
    ("sce", {"top": 0.3, "select": "weigh"}),
])  # fmt: skip
def test_the_others_equal_their_functions(three, tmp_path, method, options):
    given = [{"model": m, **o} for m, o in zip(three[1:], options.pop("models", [{}, {}]), strict=True)]
    folder = merge(tmp_path, method=method, base=three[0], models=given, **options)
    values = config.load(tmp_path / "merge.yaml")
    base, one, two = (tensors(m) for m in three)
    for name, found in tensors(folder).items():
        stacked = np.stack([one[name], two[name]])
        wanted = merging.stage.merge_tensor(values, base[name], stacked, merging.stage.tensor_key(values, name))
        np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-6, atol=1e-7)
        assert not np.array_equal(found, base[name]) or "norm" in name


def test_weights_of_one_task_vector_give_that_model(three, tmp_path):
    folder = merge(tmp_path, method="task_arithmetic", base=three[0], models=[three[1]])
    one = tensors(three[1])
    for name, found in tensors(folder).items():
        np.testing.assert_allclose(found, one[name], atol=1e-6)


def test_tied_embeddings_stay_tied(tiny_models, tmp_path):
    tied = [make(tmp_path / str(i), tiny_models["coarse"], i, tied=True) for i in range(2)]
    # A checkpoint may hold the tied tensor twice.
    values = load_file(tmp_path / "1/model.safetensors")
    save_file(values | {"lm_head.weight": values["model.embed_tokens.weight"].copy()}, tmp_path / "1/model.safetensors")
    folder = merge(tmp_path, method="linear", models=tied)
    assert "lm_head.weight" not in tensors(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert models.read_config(folder)[1].tied


def test_dtypes_of_the_base_are_kept(three, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(three[0], half)
    values = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(half / "model.safetensors").items()}
    save_file(values, half / "model.safetensors")
    folder = merge(tmp_path, method="ties", base=str(half), models=three[1:])
    assert {array.dtype for array in tensors(folder).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    folder = merge(tmp_path, method="ties", base=str(half), models=three[1:], dtype="float32")
    assert {array.dtype for array in tensors(folder).values()} == {np.dtype(np.float32)}


def test_a_merge_that_is_there_is_kept(three, tmp_path, capsys):
    values = {"method": "linear", "models": three[1:]}
    weights = merge(tmp_path, **values) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    merge(tmp_path, **values)
    assert weights.stat().st_mtime_ns == before
    assert "done before, skipped" in capsys.readouterr().out
    merge(tmp_path, **values, normalize=False)
    assert weights.stat().st_mtime_ns != before
    before = weights.read_bytes()
    for damage in (Path.unlink, lambda path: os.truncate(path, 1000)):
        damage(weights)
        merge(tmp_path, **values, normalize=False)
        assert "out: is no longer whole, merging again" in capsys.readouterr().err
        assert weights.read_bytes() == before


def test_large_models_are_split_into_shards(three, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.write, "__defaults__", (20_000,))
    folder = merge(tmp_path, method="linear", models=three[1:])
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors(folder).values())
    np.testing.assert_allclose(tensors(folder)["model.norm.weight"], np.ones(16), rtol=1e-6)


def test_the_output_is_none_of_the_models(three):
    for output in (three[1], f"{three[2]}/."):
        with pytest.raises(UserError, match=r"output: .* is one of the models that are merged"):
            settings.check(
                {"method": "linear", "models": three[1:], "output": output}, config.MergeConfig, "merge.yaml"
            )


@pytest.mark.parametrize(("key", "value", "message"), [
    *[("output", o, "output: should be a folder that the model has to itself") for o in ("", ".", "..", "x/..", "/")],
    ("seed", 2**32, "seed: .* less than 4294967296"),
])  # fmt: skip
def test_values_that_would_fail_later_are_refused(three, tmp_path, monkeypatch, key, value, message):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=message):
        merge(tmp_path, method="linear", models=three[1:], **{key: value})
    assert not list(tmp_path.glob("here/*"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"d_mlp": 48}, r"tensor model.layers.0.mlp.gate_proj.weight has shape \[48, 16\].*\[16, 16\]"),
    ({"n_layers": 3}, r"base: has no tensor model.layers.1.*, which .*other has.*of 1 layers"),
    ({"qkv_bias": True, "out_bias": True}, "base: has no tensor model.layers.0.self_attn.q_proj.bias"),
    ({"vocab_size": 360}, r"embed_tokens.weight has shape \[360, 16\].*one size and vocabulary"),
    ({"tied": True}, "has no tensor lm_head.weight"),
    ({"rope_theta": 5e5}, r"config.json: rope_theta is 500000.0, in .* it is 10000.0"),
])  # fmt: skip
def test_models_that_do_not_fit_are_refused(three, tiny_models, tmp_path, changes, message):
    other = make(tmp_path / "other", tiny_models["coarse"], 5, **changes)
    with pytest.raises(UserError, match=message):
        merge(tmp_path, method="linear", models=[three[0], other])
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(three, tiny_models, tmp_path):
    with pytest.raises(UserError, match=r"has no tensor .*; only models of one architecture.*GPTNeoXForCausalLM"):
        merge(tmp_path, method="linear", models=[three[0], tiny_models["fine"]])


def test_another_vocabulary_is_refused_by_its_row(three, tiny_models, tmp_path):
    other = make(tmp_path / "other", tiny_models["fine"], 5)
    with pytest.raises(UserError, match=r"row \d+ of model.embed_tokens.weight stands for no text, in .*base for '.+'"):
        merge(tmp_path, method="linear", models=[three[0], other])


def test_values_that_are_no_numbers_are_refused(three, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(three[0], broken)
    values = load_file(broken / "model.safetensors")
    values["model.norm.weight"][3] = np.nan
    save_file(values, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor model.norm.weight .*those of .*broken are not"):
        merge(tmp_path, method="linear", models=[three[1], str(broken)])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(("values", "message"), [
    ({"method": "linaer", "models": ["a", "b"]}, "method: .*'linear'.*linaer"),
    ({"method": "linear", "models": ["a", "b"], "densty": 1}, "unknown key densty"),
    ({"method": "linear", "models": [{"model": "a", "wieght": 1}]}, "did you mean models.0.weight"),
    ({"method": "ties", "models": ["a", "b"]}, "base: method 'ties' needs the model"),
    ({"method": "slerp", "models": ["a", "b", "c"]}, "models: method 'slerp' .*here are 3"),
    ({"method": "slerp", "models": ["a", {"model": "b", "weight": 1}]}, "models.1.weight: .*use `t`"),
    ({"method": "linear", "models": ["a", "b"], "top": 0.5}, "top: not used by method 'linear'"),
    ({"method": "linear", "models": ["a", {"model": "b", "density": 0.5}]}, "models.1.density: not used"),
    ({"method": "linear", "models": ["a", "a"]}, "a is there twice"),
    ({"method": "sce", "base": "a", "models": ["a", "b"]}, "models.0: a is the base"),
    ({"method": "greedy_soup", "models": ["a", "b"]}, "corpus: method 'greedy_soup' needs"),
    ({"method": "linear", "models": [{"model": "a", "weight": 1}, {"model": "b", "weight": -1}]}, "sum to 0"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as raised:
        merge(tmp_path, **values)
    assert "\n" not in str(raised.value)


def test_the_command(three, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "linear", "models": three[1:]}))
    cli.main(["merge", str(path), f"output={tmp_path / 'there'}", "dtype=bfloat16"])
    assert (tmp_path / "there/model.safetensors").is_file()
    assert "linear of 2 models" in capsys.readouterr().out


def test_an_output_that_cannot_be_is_found_before_a_model_is_read(three, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "fingerprint", None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/config.json: cannot be written \(Not a directory\): choose another"):
        merge(tmp_path, method="linear", models=three[1:], output=str(tmp_path / "file"))
    with pytest.raises(
        UserError,
        match=r"base: holds a model that no merge made \(config.json\); choose another `output`, or remove it",
    ):
        merge(tmp_path, method="linear", models=three[1:], output=three[0])
    with pytest.raises(UserError, match=r"x/config.json: cannot be written \(File name too long\): choose another"):
        merge(tmp_path, method="linear", models=three[1:], output=str(tmp_path / ("x" * 300)))


@pytest.mark.parametrize("name", ["model-backup.safetensors", "pytorch_model_old.bin", "tokenizer.json"])
def test_what_no_merge_made_is_never_replaced(three, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"out: holds a model that no merge made \({name}\)"):
        merge(tmp_path, method="linear", models=three[1:])
    (tmp_path / "out" / name).unlink()
    merge(tmp_path, method="linear", models=three[1:])
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_greedy_soup_keeps_what_helps(three, tmp_path, capsys):
    heldout = tmp_path / "heldout.jsonl"
    texts = ["The cat sat on the mat, and the dog sat on the log.", "import os\nimport sys\n\nprint(sys.argv)\n"]
    heldout.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = merge(tmp_path, method="greedy_soup", models=three, corpus={"path": str(heldout)}, max_length=64)
    corpus, made = CorpusConfig(path=str(heldout)), json.loads((folder / "fusejax.json").read_text())
    alone = {m: average(measure_corpus(ModelConfig(model=m), corpus, max_length=64)) for m in three}
    steps = made["steps"]
    assert [step["model"] for step in steps] == sorted(three, key=alone.__getitem__)
    soup, best = [], np.inf
    for step in steps:
        assert step["alone"] == pytest.approx(alone[step["model"]], abs=1e-6)
        assert step["joins"] == (step["with_soup"] <= best)
        if step["joins"]:
            soup, best = [*soup, step["model"]], step["with_soup"]
    found = tensors(folder)
    for name, array in found.items():
        np.testing.assert_allclose(array, np.mean([tensors(m)[name] for m in soup], 0), rtol=1e-5, atol=1e-6)
    result = average(measure_corpus(ModelConfig(model=str(folder)), corpus, max_length=64))
    assert result == pytest.approx(best, abs=1e-6)
    assert result <= min(alone.values())
    assert f"{len(soup)} of 3 models" in capsys.readouterr().out
    assert not list(tmp_path.glob(".out*"))


def test_greedy_soup_tells_revisions_of_one_model_apart(three, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fusejax.hub.refuse_revision", lambda *_: None)  # as if the folder were a hub name
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"text": "The cat sat on the mat."}) + "\n")
    given = [three[0], {"model": three[0], "revision": "v2"}]
    folder = merge(tmp_path, method="greedy_soup", models=given, corpus={"path": str(heldout)}, max_length=64)
    steps = json.loads((folder / "fusejax.json").read_text())["steps"]
    assert [step["model"] for step in steps] == [three[0], f"{three[0]} (revision v2)"]
    assert "2 of 2 models" in capsys.readouterr().out
