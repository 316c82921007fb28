from fusejax import metrics


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


def test_no_metrics_yet(tmp_path):
    assert metrics.read(tmp_path) == []
