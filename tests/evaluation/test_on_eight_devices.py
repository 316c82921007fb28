"""Bits per byte, ensembles and merges over 8 simulated devices are those of one device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXTS
from environment import on_cpus

from fusejax import export, models


def run(devices, *arguments):
    command = [sys.executable, Path(__file__).with_name("on_eight_devices.py"), *map(str, arguments)]
    done = subprocess.run(command, env=on_cpus(devices), capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(tiny_models, tmp_path):
    hf_config, decoder_config = models.read_config(tiny_models["coarse"])
    for name, seed in (("other", 7), ("other-2", 8)):
        made = models.init(decoder_config, seed)
        export.save(made, hf_config, tmp_path / name, tokenizer_from=tiny_models["coarse"])
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for texts in TEXTS.values() for text in texts))
    one, eight = (
        run(devices, tiny_models["coarse"], tmp_path / "other", corpus, tmp_path / f"merged{devices}")
        for devices in (1, 8)
    )
    assert (one["devices"], eight["devices"]) == (1, 8)
    for name, domains in one["counts"].items():
        for domain, counts in domains.items():
            assert eight["counts"][name][domain] == pytest.approx(counts, rel=1e-5), name
    for method in ("linear", "ties", "dare_ties", "sce"):
        assert eight[method] == pytest.approx(one[method], rel=1e-4, abs=1e-3), method
