"""`fusejax plan --topology` with the real compilers: its numbers are theirs, and what it proposes fits."""

import json
from pathlib import Path

import jax
import pytest
from fusejax.kernels.placement import platform_of

from fusejax import aot, cli, config, models, sharding
from fusejax.models import published

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def plan(devices, tmp_path, capsys):
    """A function that runs `fusejax plan` for a machine; its JSON."""

    def run(path, topology, *arguments):
        devices(topology)
        cli.main(["plan", str(path), "--topology", topology, "--json", str(tmp_path / "plan.json"), *arguments])
        print(capsys.readouterr().out)
        return json.loads((tmp_path / "plan.json").read_text())

    return run


@pytest.fixture
def small_job(tmp_path):
    """(path of a job with a small model of which only the shape is there, options that name it)."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    values = {
        "target": "some/model", "sources": ["some/model"], "max_length": 512, "mesh": "auto",
        "corpus": {"path": "huggingface:some/text", "expected_tokens": 10**6},
        "batch": {"sequences": 16}, "cache": {"batch_tokens": 8192},
    }  # fmt: skip
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(values))
    return path, ["--shape", f"some/model={tmp_path / 'config.json'}"]


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "h100:4"])
def test_memory_is_the_compilers(plan, small_job, devices, topology):
    path, options = small_job
    found = plan(path, topology, *options)
    assert found["devices"] == 4
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    job, shape = aot.without_cudnn(config.load(path), devices(topology)), models.decoder_config(SMALL)
    calls = {
        "model": aot.source_call(job, job.sources[0], shape, devices(topology)),
        "train": aot.train_call(job, shape, devices(topology), source_vocabularies=[4096]),
    }
    for stage in found["stages"]:
        assert stage["fits"]
        call = calls[stage["name"]]
        with aot._on_abstract_device(call.arguments):
            function, static = call.function, ()
            if stage["name"] == "model":
                function, static = function.func, function.args
            analysis = function.lower(*static, *call.arguments).compile().memory_analysis()
        assert stage["memory"]["arguments"] == analysis.argument_size_in_bytes
        assert stage["memory"]["temporaries"] == analysis.temp_size_in_bytes
        assert stage["memory"]["peak"] == analysis.peak_memory_in_bytes
        # Shapes alone say what the arguments take, but for the padding to tiles, which is much of so small a model.
        assert call.argument_bytes <= analysis.argument_size_in_bytes < 1.3 * call.argument_bytes
        assert sum(traffic["bytes"] for traffic in stage["collectives"].values()) > 0


@pytest.mark.parametrize(("topology", "platforms"), [("v5e:1x1", ["tpu"]), ("h100:1", ["gpu", "cuda"])])
def test_one_device_is_compiled_for_its_own_platform(plan, small_job, devices, topology, platforms):
    """Kernels choose their blocks by the platform, which is not the one that compiles."""
    path, options = small_job
    placement = sharding.placement(sharding.make_mesh(config.MeshConfig(), devices(topology)))
    assert platform_of(placement) in platforms
    found = plan(path, topology, *options)
    assert found["devices"] == 1
    assert all(stage["fits"] for stage in found["stages"])


def test_data_goes_over_two_slices(devices, plan, small_job):
    devices("v5e:2x2")
    mesh = sharding.make_mesh(config.MeshConfig(data=-1, fsdp=-1), aot.topology("v5e:2x2", slices=2))
    assert [[device.slice_index for device in row] for row in mesh.devices[:, :, 0]] == [[0] * 4, [1] * 4]
    path, options = small_job
    found = plan(path, "v5e:2x2", "--slices", "2", "--only", "train", *options)
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    # Each device's quarter of the gradients goes from slice to slice, in 2 or 4 bytes.
    parameters = models.count_parameters(models.decoder_config(SMALL))
    sent = found["stages"][0]["collectives"]["between slices"]["bytes"]
    assert parameters * 2 / 4 <= sent <= 1.1 * parameters * 4 / 4


@pytest.mark.parametrize("changes", [["lora={rank: 4}"], ["optimizer.frozen=[embedding, blocks.0]"]])
def test_less_is_trained_less_is_held(plan, small_job, changes):
    path, options = small_job
    whole, part = (
        plan(path, "v5e:2x2", "--only", "train", *options, *more)["stages"][0]["memory"]["arguments"]
        for more in ([], changes)
    )
    assert part < whole


@pytest.mark.slow
def test_a_1b_model_that_does_not_fit_gets_a_change_that_does(plan, tmp_path):
    """Without remat a batch of 32 sequences a chip is too much for v5e; a change is found, and fits as it is said."""
    path = tmp_path / "job.yaml"
    values = {
        "target": "EleutherAI/pythia-1b", "mesh": "auto", "batch": {"sequences": 128},
        "corpus": {"path": "huggingface:some/text", "expected_tokens": 10**8},
    }  # fmt: skip
    path.write_text(json.dumps(values))
    (stage,) = plan(path, "v5e:2x2")["stages"]
    assert not stage["fits"]
    assert stage["memory"]["spare"] >= 0
    job = config.load(path, stage["change"])
    shape = models.decoder_config(published.CONFIGS["EleutherAI/pythia-1b"])
    assert aot.train_call(job, shape, aot.topology("v5e:2x2")).compile().peak == stage["memory"]["peak"]


@pytest.mark.parametrize(("topology", "chips"), [("v5e:4x4", 4), ("v5p:2x2x2", 4), ("v6e:2x4", 4), ("h100:2x8", 8)])
def test_sources_are_compiled_for_one_process(devices, topology, chips):
    """A process' own chips of a slice have numbers that libtpu aborts on: they stand for a slice of their own."""
    own = aot.one_process(topology, devices(topology))
    assert len(own) == chips
    job = config.validate({"target": "t", "sources": ["s"], "corpus": {"path": "c"}, "mesh": "auto", "max_length": 512})
    job = aot.without_cudnn(job, own)
    call = aot.source_call(job, job.sources[0], models.decoder_config(SMALL), devices(topology), own)
    assert call.compile().peak > 0


def test_usable_memory_is_what_the_compiler_says(devices):
    for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        machine = devices(topology)
        whole = sharding.replicated(sharding.make_mesh(devices=machine[:1]))
        too_much = jax.ShapeDtypeStruct((120, 1 << 28), "float32", sharding=whole)
        with pytest.raises(aot.DoesNotFitError) as refused:
            aot.compile_for(jax.jit(lambda x: x * 2), too_much)
        assert refused.value.available == pytest.approx(aot.usable_memory(machine), rel=1e-3)
