"""The stage `export`."""

import json

from fusejax import models, store
from fusejax.checkpoint import Checkpoints
from fusejax.config import Config
from fusejax.errors import UserError
from fusejax.progress import say
from fusejax.training.runs import read_record, run_folder, runs
from fusejax.training.state import Trainer


def export(config: Config) -> None:
    """The stage `export`: each run's last checkpoint as a Hugging Face folder, for transformers and the next fusion."""
    for name in runs(config):
        export_run(config, name)


def export_run(config: Config, name: str) -> None:
    """One run's last checkpoint as a Hugging Face folder, unless it is there."""
    from fusejax import export as hf

    folder = run_folder(config, name)
    record = read_record(folder)
    if record is None or not record["done"]:
        raise UserError(f"{folder}: run {name!r} is not trained to its end; run `fusejax train` first")
    wanted = {"training": store.fingerprint(record["inputs"]), "dtype": config.precision.export}
    marker = folder / "export" / "fusejax.json"
    if marker.exists() and json.loads(marker.read_text("utf-8")) == wanted:
        say(f"export {name}: done before, skipped")
        return
    trainer = Trainer.make(config, record["steps"], with_sources=False)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        _, state = checkpoints.restore(trainer.state)
    source = models.local_folder(config.target.model, config.target.revision)
    hf_config, _ = models.read_config(source)
    own = str(hf_config.get("dtype") or hf_config.get("torch_dtype"))
    dtype = config.precision.export
    if dtype == "auto":  # float16 has too short a range for what bfloat16 or float32 training leaves
        dtype = "bfloat16" if own in ("bfloat16", "float16") else "float32"
    hf.save(trainer.model(state), hf_config, folder / "export", tokenizer_from=source, dtype=dtype)
    store.write_atomically(marker, json.dumps(wanted))
    say(f"export {name}: {folder / 'export'}")
