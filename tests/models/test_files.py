import json
import time

import pytest

from fusejax import export, models
from fusejax.errors import UserError
from fusejax.models import files

TINY = models.DecoderConfig(
    vocab_size=8, d_model=4, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_mlp=4, max_length=8, rotary_dim=4
)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "runs/x/nowhere", "~/nowhere-at-all", "no where"])
def test_missing_folder(path):
    with pytest.raises(UserError, match="no such folder"):
        models.load(path)


def test_missing_folder_beside_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="models/typo: no such folder"):
        models.load("models/typo")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; a model is a folder"):
        models.load(tmp_path / "file")


def test_folder_without_config_or_weights(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="should hold a JSON object"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(models.hf_config(TINY, "llama")))
    with pytest.raises(UserError, match=r"holds no weights; expected model\.safetensors"):
        models.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        models.load(tmp_path)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_out_of_reach(offline, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub 127.0.0.1 cannot be reached"
    with pytest.raises(
        UserError, match=f"^model 'someone/some-model' is neither a folder here nor in the local cache, and {reason}"
    ) as error:
        models.load("someone/some-model")
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 20


def test_fingerprint(tmp_path):
    def make(name, seed, **changes):
        values = models.hf_config(TINY, "llama") | changes
        export.save(models.init(models.decoder_config(values), seed), values, tmp_path / name)
        return models.fingerprint(tmp_path / name)

    first = make("a", 0)
    assert first == make("b", 0, bos_token_id=5, transformers_version="1")
    assert first != make("c", 1)
    assert first != make("d", 0, rms_norm_eps=1e-4)
    assert len(first) == 16


def test_fingerprint_of_large_files_samples_them(tmp_path, monkeypatch):
    from fusejax.models import files

    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(files, "_HASHED_WHOLE", 0)
    data = bytearray(3 << 20)
    path.write_bytes(data)
    first = files.weights_fingerprint(tmp_path)
    assert first == files.weights_fingerprint(tmp_path)
    data[2 << 20] = 1
    path.write_bytes(data)
    assert first != files.weights_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [({"a": 5, "b": "x"}, "names 5, which is not there"), ({"a": "../m.safetensors"}, "a file of its own folder")],
)
def test_a_damaged_index(tmp_path, names, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=message):
        files.tensors(tmp_path)


@pytest.mark.parametrize("wrong", ["int8", "foo", None.__class__, 3])
def test_dtypes_that_are_none(tiny_models, wrong):
    with pytest.raises(UserError, match="should be float32 or bfloat16"):
        models.load(tiny_models["coarse"], dtype=wrong)
