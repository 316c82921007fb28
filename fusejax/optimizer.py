"""The optimizer: AdamW with warm-up, clipping and decoupled decay, the paper's values by default; all of it optax."""

from typing import Any

import jax
import optax

from fusejax.config import OptimizerConfig

global_norm = optax.global_norm


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over ⌈warmup_ratio · steps⌉ steps, then cosine, linear or constant.

    The first step already moves (rate peak/warm-up), the last one ends at end_ratio · peak.
    """
    peak, end = config.learning_rate, config.learning_rate * config.end_ratio
    warmup = -(-int(1e6 * config.warmup_ratio * steps) // 10**6)
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.end_ratio),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return after
    rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def decay_mask(params: Any) -> Any:
    """Which parameters decay, a pytree of bools: all but biases and the scales of norms, as is usual for AdamW."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return getattr(path[-1], "key", None) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def make(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(optimizer, its schedule) for a run of `steps` steps."""
    schedule = make_schedule(config, steps)
    adamw = optax.adamw(
        schedule, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=decay_mask
    )
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw), schedule
