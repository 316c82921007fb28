"""`fusejax bench load`: time to load a checkpoint, and the host memory that this takes beyond what stays.

A synthetic Llama checkpoint in bfloat16 is written to a temporary folder, sharded like published ones, and loaded in a
process of its own as float32 (or --dtype). `beyond what stays` is that process's peak of resident memory, less what it
holds when the model is there (on a CPU: the parameters too, since the device's memory is the host's). Its ratio is to
the largest tensor plus the largest file, the promise being that it is not above 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.bench import core, positive
from fusejax.errors import UserError
from fusejax.progress import progress

_D, _MLP, _VOCAB = 2048, 5632, 32000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, and another model instead of the synthetic one."""
    parser.add_argument(
        "--megabytes", type=positive, default=2000, metavar="MB", help="of the checkpoint (default 2000)"
    )
    parser.add_argument("--files", type=positive, default=4, metavar="N", help="it is split into (default 4)")
    parser.add_argument("--model", metavar="FOLDER", help="load this model instead")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")


def run(options: argparse.Namespace) -> list[core.Case]:
    """Seconds, bytes a second, and memory beyond what stays, each the median of the repeats."""
    if options.model:
        return _measure(Path(options.model), options)
    with tempfile.TemporaryDirectory(prefix="fusejax-bench-") as folder:
        _synthetic(Path(folder), options.megabytes * 10**6, options.files)
        return _measure(Path(folder), options)


def _measure(folder: Path, options: argparse.Namespace) -> list[core.Case]:
    from fusejax.models import files

    stored = files.tensors(files.local_folder(folder))
    sizes = {name: int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize for name, tensor in stored.items()}
    bound = max(sizes.values()) + max(file.stat().st_size for file in files.weight_files(folder))
    rounds = []
    with progress("bench load", options.repeats) as bar:
        for _ in range(options.repeats):
            rounds.append(_load(folder, options.dtype))
            bar.advance(1, folder.name)
    total = sum(sizes.values())
    seconds = {"load": [each["seconds"] for each in rounds]}
    (time,), (rate,) = core.cases(seconds), core.cases(seconds, unit="GB/s", amounts=total / 1e9)
    beyond = float(np.median([each["beyond"] for each in rounds])) / 1e6
    more = {"checkpoint_bytes": total, "largest_tensor_bytes": max(sizes.values()), "bound_bytes": bound}
    return [
        time,
        core.Case("load, rate", rate.value, "GB/s", spread=rate.spread),
        core.Case("beyond what stays", beyond, "MB", {"largest tensor + file": beyond * 1e6 / bound}, more=more),
    ]


_CHILD = """
import json, sys, time
import jax, jax.numpy as jnp
import fusejax
from fusejax.bench import core

jax.block_until_ready(jnp.zeros(8) + 1)
core.resident_bytes(reset_peak=True)  # the peak counts from here
start = time.perf_counter()
model = fusejax.load(sys.argv[1], dtype=sys.argv[2])
seconds = time.perf_counter() - start
peak = core.peak_resident_bytes()
print(json.dumps({"seconds": seconds, "beyond": peak - core.resident_bytes()}))
"""


def _load(folder: Path, dtype: str) -> dict[str, Any]:
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("bench load: peak memory is read from /proc, which only Linux has")
    done = subprocess.run([sys.executable, "-c", _CHILD, str(folder), dtype], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench load: {folder}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _synthetic(folder: Path, size: int, n_files: int) -> None:
    """A Llama checkpoint of about `size` bytes in bfloat16."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from fusejax import models
    from fusejax.models import convert, families

    def config(n_layers: int) -> models.DecoderConfig:
        heads = _D // 128
        return models.DecoderConfig(
            vocab_size=_VOCAB, d_model=_D, n_layers=n_layers, n_heads=heads, n_kv_heads=heads // 4, head_dim=128,
            d_mlp=_MLP, max_length=2048, rotary_dim=128, tied=True,
        )  # fmt: skip

    one, two = (2 * models.count_parameters(config(n)) for n in (1, 2))
    made = config(max(1, 1 + round((size - one) / (two - one))))
    values = models.hf_config(made, "llama")
    shapes = convert.param_shapes(made)
    family = families.find(values, "bench")
    names = [
        (named.name, convert.stored_shape(named.tensor, shapes))
        for named in convert.expected(family.tensors(made), made, shapes)
    ]
    rng, weight_map = np.random.default_rng(0), dict[str, str]()
    for i, part in enumerate(np.array_split(np.arange(len(names)), n_files), 1):
        file = f"model-{i:05d}-of-{n_files:05d}.safetensors"
        tensors = {name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
                   for name, shape in (names[k] for k in part)}  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(values))
