"""One optimizer step: loss of a batch, gradients, update; a pure function, jitted over the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fusejax import fusion, loss, sharding
from fusejax import optimizer as optimizers
from fusejax.config import Config


def make_step(
    config: Config, graphdef: Any, optimizer: Any, schedule: Any, steps_total: int, layouts: Any, mesh: Any
) -> Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]:
    """(state, batch, token tables) → (state, metrics), jitted with the state's shardings and its buffers donated.

    batch: [B, L, ...] arrays of `batches.Batches`. metrics: float32 scalars, and `won` float32[S].
    """

    def step(state: dict[str, Any], batch: dict[str, jax.Array], tables: list[fusion.TokenTable]) -> Any:
        start = config.loss.weight_clm if tables else 1.0
        weight_clm = loss.clm_weight(state["step"], steps_total, start, config.loss.schedule)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            return batch_loss(config, nnx.merge(graphdef, params), batch, tables, weight_clm)

        (_, values), gradients = jax.value_and_grad(objective, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state["params"], updates)
        values["gradient_norm"] = optimizers.global_norm(gradients)
        values["learning_rate"] = schedule(state["step"])
        values["weight_clm"] = weight_clm
        return {"params": params, "optimizer": opt_state, "step": state["step"] + 1}, values

    split = sharding.batch_sharding(mesh)
    whole = sharding.replicated(mesh)
    return jax.jit(step, in_shardings=(layouts, split, whole), out_shardings=(layouts, whole), donate_argnums=0)


def batch_loss(
    config: Config, model: Any, batch: dict[str, jax.Array], tables: list[fusion.TokenTable], weight_clm: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss over the batch's labelled tokens, and the metrics of the same pass."""
    hidden_BLD = model.hidden(batch["ids"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    labels_BL = batch["labels"]
    values: dict[str, jax.Array] = {}
    shards = config.mesh.data * config.mesh.fsdp
    if not tables:
        sums = loss.clm_loss(hidden_BLD, model.unembedding(), labels_BL, batch_shards=shards)
    else:
        fused = fuse_batch(config, batch, tables, model.config.vocab_size)
        rows = fusion.fusion_sums(fused, labels_BL >= 0)
        n_rows = jnp.maximum(rows.count, 1.0)
        values |= {"won": rows.won / n_rows, "fallback": rows.fallback / n_rows, "mass_kept": rows.mass / n_rows}
        sums = loss.fusion_loss(
            hidden_BLD,
            model.unembedding(),
            labels_BL,
            fused.ids,
            fused.probs,
            weight_clm=weight_clm,
            kind=config.loss.kind,
            temperature=config.loss.temperature,
            tail=config.loss.tail,
            batch_shards=shards,
        )
    count = jnp.maximum(sums.count, 1.0)
    values |= {"loss": sums.total / count, "clm_loss": sums.clm / count, "tokens": sums.count}
    if tables:
        values |= {"fusion_loss": sums.fusion / count, "target_entropy": sums.target_entropy / count}
    return sums.total / count, values


def fuse_batch(
    config: Config, batch: dict[str, jax.Array], tables: list[fusion.TokenTable], vocab_size: int
) -> fusion.FusedRows:
    """The fused target distributions of a batch, as `alignment`, `fusion` and `loss` of the configuration say."""
    by_aligned_ce = config.fusion.ce_unit == "aligned"
    return fusion.fuse_sources(
        tables,
        batch["source_ids"],
        batch["source_logprobs"],
        batch["source_valid"],
        batch["labels"],
        source_ce=None if by_aligned_ce else batch["source_ce"],
        source_consumed=batch.get("source_consumed"),
        source_labels=batch.get("source_labels"),
        gold_logprobs=batch.get("gold_logprobs"),
        segment_ids=batch["segment_ids"],
        vocab_size=vocab_size,
        level=config.fusion.level,
        window=config.fusion.window,
        collisions=config.alignment.collisions,
        tail=config.loss.tail,
        kind=config.fusion.kind,
        temperature=config.fusion.temperature,
        weights=config.fusion.weights,
        fallback=config.alignment.fallback,
    )
