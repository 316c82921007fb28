"""What `fusejax plan --topology` does around compiling: shapes, estimates, the search for what fits, its messages."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fusejax import aot, cli, config, fitting, flops, machine_plan, models, sharding
from fusejax.aot import DoesNotFitError, Program
from fusejax.config import MeshConfig
from fusejax.errors import UserError
from fusejax.fitting import Candidate, Outcome
from fusejax.hlo import Traffic
from fusejax.models import published
from fusejax.plan_command import Options

JOB = {
    "target": "meta-llama/Llama-2-7b-hf", "sources": ["mosaicml/mpt-7b"], "output": "runs/job",
    "corpus": {"path": "huggingface:some/text", "expected_tokens": 10**9},
    "batch": {"sequences": 64}, "mesh": {"fsdp": 8}, "remat": "none", "cache": {"batch_tokens": 16384},
}  # fmt: skip
GIB = 1 << 30


@pytest.fixture
def job():
    return config.validate(JOB)


@pytest.fixture
def eight():
    """Devices that only say what they are."""

    class Device:
        device_kind, platform, process_index, slice_index = "TPU v5", "tpu", 0, 0

    return [Device() for _ in range(8)]


def shapes(job):
    return machine_plan.model_shapes(job)


def test_published_sizes_are_those_of_the_models():
    counts = {name: models.count_parameters(models.decoder_config(keys)) for name, keys in published.CONFIGS.items()}
    assert counts["meta-llama/Llama-2-7b-hf"] == 6_738_415_616
    assert counts["mosaicml/mpt-7b"] == 6_649_286_656
    assert counts["EleutherAI/pythia-1b"] == counts["EleutherAI/pythia-1b-deduped"] == 1_011_781_632
    assert counts["EleutherAI/pythia-6.9b"] == 6_857_302_016


def test_a_shape_may_be_given(tmp_path, job):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published.CONFIGS["EleutherAI/pythia-70m"]))
    found = machine_plan.model_shapes(job, [f"mpt-7b={path}"])
    assert found["mosaicml/mpt-7b"].d_model == 512
    assert found["meta-llama/Llama-2-7b-hf"].d_model == 4096
    alike = machine_plan.model_shapes(job, ["meta-llama/Llama-2-7b-hf=EleutherAI/pythia-1b"])
    assert alike["meta-llama/Llama-2-7b-hf"].d_model == 2048
    with pytest.raises(UserError, match="should be NAME=LIKE, NAME one of"):
        machine_plan.model_shapes(job, [f"other={path}"])


def test_a_model_of_which_nothing_is_known(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unknown = config.validate({"target": "someone/nothing-7b", "corpus": {"path": "c"}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--shape someone/nothing-7b=LIKE"):
        machine_plan.model_shapes(unknown)


def test_variants_are_valid_and_what_they_say(job, eight, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(JOB))
    found = fitting.training(job, shapes(job), eight).variants(job)
    assert len(found) == len(set(map(config.dump, found))) > 50
    for variant in found:
        overrides = fitting.changes(job, variant)
        loaded = config.load(path, overrides)
        assert loaded == variant
        assert np.prod(list(variant.mesh.model_dump().values())) == 8
    # The quickest keeps all that it can in memory, exchanges least, and computes nothing twice.
    assert (found[0].batch.microbatch, found[0].remat, found[0].mesh.tensor) == (None, "none", 1)


def test_the_least_of_a_step(job, eight, monkeypatch):
    """Gradients of 4 bytes a parameter over 8 devices, and each layer's kept activations of 8 sequences."""
    mesh = jax.sharding.AbstractMesh((1, 8, 1), sharding.AXES)
    monkeypatch.setattr(sharding, "job_mesh", lambda *_: mesh)
    gradients, activations = 6_738_415_616 * 4 // 8, 8 * 2048 * 32 * 2
    stage = fitting.training(job, shapes(job), eight)
    full = job.model_copy(update={"remat": "full"})
    assert stage.least(full) == gradients + activations * 4096
    assert stage.least(job) == gradients + activations * (2 * 4096 + 4 * 4096 + 3 * 11008)
    micro = full.model_copy(update={"batch": job.batch.model_copy(update={"microbatch": 16})})
    assert stage.least(micro) == 2 * gradients + activations * 4096 // 4


def machine(memory, factor=2.0, refuses=True):
    """(a stage whose programs need `factor` times their least temporaries, a list of the configurations compiled)."""
    compiled = []

    class Call:
        def __init__(self, job):
            self.job, self.argument_bytes = job, (3 if job.optimizer.kind == "lion" else 4) * GIB

        def compile(self):
            compiled.append(self.job)
            needed = int(4 * GIB + factor * least(self.job))
            if refuses and needed > memory:
                raise DoesNotFitError(needed, memory, "said the compiler")
            return Program(4 * GIB, needed - 4 * GIB, needed, {"all-gather": Traffic(3, 1000)}, 0.0, 1.0)

    def least(job):
        return (job.batch.microbatch or 64) * GIB // 8

    def variants(job):
        sizes = [None, 32, 16, 8]
        return [job.model_copy(update={"batch": job.batch.model_copy(update={"microbatch": n})}) for n in sizes]

    shape = models.decoder_config(published.CONFIGS["meta-llama/Llama-2-7b-hf"])
    tokens = 64 * 2048 / 8
    return fitting.Stage("train", "train", shape, Call, lambda _: 4 * GIB, least, lambda _: tokens, variants), compiled


@pytest.mark.parametrize("refuses", [True, False])
def test_the_quickest_that_should_fit_is_compiled(job, refuses):
    """8 GiB fit two microbatches of 16 or 8 sequences: what the first one needed says that 32 will not do."""
    stage, compiled = machine(8 * GIB, refuses=refuses)
    first = fitting.try_one(stage, job, 8 * GIB)
    assert not first.fits
    assert first.needed == 20 * GIB
    said = []
    found = fitting.search(stage, first, 8 * GIB, tries=4, seconds=60, say=said.append)
    assert fitting.changes(job, found.config) == ["batch.microbatch=16"]
    assert len(compiled) == 2
    assert said[0].startswith("train: of 3 other configurations")
    assert said[1] == "train: compiling with batch.microbatch=16"
    assert said[2:] == ["train: fits, with 8.00 GiB at the peak; compiled in 1 s"]


def test_a_verdict_has_the_compilers_words_or_the_need(job):
    assert fitting.verdict(Outcome(job, False, 3 * GIB, None, "does not fit: so it said")) == "does not fit: so it said"
    assert fitting.verdict(Outcome(job, False, 3 * GIB, None)) == "does not fit: needs 3.00 GiB"


def test_the_search_is_bounded(job):
    stage, compiled = machine(5 * GIB, factor=20.0)
    first = fitting.try_one(stage, job, 5 * GIB)
    assert fitting.search(stage, first, 5 * GIB, tries=0, seconds=60, say=print) is None
    assert fitting.search(stage, first, 5 * GIB, tries=9, seconds=-1, say=print) is None
    assert len(compiled) == 1
    assert fitting.search(stage, first, 5 * GIB, tries=9, seconds=60, say=print) is None
    assert [one.batch.microbatch for one in compiled[1:]] == [8], "the others cannot fit, by their shapes alone"


def test_next_candidate():
    candidates = [Candidate(name, 2, least) for name, least in (("fast", 6), ("middle", 3), ("slow", 1))]
    for factor, name in ((1.0, "fast"), (2.0, "middle"), (20.0, "slow")):
        chosen = fitting.next_candidate(candidates, lambda one, by=factor: one.arguments + by * one.least, 10)
        assert chosen.config == name


def test_another_remat_is_not_judged_by_the_first(job):
    """Four times the least under `none` says nothing of `full`, which is tried with the whole batch at once."""

    def call(job):
        return machine(16 * GIB, 1.2 if job.remat == "full" else 4.0)[0].call(job)

    full = job.model_copy(update={"remat": "full"})
    small = full.model_copy(update={"batch": job.batch.model_copy(update={"microbatch": 8})})
    stage = dataclasses.replace(machine(16 * GIB)[0], call=call, variants=lambda _: [full, small])
    said = []
    found = fitting.search(stage, fitting.try_one(stage, job, 16 * GIB), 16 * GIB, 1, 60, said.append)
    assert fitting.changes(job, found.config) == ["remat=full"]
    assert said[-1] == "train: fits, with 13.60 GiB at the peak; compiled in 1 s"


def test_arguments_are_counted_as_the_compiler_does(make_job):
    job = make_job()
    _, shape = models.read_config(job.target.model)
    call = aot.train_call(job, shape, jax.devices()[:1], source_vocabularies=(352, 280))
    program = call.compile()
    # A step that is not used is not passed: XLA drops it, so the count may be a few bytes more.
    assert program.arguments <= call.argument_bytes <= program.arguments * 1.01 + 64


@pytest.fixture
def planned(monkeypatch, eight, tmp_path, capsys):
    """A function that runs `fusejax plan` for eight devices on which `memory` bytes can be had; its JSON and output."""

    def run(memory, *arguments, stages=None, **changes):
        stages = stages or [machine(memory)[0]]
        monkeypatch.setattr(aot, "topology", lambda name, slices=1: eight)
        monkeypatch.setattr(aot, "usable_memory", lambda devices: memory)
        monkeypatch.setattr(machine_plan.sharding, "make_mesh", lambda *_: None)
        monkeypatch.setattr(machine_plan.sharding, "described", lambda mesh: "eight devices")
        monkeypatch.setattr(machine_plan, "_stages", lambda *_: stages)
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps(JOB | changes))
        told = ["plan", str(path), "--topology", "v5p:2x2x2", "--json", str(tmp_path / "plan.json"), *arguments]
        cli.main(told)
        return json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out

    return run


def test_the_report(planned):
    found, said = planned(64 * GIB, "--mfu", "0.5")
    assert "an estimate" in said
    (stage,) = found["stages"]
    assert stage["fits"]
    assert stage["change"] == []
    assert stage["memory"] == {"arguments": 4 * GIB, "temporaries": 16 * GIB, "peak": 20 * GIB, "spare": 44 * GIB}
    assert stage["collectives"] == {"all-gather": {"times": 3, "bytes": 1000}}
    shape = models.decoder_config(published.CONFIGS["meta-llama/Llama-2-7b-hf"])
    per_token = flops.training_per_token(shape, 2048)
    assert stage["flops_per_token"] == per_token
    assert stage["estimated_tokens_per_s"] == pytest.approx(0.5 * 8 * 459e12 / per_token)
    assert stage["estimated_hours"] == pytest.approx(1e9 / stage["estimated_tokens_per_s"] / 3600)
    assert stage["estimated_sent_bytes_per_s"] == pytest.approx(1000 * stage["estimated_tokens_per_s"] / (64 * 2048))


def test_a_change_is_named(planned):
    found, said = planned(8 * GIB)
    assert "train: 12.00 GiB too much as it is; fits with batch.microbatch=16" in said
    (stage,) = found["stages"]
    assert (stage["fits"], stage["change"]) == (False, ["batch.microbatch=16"])
    assert stage["short_bytes"] == 12 * GIB


def test_nothing_fits(planned, capsys):
    with pytest.raises(SystemExit) as stopped:
        planned(5 * GIB)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert "no configuration that fits was found for train" in said.err
    assert "train: compiling with batch.microbatch=8\ntrain: does not fit: said the compiler\n" in said.out
    assert "not tried, since they train otherwise: optimizer.kind=lion (1.00 GiB less to hold), lora" in said.out
    assert "sent by each device" not in said.out, "a table without rows"
    assert "an estimate" not in said.out, "of what does not run"


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--mfu", "3"], {}, "--mfu: 3.0 should be from 1e-06 to 1"),
        ([], {"mesh": {"fsdp": 4}}, "takes 4 devices, v5p:2x2x2 has 8: add mesh=auto"),
        ([], {"mesh": {"fsdp": -1, "tensor": 3}}, "tensor = 1 x 3 does not divide the 8 devices"),
    ],
)
def test_mistakes(planned, capsys, arguments, changes, message):
    with pytest.raises(SystemExit) as stopped:
        planned(64 * GIB, *arguments, **changes)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_a_machine_need_one(write_plan_job, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", str(write_plan_job), "--mfu", "0.3"])
    assert "plan without --topology: has no use for --mfu" in capsys.readouterr().err


@pytest.fixture
def write_plan_job(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(JOB))
    return path


def test_a_stage_that_the_job_has_not(job, eight):
    with pytest.raises(UserError, match="--only other: the job's stages are mpt-7b, train"):
        machine_plan._stages(job, shapes(job), eight, eight, ["other"])
    names = [stage.name for stage in machine_plan._stages(job, shapes(job), eight, eight, ["train"])]
    assert names == ["train"]


def test_a_sources_variants_halve_its_batch(job, eight):
    stage = fitting.source(job, "mpt-7b", shapes(job), eight, eight)
    found = [(one.cache.batch_tokens, one.cache.mesh) for one in stage.variants(job)]
    assert found[:3] == [(8192, "process"), (4096, "process"), (2048, "process")]
    assert (2048, "job") in found


def test_mesh_of_a_plan(job, eight):
    auto = job.model_copy(update={"mesh": MeshConfig.model_validate("auto")})
    shape = shapes(job)["meta-llama/Llama-2-7b-hf"]
    assert fitting.checked_mesh(auto, shape, eight, "v5p:2x2x2") == MeshConfig(fsdp=8)
    assert Options("v5p:2x2x2").mfu == 0.4
    assert Outcome(job, False, None, None).reason == ""


def test_sources_of_one_shape_are_compiled_once(planned):
    stage, compiled = machine(64 * GIB)
    stages = [dataclasses.replace(stage, name=name) for name in ("mpt-7b", "train")]
    found, said = planned(64 * GIB, stages=stages)
    assert len(compiled) == 1
    assert "train: the same program as one before" in said
    assert found["stages"][0]["memory"] == found["stages"][1]["memory"]
    assert found["stages"][0]["cache_bytes"] == 1e9 * (10 * (2 + 2) + 4)


def test_a_pairwise_fusion_plans_one_of_its_runs():
    """The step of the first pair, with its source and the target, traces."""
    pairs = {"sources": ["EleutherAI/pythia-70m", "EleutherAI/pythia-160m", "EleutherAI/pythia-1b"], "mesh": {}}
    pairs |= {"target": "EleutherAI/pythia-70m", "fusion": {"kind": "pairwise", "merge": "sce"}, "max_length": 64}
    job = config.validate(JOB | pairs)
    call = fitting.training(job, shapes(job), jax.devices()[:1]).call(job)
    assert call.arguments[2]["source_ids"].shape[2] == len(call.arguments[3]) == 2
    assert call.function.lower(*call.arguments).out_info is not None
