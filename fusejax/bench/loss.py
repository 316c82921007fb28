"""`fusejax bench loss`: what fusing costs beside continual training, forward and backward, from hidden states on.

`fused` is `loss.fusion_loss` over sparse targets, `fused with metrics` the same with all that training can log,
`fused, Pallas` the same by the platform's own kernels (on a GPU or TPU); `plain` our cross-entropy made the same way;
`full logits` the usual jax cross-entropy over one [T, V] array; `dense, torch` the arithmetic of the FuseLLM paper's
code: dense targets of three models, weighed by their rewards, in a soft-target cross-entropy over [T, V] (where torch
is installed; on the GPU where JAX runs on one). `largest array` leaves arrays of the unembedding's shape out (it, its
gradient, and copies); it is counted at D + 1 or a little more where that shape is also one of a block of logits.
"""

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax import fusion, loss
from fusejax.bench import core, positive
from fusejax.errors import UserError
from fusejax.parallel import usable_cpus

WEIGHT_CLM = 0.9
SOURCES = 3
KERNELS: dict[str, loss.Implementation] = {"gpu": "gpu", "tpu": "tpu"}  # of a platform


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes: every width with every vocabulary."""
    parser.add_argument("--tokens", type=positive, default=2048, metavar="T", help="rows of one call (default 2048)")
    parser.add_argument("--hidden", type=positive, nargs="+", default=[512, 2048], metavar="D", help="default 512 2048")
    parser.add_argument(
        "--vocab", type=positive, nargs="+", default=[32000, 128256], metavar="V", help="default 32000 128256"
    )
    parser.add_argument(
        "--top-k", type=positive, default=10, metavar="K", help="entries of a source's row (default 10)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matmuls; default: float32 on a CPU")
    parser.add_argument("--no-torch", action="store_true", help="leave the dense arithmetic in torch out")


def run(options: argparse.Namespace) -> list[core.Case]:
    """Times, temporaries and the largest array of each implementation at each size."""
    if options.top_k > min(options.vocab):
        raise UserError(f"--top-k {options.top_k}: should be at most --vocab {min(options.vocab)}")
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with_torch = not options.no_torch and importlib.util.find_spec("torch") is not None
    found: list[core.Case] = []
    for vocab in options.vocab:
        for hidden in options.hidden:
            found += _size(options, hidden, vocab, dtype, with_torch)
    return found


def _size(options: argparse.Namespace, hidden: int, vocab: int, dtype: str, with_torch: bool) -> list[core.Case]:
    suffix = f", D={hidden} V={vocab}"
    example = make_example(options.tokens, hidden, vocab, options.top_k, dtype)
    functions: dict[str, Callable[[], Any]] = {}
    memory: list[core.Case] = []
    implementations: dict[str, Callable[..., Any]] = {
        "fused": fused,
        "plain": plain,
        "full logits": full_logits,
        "fused with metrics": with_metrics,
    }
    kernels = KERNELS.get(jax.default_backend())
    if kernels is not None:
        implementations["fused, Pallas"] = partial(fused, implementation=kernels)
    for name, function in implementations.items():
        arguments = example[:5] if name.startswith("fused") else example[:3]
        has_aux = name == "fused with metrics"
        jitted = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=has_aux))
        compiled = jitted.lower(*arguments).compile()
        functions[name + suffix] = partial(compiled, *arguments)
        temporaries = core.temporary_bytes(compiled)
        if temporaries is not None:
            memory.append(core.Case(f"{name}{suffix}: temporaries", temporaries, "bytes"))
        largest = _largest_share(jitted, compiled, arguments)
        memory.append(core.Case(f"{name}{suffix}: largest array / (T·V)", largest, ""))
    if with_torch:
        functions["dense, torch" + suffix] = torch_dense(example)
    others = ["plain" + suffix, *(name for name in functions if not name.startswith(("fused,", "plain")))]
    seconds = core.measure(functions, options.repeats, title=f"loss{suffix}")
    return core.cases(seconds, {"fused" + suffix: others}) + memory


def _largest_share(jitted: Any, compiled: Any, arguments: tuple[jax.Array, ...]) -> float:
    """Elements of the largest array that is not of the unembedding's shape, over T·V.

    A block of logits may have that shape, too, as D says nothing of how many tokens it holds; then the same function
    is compiled for another D, one that no such block has.
    """
    (T, D), V = arguments[0].shape, arguments[1].shape[1]
    blocks = {T, *(-(-T // n) for n in range(1, T + 1))}
    if D in blocks:
        D = next(width for width in range(D + 1, T + D + 2) if width not in blocks)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
        shapes[0] = jax.ShapeDtypeStruct((T, D), arguments[0].dtype)
        shapes[1] = jax.ShapeDtypeStruct((D, V), arguments[1].dtype)
        compiled = jitted.lower(*shapes).compile()
    return core.largest_buffer(compiled, without={(D, V), (V, D)}) / (T * V)


def make_example(tokens: int, hidden: int, vocab: int, top_k: int, dtype: str) -> tuple[jax.Array, ...]:
    """(hidden [T, D], unembedding [D, V], labels [T]; fused ids and probabilities [T, K]; the sources' [T, S, K])."""
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.standard_normal((tokens, hidden), np.float32), dtype)
    unembedding = jnp.asarray(rng.standard_normal((hidden, vocab), np.float32) / np.sqrt(hidden), dtype)
    labels = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    ids = jnp.asarray(rng.integers(0, vocab, (tokens, SOURCES, top_k)), jnp.int32)
    raw = rng.dirichlet(np.full(top_k + 1, 0.3), (tokens, SOURCES))[..., :top_k]
    probs = jnp.asarray(-np.sort(-raw, -1), jnp.float32)
    fused = fusion.fuse(
        ids, probs, jnp.ones((tokens, SOURCES), bool), jnp.asarray(rng.random((tokens, SOURCES))), labels
    )
    return states, unembedding, labels, fused.ids, fused.probs, ids, probs


def fused(
    hidden: jax.Array,
    unembedding: jax.Array,
    labels: jax.Array,
    ids: jax.Array,
    probs: jax.Array,
    implementation: loss.Implementation = "xla",
) -> jax.Array:
    """λ · CLM + (1 − λ) · fusion, the defaults of training."""
    sums = loss.fusion_loss(
        hidden, unembedding, labels, ids, probs, weight_clm=WEIGHT_CLM, implementation=implementation
    )
    return sums.total


def with_metrics(
    hidden: jax.Array, unembedding: jax.Array, labels: jax.Array, ids: jax.Array, probs: jax.Array
) -> tuple[jax.Array, loss.LossSums]:
    """The same, with the sums that training logs and, as `loss.model_entropy` asks for, the model's entropy."""
    sums = loss.fusion_loss(hidden, unembedding, labels, ids, probs, weight_clm=WEIGHT_CLM, model_entropy=True)
    return sums.total, sums


def plain(hidden: jax.Array, unembedding: jax.Array, labels: jax.Array) -> jax.Array:
    """CLM alone, by the same blocks."""
    return loss.clm_loss(hidden, unembedding, labels).total


def full_logits(hidden: jax.Array, unembedding: jax.Array, labels: jax.Array) -> jax.Array:
    """CLM alone, over all logits at once."""
    logits_TV = jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)
    at_label_T = jnp.take_along_axis(logits_TV, labels[:, None], -1)[:, 0]
    return jnp.sum(jax.nn.logsumexp(logits_TV, -1) - at_label_T)


def torch_dense(example: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """The loss of the paper's code; each source's bfloat16 targets [T, V] are made beforehand, as its collator does.

    On the GPU where JAX runs on one and torch sees it; the matrix product is in the example's dtype.
    """
    import torch

    torch.set_num_threads(usable_cpus())
    torch.set_default_device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, str(example[0].dtype))
    states, unembedding, labels, _, _, ids, probs = (np.asarray(x.astype(jnp.float32)) for x in example)
    hidden = torch.tensor(states, dtype=dtype, requires_grad=True)
    weight = torch.tensor(unembedding, dtype=dtype, requires_grad=True)
    label = torch.tensor(labels, dtype=torch.long)
    T, V = len(labels), unembedding.shape[1]
    dense = []
    for s in range(ids.shape[1]):
        rows = torch.zeros((T, V), dtype=torch.bfloat16)
        part = torch.tensor(probs[:, s] / probs[:, s].sum(-1, keepdims=True), dtype=torch.bfloat16)
        dense.append(rows.scatter_(1, torch.tensor(ids[:, s], dtype=torch.long), part))
    rewards = torch.eye(len(dense), dtype=torch.bfloat16)[torch.arange(T) % len(dense)]

    def step() -> Any:
        hidden.grad = weight.grad = None
        logits = (hidden @ weight).float()  # losses are float32
        target = torch.zeros_like(dense[0])
        for s, rows in enumerate(dense):
            target = target + rewards[:, s : s + 1] * rows
        soft = torch.nn.functional.cross_entropy(logits, target.to(logits.dtype), reduction="sum")
        hard = torch.nn.functional.cross_entropy(logits, label, reduction="sum")
        total = WEIGHT_CLM * hard + (1 - WEIGHT_CLM) * soft
        total.backward()
        return float(total.detach())

    return step
