"""Run by test_on_eight_devices.py, in a process with 8 CPU devices or with one: evaluation and merging, as JSON.

python on_eight_devices.py MODEL OTHER CORPUS FOLDER     two models of one architecture; FOLDER takes the merge
"""

import json
import sys

import jax
import numpy as np

from fusejax import merging
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.evaluation import standalone
from fusejax.evaluation.perplexity import numbers
from fusejax.models import files


def main(model, other, path, folder):
    corpus = CorpusConfig(path=path)
    given = [ModelConfig(model=model), ModelConfig(model=other)]
    options = {"max_length": 24, "stride": 16, "batch_tokens": 256}
    sums = {
        "model": standalone.measure_corpus(given[0], corpus, **options),
        "ensemble": standalone.measure_ensemble_of(given, corpus, **options),
        "geometric": standalone.measure_ensemble_of(given, corpus, kind="log_probability", **options),
    }
    found = {"devices": jax.device_count(), "counts": {name: numbers(s)["counts"] for name, s in sums.items()}}
    for method in ("linear", "ties", "dare_ties", "sce"):
        values = {"method": method, "models": [{"model": other}, {"model": f"{other}-2"}]}
        values |= {"output": f"{folder}/{method}", "base": None if method == "linear" else {"model": model}}
        merging.merge(merging.MergeConfig.model_validate(values))
        tensors = files.tensors(files.local_folder(f"{folder}/{method}"))
        found[method] = {name: np.asarray(tensor.read(), np.float64).sum().item() for name, tensor in tensors.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
