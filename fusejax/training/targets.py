"""The fused targets of a batch, as `alignment`, `fusion`, `loss` and `compat` of the configuration say."""

import jax
import jax.numpy as jnp

from fusejax import fusion, sharding
from fusejax.config import Config
from fusejax.kernels.topk_unembed import topk_unembed


def fuse_batch(
    config: Config, batch: dict[str, jax.Array], tables: list[fusion.TokenTable], vocab_size: int
) -> fusion.FusedRows:
    """One target distribution for every position of `batches.Batches`' arrays.

    Under `compat: fusellm` a row without a source gets the current token instead of the next one, rewards are
    bfloat16, and loss.temperature is that of the sources alone: their kept logits are divided by it.
    """
    kind = config.fusion.kind
    assert kind != "pairwise", "each of its runs has a kind of its own: see `runs.run_config`"
    by_aligned_ce = config.fusion.ce_unit == "aligned"
    compat = config.compat == "fusellm"
    logprobs = batch["source_logprobs"]
    return fusion.fuse_sources(
        tables,
        batch["source_ids"],
        logprobs / config.loss.temperature if compat else logprobs,
        batch["source_valid"],
        batch["labels"],
        source_ce=None if by_aligned_ce else batch["source_ce"],
        target_ce=batch.get("target_ce"),
        source_consumed=batch.get("source_consumed"),
        source_labels=batch.get("source_labels"),
        gold_logprobs=batch.get("gold_logprobs"),
        segment_ids=batch["segment_ids"],
        vocab_size=vocab_size,
        level=config.fusion.level,
        window=config.fusion.window,
        collisions=config.alignment.collisions,
        tail=config.loss.tail,
        kind=kind,
        temperature=config.fusion.temperature,
        weights=config.fusion.weights,
        weighting=config.fusion.weighting,
        half_rewards=compat,
        fallback=config.alignment.fallback,
        fallback_ids=batch["ids"] if compat else None,
    )


def target_ce(
    config: Config,
    hidden_BLD: jax.Array,
    unembedding_DV: jax.Array,
    logit_cap: float | None,
    batch: dict[str, jax.Array],
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
    """fusion.gate: the model's own cross-entropy float32[B, L], in the unit and over the rows that sources are weighed
    by.

    No gradient goes through it. It costs one more product of hidden states and unembedding.
    """
    found = topk_unembed(
        jax.lax.stop_gradient(hidden_BLD),
        jax.lax.stop_gradient(unembedding_DV),
        batch["labels"],
        k=0,
        logit_cap=logit_cap,
        placement=sharding.placement(mesh),
    )
    units_BL = batch["label_bytes"] if config.fusion.ce_unit == "byte" else batch["labels"] >= 0
    return fusion.average_per_unit(found.ce, units_BL, batch["segment_ids"], config.fusion.level, config.fusion.window)


def fusion_weights(config: Config, batch: dict[str, jax.Array], fused: fusion.FusedRows) -> jax.Array | None:
    """Under `compat: fusellm` the weights float32[B, L] of the fusion loss, else None: every row with a label counts 1.

    There the fusion loss is a mean over all tokens that are no padding, the last one of a sequence included, and the
    CLM loss a mean over the labelled ones. The weights add up to the number of labels, which both are divided by.
    """
    if config.compat != "fusellm":
        return None
    there_BL = (batch["segment_ids"] > 0).astype(jnp.float32)
    n_labels = jnp.sum(batch["labels"] >= 0).astype(jnp.float32)
    # Averaging weights that are rounded do not add up to 1, and targets that do not either are used as they are.
    mass_BL = jnp.sum(fused.probs, -1)
    return there_BL * mass_BL * n_labels / jnp.maximum(jnp.sum(there_BL), 1.0)
