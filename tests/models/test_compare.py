"""The layer-by-layer comparison shows where a model begins to differ."""

import json

import pytest
from model_zoo import CASES, torch_model

from fusejax.models import compare

pytest.importorskip("torch")


@pytest.fixture
def folder(tmp_path):
    torch_model(CASES["gemma3"]).save_pretrained(tmp_path)
    return tmp_path


def test_right_layers_show_rounding(folder, capsys):
    assert compare.main([str(folder), "--length", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.rsplit(maxsplit=1)[0].strip() for line in lines] == ["embedding", "layer 0", "layer 1", "logits"]
    assert all(float(line.split()[-1]) < 1e-5 for line in lines)


def test_a_difference_shows_from_its_layer_on(folder, monkeypatch):
    read = compare.models.load

    def other(folder):
        model = read(folder)
        scale = model.blocks.mlp_norm.scale
        scale.set_value(scale[...].at[1].add(1.0))
        return model

    monkeypatch.setattr(compare.models, "load", other)
    embedding, first, second, logits = (value for _, value in compare.compare(folder, 12))
    assert max(embedding, first) < 1e-5
    assert second > 1e-3
    assert logits > 1e-3


def test_what_is_no_model_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert compare.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
