"""Broken models and corpora are refused before any stage works."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusejax import cli, config, export, models, plan, preflight
from fusejax.errors import UserError


@pytest.fixture
def job(tiny_models, tmp_path):
    """A function: (change of the source's folder, change of the corpus) → the error's line, "" for none."""

    def run(break_model=None, documents=None, check=preflight.check, **changes):
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(tiny_models["fine"], source)
        if break_model:
            break_model(source)
        text = tmp_path / "corpus.jsonl"
        text.write_text(json.dumps({"text": "A cat."}) + "\n")
        values = {
            "target": tiny_models["coarse"],
            "sources": [str(source)],
            "corpus": documents or {"path": str(text)},
            "output": str(tmp_path / "output"),
        }
        line = ""
        try:
            check(config.validate(values | changes))
        except UserError as error:
            line = str(error)
        assert "\n" not in line
        assert not (tmp_path / "output").exists()
        return line

    return run


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def remove(*patterns):
    def edit(folder):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return edit


def test_whole_models_pass_without_reading_a_tensor(job, monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(np, "frombuffer", read)
    assert job() == ""


def test_what_a_folder_lacks_is_said_in_one_line(job):
    line = job(remove("*"))
    assert "source: " in line
    assert all(part in line for part in ("config.json", "model.safetensors", "tokenizer.json"))
    line = job(remove("tokenizer*", "vocab*", "merges*", "special_tokens_map.json"))
    assert "tokenizer.json" in line
    assert "config.json" not in line
    assert "weights" in job(remove("*.safetensors"))


def test_config_json_gets_the_blame_for_its_own_faults(job):
    assert "config.json: not valid JSON" in job(lambda folder: (folder / "config.json").write_text("{,"))
    assert "config.json" in job(edit_config(architectures=["Unheard"], model_type="unheard"))


def test_weights_are_compared_by_name_and_shape(job):
    first = "gpt_neox.final_layer_norm.weight"
    assert f"{first} is missing" in job(edit_weights(lambda tensors: tensors.pop(first)))
    assert "tensor strange is unknown" in job(
        edit_weights(lambda tensors: tensors.update(strange=np.zeros(2, np.float32)))
    )
    wrong = np.zeros(3, np.float32)
    assert f"{first} has shape [3]" in job(edit_weights(lambda tensors: tensors.update({first: wrong})))

    def cut(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-10])

    assert "cannot be read as safetensors" in job(cut)


def test_tokenizers_must_load_and_fit(job, tiny_models):
    def swap(folder):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{tiny_models['coarse']}/{name}", folder / name)

    assert "tokenizer does not fit" in job(swap)
    assert "no tokenizer can be loaded" in job(lambda folder: (folder / "tokenizer.json").write_text("{}"))

    def empty(folder):
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        values["model"] |= {"vocab": {}, "merges": []}
        path.write_text(json.dumps(values))

    assert "its tokenizer has no tokens" in job(empty)


def test_corpora_are_opened(job, tmp_path):
    assert "no such corpus" in job(documents={"path": str(tmp_path / "none.jsonl")})
    assert "no key 'body'" in job(documents={"path": str(tmp_path / "corpus.jsonl"), "text_key": "body"})
    assert "no such corpus" in job(evaluation={"corpus": {"path": str(tmp_path / "none.jsonl")}})
    (tmp_path / "empty.jsonl").write_text("")
    assert "no documents" in job(documents={"path": str(tmp_path / "empty.jsonl")})
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "a"}\n')
    assert "not a gzip file" in job(documents={"path": str(tmp_path / "plain.jsonl.gz")})


def test_hub_names_are_left_alone_and_missing_folders_are_not(job, tmp_path, monkeypatch):
    monkeypatch.setattr(models.files, "cached_folder", lambda *_: None)
    hub = {"path": "huggingface:owner/set"}
    assert job(target="owner/unknown-7b", documents=hub, evaluation={"corpus": hub}) == ""
    assert "no such folder" in job(target=str(tmp_path / "nowhere"))


def test_cached_models_are_checked_as_far_as_they_are_there(job, tiny_models, tmp_path, monkeypatch):
    cached = tmp_path / "cached"
    shutil.copytree(tiny_models["coarse"], cached)
    monkeypatch.setattr(models.files, "cached_folder", lambda *_: cached)
    assert job(target="owner/cached") == ""
    (cached / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be read as safetensors" in job(target="owner/cached")
    (cached / "model.safetensors").unlink()
    assert job(target="owner/cached") == ""


def test_the_plan_refuses_them_too(job):
    assert "lacks" in job(remove("tokenizer.json"), check=plan.show)


def test_documents_longer_than_learned_positions(job, tiny_models):
    def gpt2(folder):
        values = {"model_type": "gpt2", "vocab_size": 280, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
        export.save(models.init(models.decoder_config(values), 0), values, folder, tokenizer_from=tiny_models["fine"])

    assert job(gpt2, max_length=40) == ""
    line = job(gpt2, max_length=41)
    assert line.endswith("has positions for 40 tokens, max_length asks for 41: set max_length to 40 or less")


def test_documents_longer_than_the_context_are_a_warning(job, capsys):
    assert job(max_length=65) == ""
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2
    assert all("was made for 64 tokens, max_length asks for 65; it may do worse there" in line for line in warned)


@pytest.mark.parametrize(("changes", "message"), [
    ({"kernels": {"fusion_loss": "tpu"}}, "kernels.fusion_loss: 'tpu' needs a TPU, here is cpu"),
    ({"kernels": {"topk_unembed": "tpu"}}, "kernels.topk_unembed: 'tpu' needs a TPU, here is cpu"),
    ({"attention": "splash"}, "attention: splash runs on TPUs, not on cpu; use auto or xla"),
    ({"attention": "cudnn"}, "attention: cudnn runs on NVIDIA GPUs, not on cpu"),
    ({"mesh": {"data": 4096}, "batch": {"sequences": 4096}}, "needs 4096 devices"),
    ({"attention": "xla", "kernels": {"fusion_loss": "xla"}}, ""),
])  # fmt: skip
def test_what_the_devices_cannot_do_is_refused(job, changes, message):
    line = job(check=preflight.check_devices, **changes)
    assert message in line
    assert bool(line) == bool(message)


def test_attention_is_traced_for_every_model(job, monkeypatch):
    monkeypatch.setattr(models.attention, "objection", lambda name, query, tokens, *_: (
        "takes no segment ids" if tokens.segments_BL is not None else None
    ))  # fmt: skip
    monkeypatch.setattr("fusejax.models.attention_kernels.cudnn", lambda query, *_: query)
    assert "takes no segment ids" in job(check=preflight.check_devices, attention="cudnn")
    assert job(check=preflight.check_devices, attention="cudnn", batch={"sequences": 2, "packed": False}) == ""
    assert job(check=lambda config: preflight.check_devices(config, training=False), attention="cudnn") == ""


@pytest.mark.parametrize("command", ["sources", "train"])
def test_single_stages_refuse_before_they_write(tiny_models, tmp_path, command):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({
        "target": tiny_models["coarse"], "sources": [tiny_models["fine"]], "corpus": {"path": "x"},
        "attention": "splash", "output": str(tmp_path / "output"),
    }))  # fmt: skip
    with pytest.raises(UserError, match="attention: splash runs on TPUs"):
        cli._command([command, str(path)])
    assert not (tmp_path / "output").exists()


def test_a_plan_may_be_made_on_another_machine(job, capsys):
    assert job(check=plan.show, kernels={"fusion_loss": "tpu"}) == ""
    assert "this machine cannot run the job: kernels.fusion_loss: 'tpu' needs a TPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters", "known_by"),
    [
        ("a/model-10.7B", 10.7e9, "by its name"),
        ("a/small-270m-it", 270e6, "by its name"),
        ("a/Mixtral-8x7B-DPO", None, "unknown until it is fetched"),
        ("a/model", None, "unknown until it is fetched"),
    ],
)
def test_sizes_by_name(name, parameters, known_by):
    size = plan.model_size(config.ModelConfig(model=name))
    assert size.known_by == known_by
    assert size.parameters == parameters or (parameters is None and np.isnan(size.parameters))
