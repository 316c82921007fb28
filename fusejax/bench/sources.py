"""`fusejax bench sources MODEL`: tokens per second of the stage that fills a source's cache, and where they go.

`stage` is the whole stage but for loading the model: documents read, batches made, the jitted forward with its top-k,
results cut into records, shards compressed and written. `bare` is the least that any such stage must do, on the same
batches: the jitted forward to hidden states, and the unembedding's matmul (of which only the row maxima are kept, so
that no [T, V] array is written). `torch` is transformers' forward with log_softmax and topk, documents one by one in
the same batches (where torch is installed).
"""

import argparse
import functools
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import config, corpus, flops, models, scoring, sharding, sources, tokenizers
from fusejax.bench import core, positive, random_models
from fusejax.config import Config
from fusejax.errors import UserError
from fusejax.store import Store, StoreWriter
from fusejax.tokenizers import Tokenizer

_BLOCK = 8192  # columns of the unembedding at a time, in `bare`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the text and the sizes."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or hub name")
    parser.add_argument("--corpus", default="stdlib:", metavar="PATH", help="text to run over (default stdlib:)")
    parser.add_argument("--documents", type=positive, default=8, metavar="N", help="documents of it (default 8)")
    parser.add_argument("--max-length", type=positive, default=512, metavar="L", help="tokens (default 512)")
    parser.add_argument("--batch-tokens", type=positive, default=2048, metavar="T", help="of a batch (default 2048)")
    parser.add_argument("--top-k", type=positive, default=10, metavar="K", help="entries of a row (default 10)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the forward; default: float32 on a CPU")
    random_models.add_argument(parser, "MODEL's")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")


def run(options: argparse.Namespace) -> list[core.Case]:
    """Tokens per second of each, on the same documents."""
    with tempfile.TemporaryDirectory(prefix="fusejax-bench-") as folder:
        if options.random:
            tokenizer = models.local_folder(options.model)
            options.model = str(random_models.write(options.random, Path(folder), 0, tokenizer, options.max_length))
        job = _job(options, folder)
        return _Bench(job, options).run()


def _job(options: argparse.Namespace, folder: str) -> Config:
    compute = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    values: dict[str, Any] = {
        "target": options.model,
        "sources": [options.model],
        "corpus": {"path": options.corpus, "limit": options.documents},
        "max_length": options.max_length,
        "cache": {"top_k": options.top_k, "batch_tokens": options.batch_tokens},
        "precision": {"compute": compute},
        "output": folder,
    }
    return config.validate(values)


class _Bench:
    """The prepared documents and the loaded model."""

    def __init__(self, job: Config, options: argparse.Namespace) -> None:
        corpus.prepare(job)
        self._job, self._options, self._source = job, options, job.sources[0]
        self._tokenizer: Tokenizer = tokenizers.for_model(self._source)
        data = job.folder / "data/train"
        self._documents, self._tokens = Store(data / "documents"), Store(data / "tokens" / self._tokenizer.fingerprint)
        lines = [scoring.inputs_and_labels(record["ids"], self._tokenizer) for record in self._tokens]
        if not lines:
            raise UserError(f"{options.corpus}: holds no document to run over")
        self._inputs, self._labels = [line[0] for line in lines], [line[1] for line in lines]
        self._mesh = sharding.make_mesh(job.mesh)
        dtype = jnp.dtype(job.precision.compute)
        self._model = models.load(self._source.model, mesh=self._mesh, dtype=dtype, compute_dtype=dtype)
        self._vocab_size = min(self._model.config.vocab_size, self._tokenizer.vocab_size)
        self._written = job.folder / "written"
        self._runs = itertools.count()

    def run(self) -> list[core.Case]:
        functions: dict[str, Callable[[], Any]] = {"stage": self._stage(), "bare": self._bare()}
        if not self._options.no_torch and importlib.util.find_spec("torch") is not None:
            functions["torch"] = self._torch()
        seconds = core.measure(functions, self._options.repeats, title="sources")
        tokens = sum(map(len, self._inputs))
        found = core.cases(seconds, {"stage": ["bare", "torch"]}, unit="tokens/s", amounts=tokens)
        per_token = flops.forward_per_token(self._model.config, tokens // len(self._inputs))
        for case in list(found):
            found += core.throughput(case, per_token, 1 if case.name == "torch" else self._mesh.size)
        rows = sum(len(record["ids"]) for record in self._tokens)
        size = sum(file.stat().st_size for file in (self._written / "0").iterdir())
        return [*found, core.Case("disk, per row", size / rows, "bytes")]

    def _stage(self) -> Callable[[], None]:
        cache = self._job.cache
        scorer = scoring.Scorer(
            self._model,
            k=cache.top_k,
            vocab_size=self._vocab_size,
            max_length=self._job.max_length,
            batch_tokens=cache.batch_tokens,
            mesh=self._mesh,
        )

        def stage() -> None:
            writer = StoreWriter(self._written / str(next(self._runs)), {}, len(self._inputs), len(self._inputs))
            sources.write_rows(
                scorer,
                self._tokenizer,
                self._tokens,
                writer,
                writer.missing(),
                self._vocab_size,
                cache.values,
                self._source,
                self._documents,
            )
            writer.finish({})

        return stage

    def _batches(self) -> list[tuple[scoring.Batch, np.ndarray]]:
        """The batches that the stage makes."""
        lengths = np.array([len(line) for line in self._inputs])
        rows = int(np.prod([self._mesh.shape[axis] for axis in sharding.BATCH]))
        found = []
        for batch in scoring.plan(lengths, self._job.max_length, self._options.batch_tokens, rows):
            ids_BL = np.zeros((batch.rows, batch.length), np.int32)
            for row, i in enumerate(batch.documents):
                ids_BL[row, : lengths[i]] = self._inputs[i]
            found.append((batch, ids_BL))
        return found

    def _bare(self) -> Callable[[], Any]:
        structure, state = nnx.split(self._model)
        batches = [sharding.put_batch({"ids": ids_BL}, self._mesh)["ids"] for _, ids_BL in self._batches()]

        @jax.jit
        def forward(state: Any, ids_BL: jax.Array) -> jax.Array:
            decoder = nnx.merge(structure, state)
            hidden_BLD, unembedding_DV = decoder.hidden(ids_BL), decoder.unembedding()
            starts = range(0, unembedding_DV.shape[1], _BLOCK)
            blocks = [unembedding_DV[:, start : start + _BLOCK].astype(hidden_BLD.dtype) for start in starts]
            tops = [jnp.matmul(hidden_BLD, block, preferred_element_type=jnp.float32).max(-1) for block in blocks]
            return functools.reduce(jnp.maximum, tops)

        return lambda: [forward(state, ids_BL) for ids_BL in batches]

    def _torch(self) -> Callable[[], Any]:
        import torch

        model, device = core.torch_model(models.local_folder(self._source.model), self._job.precision.compute)
        model.eval()
        batches = [torch.tensor(ids_BL, dtype=torch.long, device=device) for _, ids_BL in self._batches()]

        def forward() -> None:
            with torch.inference_mode():
                for ids_BL in batches:
                    logprobs = torch.log_softmax(model(ids_BL).logits.float(), -1)
                    torch.topk(logprobs, self._job.cache.top_k)
            if device == "cuda":
                torch.cuda.synchronize()

        return forward
