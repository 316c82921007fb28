import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from model_zoo import CASES
from safetensors.numpy import load_file, save_file

from fusejax import export, models, sharding
from fusejax.errors import UserError
from fusejax.models import convert, families, loading

LLAMA = models.DecoderConfig(
    vocab_size=20, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_mlp=12, max_length=16, rotary_dim=4
)
NEOX = dict(
    model_type="gpt_neox", vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, rotary_pct=0.5,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    export.save(models.init(LLAMA, 0), models.hf_config(LLAMA, "llama"), tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit, file="model.safetensors"):
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def check_refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, nnx.split(left)[1], nnx.split(right)[1])


def test_round_trip(folder):
    equal(models.load(folder), models.init(LLAMA, 0))


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral", "falcon-new", "stablelm-qk_layernorm", "gpt2"])
@pytest.mark.parametrize("with_mesh", [False, True])
def test_large_parameters_are_written_piece_by_piece(name, with_mesh, tmp_path, monkeypatch):
    config = models.decoder_config(CASES[name])
    export.save(models.init(config, 0), CASES[name], tmp_path / "model", max_shard_bytes=20_000)
    monkeypatch.setattr(loading, "_SMALL", 0)
    mesh = sharding.make_mesh() if with_mesh else None
    equal(models.load(tmp_path / "model", mesh), models.init(config, 0))


def test_large_models_show_progress(folder, monkeypatch, capsys):
    monkeypatch.setattr(loading, "_SHOW_PROGRESS_ABOVE", 0)
    equal(models.load(folder), models.init(LLAMA, 0))
    assert "load model: 12/12" in capsys.readouterr().out


def test_unknown(folder):
    change(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)}))
    check_refused(folder, r"model\.safetensors: tensor model\.layers\.2\.mlp\.up_proj\.weight is unknown")


def test_listed_buffers_are_ignored(folder, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    equal(models.load(folder), models.init(LLAMA, 0))
    neox = tmp_path / "neox"
    export.save(models.init(models.decoder_config(NEOX), 0), NEOX, neox)
    name = "gpt_neox.layers.1.attention.bias"
    change(neox, lambda tensors: tensors.update({name: np.ones((1, 1, 4, 4), bool)}))
    equal(models.load(neox), models.init(models.decoder_config(NEOX), 0))


def test_missing(folder):
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    check_refused(folder, r"model\.safetensors: tensor lm_head\.weight is missing")


def test_misshapen(folder):
    change(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(9, np.float32)}))
    check_refused(folder, r"tensor model\.norm\.weight has shape \[9\], config\.json makes it \[8\]")


def test_transposed_is_misshapen(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    check_refused(folder, r"layers\.1\.mlp\.up_proj\.weight has shape \[8, 12\], config\.json makes it \[12, 8\]")


def test_wrong_dtype(folder):
    change(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(8, np.int8)}))
    check_refused(folder, r"tensor model\.norm\.weight is stored as I8; supported: F64, F32, F16, BF16")


def test_tied_copy_must_be_equal(folder):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    check_refused(folder, r"tensor lm_head\.weight differs from model\.embed_tokens\.weight, though config\.json ties")
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert models.load(folder).config.tied


def test_both_names_of_one_tensor(tmp_path):
    export.save(models.init(models.decoder_config(NEOX), 0), NEOX, tmp_path / "model")
    change(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": tensors["embed_out.weight"]}))
    check_refused(tmp_path / "model", r"tensor lm_head\.weight is duplicate: it is embed_out\.weight too")


@pytest.fixture
def sharded(tmp_path):
    export.save(models.init(LLAMA, 0), models.hf_config(LLAMA, "llama"), tmp_path / "model", max_shard_bytes=2000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    return tmp_path / "model"


def test_sharded(sharded):
    equal(models.load(sharded), models.init(LLAMA, 0))


def test_duplicate_in_two_files(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    change(sharded, lambda tensors: tensors.update({name: load_file(first)[name]}), second.name)
    check_refused(sharded, f"{second.name}: tensor {name} is duplicate: {first.name} holds it too")


def test_index_names_a_tensor_that_its_file_has_not(sharded):
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    name = next(iter(load_file(file)))
    change(sharded, lambda tensors: tensors.pop(name), file.name)
    check_refused(sharded, f"{file.name}: tensor {name} is missing, though model.safetensors.index.json names it")


def test_index_names_a_file_that_is_not_there(sharded):
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.unlink()
    check_refused(sharded, f"index.json: names {file.name}, which is not there")


def test_truncated_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    check_refused(folder, r"model\.safetensors: cannot be read as safetensors")
    (folder / "model.safetensors").write_bytes(b"")
    check_refused(folder, r"model\.safetensors: cannot be read as safetensors")


def test_interleaved_and_stacked_tensors_split_as_documented():
    """GPT-NeoX: for each head its query, key and value rows; the inverse puts them back."""
    config = models.decoder_config(NEOX)
    shapes, family = convert.param_shapes(config), families.find(NEOX, "test")
    tensor = next(t for t in family.tensors(config) if t.groups > 1)
    array = np.arange(24 * 8, dtype=np.float32).reshape(24, 8)
    query, key, value = (convert.to_param(tensor, array, part, shapes) for part in range(3))
    assert query.shape == (8, 2, 4)
    np.testing.assert_array_equal(query[:, 1].T, array[12:16])
    np.testing.assert_array_equal(key[:, 1].T, array[16:20])
    np.testing.assert_array_equal(value[:, 0].T, array[8:12])
    np.testing.assert_array_equal(convert.from_params(tensor, [query, key, value]), array)


def test_parameter_dtype(folder):
    model = models.load(folder, dtype="bfloat16")
    for narrow, wide in zip(*(jax.tree.leaves(nnx.split(m)[1]) for m in (model, models.load(folder))), strict=True):
        np.testing.assert_array_equal(narrow, np.asarray(wide).astype(ml_dtypes.bfloat16))


def test_pytorch_weights(folder):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    for i, half in enumerate(halves, 1):
        torch.save({name: tensors[name].bfloat16() for name in half}, folder / f"pytorch_model-0000{i}-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, half in enumerate(halves, 1) for name in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    wanted = jax.tree.map(lambda x: np.asarray(x, ml_dtypes.bfloat16), nnx.split(models.init(LLAMA, 0))[1])
    jax.tree.map(np.testing.assert_array_equal, nnx.split(models.load(folder))[1], wanted)
    torch.save([1], folder / "pytorch_model.bin")
    check_refused(folder, r"pytorch_model\.bin: should hold tensors by name")
    (folder / "pytorch_model.bin").write_bytes(b"nothing")
    check_refused(folder, r"pytorch_model\.bin: cannot be read as PyTorch weights")


def test_pytorch_weights_without_torch(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    check_refused(folder, r"pytorch_model\.bin: reading PyTorch's own format needs torch: `pip install torch`")
