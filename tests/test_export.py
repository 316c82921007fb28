import json
import os
import stat
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from fusejax import export, models
from fusejax.errors import UserError
from fusejax.training import exporting

CONFIGS = {
    "llama": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=30, hidden_size=16, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, initializer_range=0.4,
    ),
    "mpt": dict(
        architectures=["MPTForCausalLM"], model_type="mpt", vocab_size=30, d_model=16, n_heads=2, n_layers=2,
        initializer_range=0.4, auto_map={"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
    ),
    "gpt_neox": dict(
        architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox", vocab_size=30, hidden_size=16,
        intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, rotary_pct=0.5, initializer_range=0.4,
        torch_dtype="float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_then_export_gives_equal_bits(family, dtype, tmp_path):
    values = CONFIGS[family]
    export.save(models.init(models.decoder_config(values), 0), values, tmp_path / "a", dtype=dtype)
    model, (loaded, _) = models.load(tmp_path / "a"), models.read_config(tmp_path / "a")
    export.save(model, loaded, tmp_path / "b", dtype=dtype)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
        assert tensor.tobytes() == other[name].tobytes()
    assert loaded["dtype"] == dtype
    assert not {"torch_dtype", "auto_map"} & loaded.keys()
    with safe_open(tmp_path / "a" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_gives_the_same_logits(family, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    values = CONFIGS[family]
    model = models.init(models.decoder_config(values), 0)
    export.save(model, values, tmp_path / "model", max_shard_bytes=3000)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = np.random.default_rng(0).integers(0, 30, (2, 12))
    with torch.no_grad():
        wanted = reference(torch.tensor(ids)).logits.numpy()
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(jax.jit(lambda ids: model(ids))(ids), wanted, rtol=0, atol=1e-4)


def save_llama(folder, seed=0, **options):
    values = CONFIGS["llama"]
    return export.save(models.init(models.decoder_config(values), seed), values, folder, **options)


def test_shards_have_an_index_and_stay_below_the_limit(tmp_path):
    folder = save_llama(tmp_path / "model", max_shard_bytes=3000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= 3000


def test_tokenizer_and_generation_config_go_along(tmp_path):
    (tmp_path / "from").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt"):
        (tmp_path / "from" / name).write_text(f"{{}} {name}")
    folder = save_llama(tmp_path / "model", tokenizer_from=tmp_path / "from")
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip
    assert (folder / "tokenizer.json").read_text() == "{} tokenizer.json"


def test_takes_the_place_of_a_model_and_of_nothing_else(tmp_path):
    folder = save_llama(tmp_path / "model", max_shard_bytes=3000)
    mine = {"README.md", "model-backup.safetensors", "pytorch_model_old.bin", "model.index.json"}
    for name in mine:
        (folder / name).write_text("mine")
    for name in ("tokenizer.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"):
        (folder / name).write_text("old")
    save_llama(folder, seed=1)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", *mine}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_replacing_left_is_kept(tmp_path):
    folder = save_llama(tmp_path / "model")
    (folder / "README.md").write_text("mine")
    folder.rename(tmp_path / ".model.old")
    save_llama(folder, seed=1)
    (tmp_path / ".model.old").mkdir()
    (folder / "README.md").rename(tmp_path / ".model.old/README.md")
    save_llama(folder, seed=2)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    folder = save_llama(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to("model")
    save_llama(tmp_path / "link", seed=1)
    assert (tmp_path / "link").is_symlink()
    assert (folder / "model.safetensors").read_bytes() != before


def test_a_mount_point_is_found_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)  # which a test cannot mount
    with pytest.raises(UserError, match="is a mount point, which cannot be renamed; choose another `output`"):
        save_llama(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
    lambda folder: os.truncate(folder / "model-00002-of-00002.safetensors", 1000),
    lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
    lambda folder: (folder / "config.json").unlink(),
    lambda folder: (folder / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"vocab_size": 31})),
])  # fmt: skip
def test_what_is_not_whole_is_seen(tmp_path, damage):
    folder = save_llama(tmp_path / "model", max_shard_bytes=12_000)
    assert export.is_whole(folder)
    damage(folder)
    assert not export.is_whole(folder)


def test_of_a_model_in_a_bucket_only_the_files_are_looked_for(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "model", max_shard_bytes=12_000)
    monkeypatch.setattr(export.paths, "is_remote", lambda path: True)
    monkeypatch.setattr(export.convert, "match", None)  # it would read through the file
    assert export.is_whole(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert not export.is_whole(folder)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1000)])
def test_a_damaged_export_is_made_again(make_job, tmp_path, capsys, monkeypatch, damage):
    job, values = make_job(), CONFIGS["llama"]
    model = models.init(models.decoder_config(values), 0)
    restored = nullcontext(SimpleNamespace(restore=lambda state: (1, state)))
    monkeypatch.setattr(exporting, "read_record", lambda folder: {"done": True, "inputs": {}, "steps": 1})
    monkeypatch.setattr(exporting, "Checkpoints", lambda *_: restored)
    monkeypatch.setattr(models, "read_config", lambda folder: (values, model.config))
    trainer = SimpleNamespace(state=None, model=lambda state: model)
    monkeypatch.setattr(exporting.Trainer, "make", lambda *_, **options: trainer)
    exporting.export_run(job, "fused")
    weights = job.folder / "export/model.safetensors"
    before = weights.read_bytes()
    exporting.export_run(job, "fused")
    assert "export fused: done before, skipped" in capsys.readouterr().out
    damage(weights)
    exporting.export_run(job, "fused")
    assert weights.read_bytes() == before
    assert "export: is no longer whole, exporting again" in capsys.readouterr().err


def test_a_failure_leaves_the_old_model(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()

    def full(*args, **options):
        raise export.SafetensorError("Error: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match=r"model: cannot be written .* free some space"):
        save_llama(folder, seed=1)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_not_writable(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="cannot be written"):
        save_llama(tmp_path / "model")


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_llama(tmp_path / "file" / "model")


def test_hf_config_of_another_model(tmp_path):
    values = CONFIGS["llama"]
    model = models.init(models.decoder_config(values), 0)
    with pytest.raises(UserError, match="hf_config describes another model"):
        export.save(model, values | {"hidden_size": 32}, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_says_what_transformers_would_leave_out(tmp_path, capsys):
    values = CONFIGS["mpt"] | {"attn_config": {"alibi_bias_max": 4, "qk_ln": True}}
    export.save(models.init(models.decoder_config(values), 0), values, tmp_path / "model")
    assert "MptForCausalLM leaves out attn_config.qk_ln: true, attn_config.alibi_bias_max" in capsys.readouterr().err


def test_others_may_read_what_the_umask_allows(tiny_models):
    """As any file: safetensors alone would leave the weights readable by their owner only."""
    folder = Path(tiny_models["coarse"])
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_file_in_the_place_of_the_folder_stays(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("text")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"), export.written(file):
        pytest.fail("nothing should be made")
    assert file.read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
