"""The stage `export`."""

import json
from typing import Literal

from fusejax import distributed, merging, models, outputs, settings
from fusejax.checkpoint import Checkpoints
from fusejax.config import Config
from fusejax.errors import UserError
from fusejax.merge_keys import SPARSE, WITH_BASE
from fusejax.progress import say, warn
from fusejax.training.runs import PAIR, read_record, run_config, run_folder, runs
from fusejax.training.state import Trainer


def export(config: Config) -> None:
    """The stage `export`: each run's last checkpoint as a Hugging Face folder, for transformers and the next fusion.

    Under fusion.kind `pairwise` the fused model is the merge of the pairs' folders.
    """
    for name in runs(config):
        export_run(config, name)
    if config.fusion.kind == "pairwise":
        distributed.alone("merge", lambda: _merge(config))


def _merge(config: Config) -> None:
    merging.merge(pair_merge(config))


def pair_merge(config: Config) -> merging.MergeConfig:
    """The merge of a pairwise fusion's copies; differences are taken from the target."""
    keys = config.fusion.merge
    assert keys is not None
    values = keys.model_dump(mode="json", exclude={"density"})
    density = {"density": keys.density} if keys.method in SPARSE else {}
    copies = [str(run_folder(config, name) / "export") for name in runs(config) if name.startswith(PAIR)]
    values["models"] = [{"model": copy, "bos": config.target.bos, **density} for copy in copies]
    values |= {"dtype": export_dtype(config), "seed": config.seed, "output": str(config.folder / "export")}
    values |= {"max_length": config.max_length, "batch_tokens": config.evaluation.batch_tokens}
    if keys.method in WITH_BASE:
        values["base"] = config.target.model_dump(mode="json")
    return settings.check(values, merging.MergeConfig, "fusion.merge")


def export_dtype(config: Config) -> Literal["float32", "bfloat16"]:
    """precision.export, or what stands for `auto`: the target's own, but for float16."""
    if config.precision.export != "auto":
        return config.precision.export
    values, _ = models.read_config(models.local_folder(config.target.model, config.target.revision))
    own = str(values.get("dtype") or values.get("torch_dtype"))
    # float16 has too short a range for what bfloat16 or float32 training leaves.
    return "bfloat16" if own in ("bfloat16", "float16") else "float32"


def export_run(config: Config, name: str) -> None:
    """One run's last checkpoint as a Hugging Face folder, unless it is there, whole."""
    from fusejax import export as hf

    folder, config = run_folder(config, name), run_config(config, name)
    record = read_record(folder)
    if record is None or not record["done"]:
        raise UserError(f"{folder}: run {name!r} is not trained to its end; run `fusejax train` first")
    wanted = {"training": outputs.fingerprint(record["inputs"]), "dtype": config.precision.export}
    if hf.made_from(folder / "export") == wanted:
        if hf.is_whole(folder / "export"):
            say(f"export {name}: done before, skipped")
            return
        warn(f"{folder / 'export'}: is no longer whole, exporting again")
    trainer = Trainer.make(config, record["steps"], with_sources=False)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        _, state = checkpoints.restore(trainer.state)
    source = models.local_folder(config.target.model, config.target.revision)
    hf_config, _ = models.read_config(source)
    model = trainer.model(state)
    hf.save(model, hf_config, folder / "export", tokenizer_from=source, dtype=export_dtype(config))
    outputs.write_atomically(folder / "export" / hf.MARKER, json.dumps(wanted))
    say(f"export {name}: {folder / 'export'}")
