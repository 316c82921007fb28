"""Logits equal those of transformers' own torch classes, for every family and switch; exports are the same tensors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_zoo import CASES, LENGTH, V, torch_logits, torch_model
from safetensors.numpy import load_file, save_file

from fusejax import export, models

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


# Those that differ in their tensors; the other switches are in config.json alone.
EXPORTED = {
    *("llama-gqa", "llama-tied", "llama-biases", "mistral", "mixtral", "qwen2-tied", "qwen3-biases", "gemma-biases"),
    *("gemma2", "gemma3", "mpt", "mpt-qk_ln-biases", "neox", "neox-no-attention_bias", "neox-tied", "phi3"),
    *("stablelm-parallel", "stablelm-qk_layernorm", "gpt2", "gpt2-untied", "gptj", "gptj-tied", "opt", "opt-350m"),
    *("opt-no-final-norm", "opt-no-bias", "bloom", "bloom-6-heads", "falcon", "falcon-all-heads", "falcon-new"),
    *("falcon-new-one-norm", "falcon-sequential", "falcon-alibi"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(transformers' model, its folder, ours)."""
    values = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    reference = torch_model(values)
    reference.save_pretrained(folder)
    if values["model_type"] == "mpt":  # a published folder, from before transformers had the class
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace("MptForCausalLM", "MPTForCausalLM"))
    return reference, folder, models.load(folder)


def rows():
    """ids, segments and positions, [4, L]: one document, padded on the right, on the left, two documents."""
    ids = np.random.default_rng(1).integers(0, V - 4, (4, LENGTH))
    ids[0, :3] = V - 1
    segments = np.ones((4, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (4, 1))
    segments[1, 15:] = 0
    segments[2, :7] = 0
    positions[2] = np.maximum(positions[2] - 7, 0)
    segments[3, 9:] = 2
    positions[3, 9:] -= 9
    return ids, segments, positions


def check(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))


def test_logits_equal_torch(case):
    reference, _, model = case
    ids, segments, positions = rows()
    logits = np.asarray(jax.jit(lambda *args: model(*args))(jnp.asarray(ids), segments, positions))
    assert np.isfinite(logits).all()
    assert logits.dtype == np.float32
    assert np.abs(logits).max() > 1
    check(logits[0], torch_logits(reference, ids[0]))
    check(logits[1, :15], torch_logits(reference, ids[1], segments[1])[:15])
    check(logits[2, 7:], torch_logits(reference, ids[2], segments[2])[7:])
    check(logits[3, :9], torch_logits(reference, ids[3, :9]))
    check(logits[3, 9:], torch_logits(reference, ids[3, 9:]))


def all_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", sorted(EXPORTED), indirect=True)
def test_load_then_export_gives_the_same_tensors(case, tmp_path):
    reference, folder, model = case
    values, _ = models.read_config(folder)
    export.save(model, values, tmp_path / "float32", max_shard_bytes=20_000)
    assert len(list((tmp_path / "float32").glob("*.safetensors"))) > 1
    before, after = all_tensors(folder), all_tensors(tmp_path / "float32")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    export.save(model, values, tmp_path / "bfloat16", dtype="bfloat16")
    export.save(models.load(tmp_path / "bfloat16", dtype="bfloat16"), values, tmp_path / "again", dtype="bfloat16")
    narrow, again = all_tensors(tmp_path / "bfloat16"), all_tensors(tmp_path / "again")
    assert {name: array.tobytes() for name, array in narrow.items()} == {
        name: array.tobytes() for name, array in again.items()
    }
    if values["model_type"] != "mpt":
        back, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "float32", attn_implementation=reference.config._attn_implementation, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        ids = rows()[0][0]
        np.testing.assert_array_equal(torch_logits(back, ids), torch_logits(reference, ids))


def test_configuration_round_trip(case):
    """What `hf_config` writes means the same, to us and to transformers."""
    _, folder, model = case
    values = models.hf_config(model.config, json.loads((folder / "config.json").read_text())["model_type"])
    assert models.decoder_config(values) == model.config


def renamed(folder, target, rename):
    """The folder with each tensor under the name rename(name), or split or joined where that gives several."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(rename(all_tensors(folder)), target / "model.safetensors")
    return target


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")])
def test_first_releases_have_shorter_names(name, prefix, tmp_path):
    torch_model(CASES[name]).save_pretrained(tmp_path / "new")
    old = renamed(
        tmp_path / "new", tmp_path / "old", lambda all: {name.removeprefix(prefix): x for name, x in all.items()}
    )
    assert not any(name.startswith(prefix) for name in all_tensors(old))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(models.load(old)), nnx.state(models.load(tmp_path / "new")))


def test_stacked_experts(tmp_path):
    """As transformers 5 holds them in memory: one tensor of all experts' gates and ups, one of their downs."""
    reference = torch_model(CASES["mixtral"])
    reference.save_pretrained(tmp_path / "apart")
    memory = {name: parameter.detach().numpy() for name, parameter in reference.named_parameters()}
    assert memory["model.layers.0.mlp.experts.gate_up_proj"].shape == (5, 88, 32)
    stacked = renamed(tmp_path / "apart", tmp_path / "stacked", lambda _: memory)
    apart = models.load(tmp_path / "apart")
    assert any("experts.4.w1" in name for name in all_tensors(tmp_path / "apart"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(models.load(stacked)), nnx.state(apart))


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "llama-yarn", "gemma3", "gptj", "neox"])
def test_far_positions(name, tmp_path):
    """Positions beyond any context; rotary angles of thousands of radians keep their accuracy."""
    values = CASES[name] | ({"n_positions": 5000} if name == "gptj" else {})
    reference = torch_model(values)
    reference.save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(0, V, (1, LENGTH))
    positions = np.arange(4000, 4000 + LENGTH, dtype=np.int32)[None]
    with torch.no_grad():
        wanted = reference(torch.tensor(ids), position_ids=torch.tensor(positions.astype(np.int64))).logits.numpy()
    check(jax.jit(lambda model, *args: model(*args))(models.load(tmp_path), ids, None, positions), wanted)
