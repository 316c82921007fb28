"""One optimizer step: loss of a batch, gradients, update; a pure function, jitted over the mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fusejax import fusion, loss, sharding
from fusejax import optimizer as optimizers
from fusejax.config import Config
from fusejax.training import guard, tuning
from fusejax.training.targets import fuse_batch, fusion_weights, target_ce

Batch = dict[str, jax.Array]
State = dict[str, Any]
Step = Callable[[State, Any, Batch, list[fusion.TokenTable]], tuple[State, dict[str, jax.Array]]]


def make_step(
    config: Config,
    graphdef: Any,
    optimizer: Any,
    schedule: Any,
    steps_total: int,
    layouts: State,
    fixed: Any,
    mesh: Any,
) -> Step:
    """(state, fixed parameters, batch, token tables) → (state, metrics): jitted over the mesh, the state donated.

    layouts, fixed: the shardings of the state and of the fixed parameters. batch: [B, L, ...] arrays of
    `batches.Batches`. metrics: float32 scalars, and `won` float32[S].
    """

    def step(state: State, fixed: Any, batch: Batch, tables: list[fusion.TokenTable]) -> tuple[State, Any]:
        start = config.loss.weight_clm if tables else 1.0
        weight_clm = loss.clm_weight(state["step"], steps_total, start, config.loss.schedule)

        def sums_of(trained: Any, batch: Batch, count: jax.Array) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, tuning.combine(config, trained, fixed))
            total, sums = batch_sums(config, model, batch, tables, weight_clm, mesh)
            return total / count, sums

        gradients, sums = accumulate(sums_of, state["params"], batch, config, mesh)
        gradients = tuning.mask_frozen(config, gradients)
        values = means(config, sums)
        values["gradient_norm"] = optimizers.global_norm(gradients)
        values["learning_rate"] = schedule(state["step"] - state["guard"]["skipped"])  # skipped steps do not count
        values["weight_clm"] = weight_clm
        fine, guarded = guard.check(config.guard, state["guard"], values["loss"], values["gradient_norm"])
        moved = update(config, optimizer, state, gradients)
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), moved, {key: state[key] for key in moved})
        values |= {"skipped": guarded["skipped"], "skipped_in_a_row": guarded["in_a_row"]}
        return kept | {"guard": guarded, "step": state["step"] + 1}, values

    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.jit(step, in_shardings=(layouts, fixed, split, whole), out_shardings=(layouts, whole), donate_argnums=0)


def accumulate(sums_of: Callable[..., Any], trained: Any, batch: Batch, config: Config, mesh: Any) -> tuple[Any, Any]:
    """(gradients of the mean loss over the batch's labelled tokens, the batch's sums), one microbatch after another.

    sums_of(trained, microbatch, count) → (Σ loss / count, sums), count being that of the whole batch: so gradients and
    sums add up, whatever the microbatches hold.
    """
    count = jnp.maximum(jnp.sum(batch["labels"] >= 0), 1).astype(jnp.float32)
    gradient = jax.grad(sums_of, has_aux=True)
    n = config.batch.sequences // (config.batch.microbatch or config.batch.sequences)
    if n == 1:
        return gradient(trained, batch, count)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trained, microbatch, count)), None

    micro = sharding.microbatches(batch, n, mesh)
    shapes = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], micro), count)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zero, micro)[0]


def update(config: Config, optimizer: Any, state: State, gradients: Any) -> State:
    """The parts of the state that the optimizer moves: parameters, its own state, and their running mean."""
    updates, opt_state = optimizer.update(gradients, state["optimizer"], state["params"])
    updates = tuning.mask_frozen(config, updates)
    params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state["params"], updates)
    moved = {"params": params, "optimizer": opt_state}
    decay = config.optimizer.ema
    if decay is not None:
        moved["ema"] = jax.tree.map(lambda mean, p: decay * mean + (1 - decay) * p, state["ema"], params)
    return moved


def batch_sums(
    config: Config,
    model: Any,
    batch: Batch,
    tables: list[fusion.TokenTable],
    weight_clm: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """(Σ loss over the labelled tokens, sums for the metrics), float32; sums of microbatches add up. See `means`."""
    # One document in a sequence sees none of the padding that comes after it: no kernel need know of segments.
    segments = batch["segment_ids"] if config.batch.packed else None
    hidden_BLD = model.hidden(batch["ids"], segment_ids=segments, positions=batch["positions"])
    labels_BL = batch["labels"]
    of_model: dict[str, Any] = {
        "mesh": mesh,
        "logit_cap": model.config.logit_softcap,
        "z_loss": config.loss.z_loss,
        "model_entropy": config.loss.model_entropy,
        "implementation": config.kernels.fusion_loss,
    }
    if not tables:
        sums = loss.clm_loss(hidden_BLD, model.unembedding(), labels_BL, **of_model)
        return sums.total, {"loss": sums}
    if config.fusion.gate:
        own = target_ce(config, hidden_BLD, model.unembedding(), model.config.logit_softcap, batch, mesh)
        batch = batch | {"target_ce": own}
    # A few numbers for each source and token take whole tiles of a TPU's memory: not all sequences at once.
    fuse = partial(fuse_batch, config, vocab_size=model.config.vocab_size)
    fused = sharding.one_by_one(fuse, batch, tables, mesh)
    weights = fusion_weights(config, batch, fused)
    sums = loss.fusion_loss(
        hidden_BLD,
        model.unembedding(),
        labels_BL,
        fused.ids,
        fused.probs,
        weight_clm=weight_clm,
        kind=config.loss.kind,
        temperature=1.0 if config.compat else config.loss.temperature,
        tail=config.loss.tail,
        fusion_mask=weights,
        **of_model,
    )
    counted = labels_BL >= 0 if weights is None else weights > 0
    return sums.total, {"loss": sums, "rows": fusion.fusion_sums(fused, counted)}


def means(config: Config, sums: dict[str, Any]) -> dict[str, jax.Array]:
    """The metrics of a batch, from its sums."""
    losses = sums["loss"]
    count = jnp.maximum(losses.count, 1.0)
    values = {"loss": losses.total / count, "clm_loss": losses.clm / count, "tokens": losses.count}
    if config.loss.model_entropy:
        values["model_entropy"] = losses.model_entropy / count
    if "rows" in sums:
        rows = sums["rows"]
        n_rows = jnp.maximum(rows.count, 1.0)
        values |= {"won": rows.won / n_rows, "fallback": rows.fallback / n_rows, "mass_kept": rows.mass / n_rows}
        values |= {"fusion_loss": losses.fusion / count, "target_entropy": losses.target_entropy / count}
        if config.fusion.gate:
            values["gated"] = rows.gated / n_rows
    return values
