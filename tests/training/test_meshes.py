"""Every mesh trains alike: eight simulated devices in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from environment import on_cpus

from fusejax import alignment, config, sources

SCRIPT = Path(__file__).parent / "on_eight_devices.py"


@pytest.mark.slow
def test_meshes_give_one_curve_and_the_declared_layouts(make_job, tmp_path):
    from conftest import _model, _tokenizer

    _tokenizer(tmp_path / "wide", 330, bos=False)
    wide = {"d_model": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "head_dim": 8, "d_mlp": 128}
    _model(tmp_path / "wide", "llama", rows=352, seed=3, initializer_std=0.1, **wide)
    job = make_job(
        target=str(tmp_path / "wide"),
        batch={"sequences": 16, "microbatch": 8, "steps": 20},
        optimizer={"learning_rate": 3e-3},
        loss={"weight_clm": 0.5},
        fusion={"gate": "target"},
    )
    sources.run(job)
    alignment.run(job)
    path = tmp_path / "job.yaml"
    path.write_text(config.dump(job))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), "1,1,1", "8,1,1", "1,8,1", "1,1,8", "2,2,2"],
        capture_output=True, text=True, env=on_cpus(8), timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    single = np.array(made["1,1,1"]["losses"])
    assert single[-1] < single[0]
    for mesh, result in made.items():
        assert all(result["checks"].values()), (mesh, result["checks"])
        assert np.abs(np.array(result["losses"]) - single).max() < 1e-4, mesh
    # No device ever held more than its share: neither of the moments, nor of the weights while they were read.
    for mesh, share in (("1,8,1", 1 / 8), ("1,1,8", 1 / 8), ("2,2,2", 1 / 4)):
        assert made[mesh]["largest"] <= share
        assert made[mesh]["while loading"] <= share
