import json
import signal

import jax
import numpy as np
import pytest

from fusejax import alignment, metrics, sharding, sources, training
from fusejax.checkpoint import Checkpoints
from fusejax.errors import Interrupted, Resumable, UserError
from fusejax.metrics import Metrics


@pytest.fixture
def job(make_job):
    """A job of a few steps whose sources are cached and aligned."""

    def make(output="job", **changes):
        settings = {
            "optimizer": {"learning_rate": 3e-3},
            "loss": {"weight_clm": 0.5},
            "batch": {"sequences": 4, "epochs": 6},
            "checkpoint": {"every": 2},
        } | changes
        made = make_job(output, **settings)
        sources.run(made)
        alignment.run(made)
        return made

    return make


def final_params(config, name="fused"):
    steps = json.loads((training.run_folder(config, name) / "training.json").read_text())["steps"]
    trainer = training.Trainer.make(config, steps, with_sources=False)
    folder = training.run_folder(config, name) / "checkpoints"
    with Checkpoints(folder, config.checkpoint) as checkpoints:
        step, state = checkpoints.restore(trainer.state)
    assert step == steps
    return jax.device_get(state["params"])


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_learns_and_reports(job):
    config = job()
    training.run(config)
    for name in ("fused", "clm"):
        history = metrics.read(training.run_folder(config, name))
        assert [row["step"] for row in history] == list(range(1, len(history) + 1))
        assert history[-1]["clm_loss"] < history[0]["clm_loss"]
    fused = metrics.read(config.folder)
    assert all(abs(row["won/coarse"] + row["won/fine"] + row["fallback"] - 1) < 1e-5 for row in fused)
    assert 0 < fused[0]["mass_kept"] <= 1
    clm = metrics.read(config.folder / "clm")
    # The same data and start: the first step's CLM loss is the same, and what is learnt is not.
    assert fused[0]["clm_loss"] == pytest.approx(clm[0]["clm_loss"], rel=1e-6)
    assert fused[-1]["clm_loss"] != clm[-1]["clm_loss"]
    assert [row["loss"] for row in clm] == [row["clm_loss"] for row in clm]


def test_interrupted_anywhere_equals_undisturbed(job, monkeypatch):
    """A run cut off between two checkpoints, then gone on with, ends with the same bits."""
    undisturbed = job("undisturbed")
    training.train(undisturbed, "fused")
    interrupted = job("interrupted")
    real = Metrics.write

    class Cut(Exception):
        pass

    for cut_at in (1, 3, 4):

        def write(self, step, values, cut_at=cut_at):
            if step == cut_at:
                raise Cut
            real(self, step, values)

        monkeypatch.setattr(Metrics, "write", write)
        with pytest.raises(Cut):
            training.train(interrupted, "fused")
    monkeypatch.setattr(Metrics, "write", real)
    training.train(interrupted, "fused")
    assert metrics.read(interrupted.folder) == metrics.read(undisturbed.folder)
    assert_equal_trees(final_params(interrupted), final_params(undisturbed))


def test_done_is_skipped_and_other_settings_are_refused(job, capsys):
    config = job()
    training.train(config, "fused")
    before = (config.folder / "metrics.jsonl").read_bytes()
    settings = (config.folder / "config.yaml").read_bytes()
    training.train(config, "fused")
    assert "train fused: done before, skipped" in capsys.readouterr().out
    assert (config.folder / "metrics.jsonl").read_bytes() == before
    other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UserError, match=r"optimizer.learning_rate \(0.003 there, 0.5 now\).*checkpoint.resume=false"):
        training.run(other)
    assert (config.folder / "config.yaml").read_bytes() == settings  # those of what is there
    watched = config.model_copy(update={"loss": config.loss.model_copy(update={"model_entropy": True})})
    patient = watched.model_copy(update={"guard": config.guard.model_copy(update={"limit": 50})})
    training.train(patient, "fused")  # what is no part of the result is no other setting
    assert "train fused: done before, skipped" in capsys.readouterr().out
    frozen = config.optimizer.model_copy(update={"frozen": ("nothing",)})
    mistaken = config.model_copy(
        update={"optimizer": frozen, "checkpoint": config.checkpoint.model_copy(update={"resume": False})}
    )
    with pytest.raises(UserError, match=r"optimizer.frozen: 'nothing' names no parameter"):
        training.train(mistaken, "fused")
    assert (config.folder / "metrics.jsonl").read_bytes() == before  # a mistake costs no earlier run
    assert (config.folder / "checkpoints").is_dir()
    anew = other.model_copy(update={"checkpoint": other.checkpoint.model_copy(update={"resume": False})})
    training.train(anew, "fused")
    assert metrics.read(config.folder)[0]["learning_rate"] > 0.1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"inputs": 3, "done": true}'])
def test_a_damaged_record_is_one_line(make_job, text):
    config = make_job()
    config.folder.mkdir(exist_ok=True)
    (config.folder / "training.json").write_text(text)
    with pytest.raises(UserError, match=r"training.json: .*; set checkpoint.resume=false to train anew"):
        training.read_record(config.folder)


def test_a_run_made_before_a_key_existed_goes_on_under_its_default(job, capsys):
    config = job()
    training.train(config, "fused")
    record = json.loads((config.folder / "training.json").read_text())
    for key in ("guard.spike", "optimizer.decay_ratio", "alignment.rows", "cache.top_k of fine"):
        del record["inputs"][key]
    (config.folder / "training.json").write_text(json.dumps(record))
    capsys.readouterr()
    training.train(config, "fused")
    assert "train fused: done before, skipped" in capsys.readouterr().out
    other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"decay_ratio": 0.5})})
    with pytest.raises(UserError, match=r"other settings: optimizer.decay_ratio \(0.1 there, 0.5 now\); set"):
        training.train(other, "fused")


def test_without_sources_it_is_continual_training(make_job):
    config = make_job(sources=[], batch={"sequences": 4, "epochs": 1})
    assert training.runs(config) == ["fused"]
    training.run(config)
    history = metrics.read(config.folder)
    assert [row["loss"] for row in history] == [row["clm_loss"] for row in history]
    assert "fallback" not in history[0]


def test_weight_one_equals_clm_alone(job):
    """λ = 1: the sources are there and change nothing."""
    config = job(loss={"weight_clm": 1.0})
    training.run(config)
    fused, clm = (metrics.read(training.run_folder(config, name)) for name in ("fused", "clm"))
    np.testing.assert_allclose([r["loss"] for r in fused], [r["loss"] for r in clm], rtol=2e-5)


def test_linear_schedule_ends_at_clm(job):
    config = job(loss={"weight_clm": 0.2, "schedule": "linear"})
    training.train(config, "fused")
    weights = [row["weight_clm"] for row in metrics.read(config.folder)]
    np.testing.assert_allclose(weights, 0.2 + 0.8 * np.arange(len(weights)) / len(weights), rtol=1e-5)


def test_bfloat16_stays_near_float32(job):
    for compute in ("float32", "bfloat16"):
        config = job(compute, precision={"compute": compute})
        training.train(config, "fused")
    exact, rough = (
        [row["loss"] for row in metrics.read(config.folder.parent / name)] for name in ("float32", "bfloat16")
    )
    assert exact != rough
    np.testing.assert_allclose(exact, rough, rtol=0.02)


def test_loss_that_is_no_number_stops_with_one_line(job):
    config = job(optimizer={"learning_rate": 1e30, "grad_clip": 1e30})
    with pytest.raises(UserError, match=r"loss became .* lower optimizer.learning_rate"):
        training.train(config, "fused")


def test_state_is_laid_out_as_the_parameters(job):
    config = job()
    trainer = training.Trainer.make(config, 3, with_sources=True)
    moments = [leaf for leaf in jax.tree.leaves(trainer.state["optimizer"]) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trainer.state["params"]))
    assert all(leaf.sharding.mesh.axis_names == sharding.AXES for leaf in moments)


@pytest.mark.parametrize(
    ("number", "said", "kind", "in_last_step"),
    [(signal.SIGTERM, "SIGTERM", Resumable, True), (signal.SIGINT, "Ctrl-C", Interrupted, False)],
)
def test_a_stopped_run_saves_and_goes_on_bit_for_bit(job, monkeypatch, number, said, kind, in_last_step):
    undisturbed, stopped = job("undisturbed"), job("stopped", checkpoint={"every": 100})
    training.train(undisturbed, "fused")
    total = len(metrics.read(undisturbed.folder))
    at = total if in_last_step else 3
    real = Metrics.write

    def write(self, step, values):
        real(self, step, values)
        if step == at - 1:  # metrics come a step late
            signal.raise_signal(number)

    monkeypatch.setattr(Metrics, "write", write)
    line = f"{said} at step {at} of {total}: saved at step {at}; the same command goes"
    with pytest.raises(Resumable, match=line) as ended:
        training.train(stopped, "fused")
    assert type(ended.value) is kind
    monkeypatch.setattr(Metrics, "write", real)
    training.train(stopped, "fused")
    assert metrics.read(stopped.folder) == metrics.read(undisturbed.folder)
    assert_equal_trees(final_params(stopped), final_params(undisturbed))


def test_a_profile_of_some_steps(job, capsys):
    config = job(profile={"start": 2, "steps": 2}, batch={"sequences": 4, "steps": 5})
    training.train(config, "fused")
    (written,) = (config.folder / "profile").glob("plugins/profile/*/*.xplane.pb")  # where TensorBoard looks
    planes = jax.profiler.ProfileData.from_file(str(written)).planes
    events = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert "PjitFunction(step)" in events
    assert "profile in" in capsys.readouterr().out
