import sys
from types import SimpleNamespace

import pytest

from fusejax import metrics
from fusejax.errors import UserError


def test_resume_drops_what_comes_again(tmp_path):
    log = metrics.Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    log = metrics.Metrics(tmp_path, 2)
    log.write(3, {"loss": 0.5})
    log.close()
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("broken", ['{"step": 2', "[]", '{"loss": 1.0}', '{"step": 2, "loss": "x"}', "\udcff"])
def test_a_damaged_line_is_named(tmp_path, broken):
    lines = ['{"step": 1, "loss": 1.0}', broken, '{"step": 3, "loss": 1.0}', ""]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged"):
        metrics.read(tmp_path)


def test_no_metrics_yet(tmp_path):
    assert metrics.read(tmp_path) == []


def test_weights_and_biases_where_it_is_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="wandb: the package is not installed"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        metrics.Metrics(tmp_path, 0, wandb="fusion")
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    asked = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: asked.update(how) or run))
    log = metrics.Metrics(tmp_path, 0, wandb="fusion")
    log.write(1, {"loss": 2.0})
    log.close()
    assert logged == [(1, {"loss": 2.0}), "end"]
    assert (asked["project"], asked["resume"]) == ("fusion", "allow")
