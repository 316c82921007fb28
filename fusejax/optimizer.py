"""Optimizers, with warm-up, clipping and decoupled decay; all of it optax, the paper's values by default.

8-bit moments are not among them: optax has none.
"""

from typing import Any

import jax
import optax

from fusejax.config import OptimizerConfig

global_norm = optax.global_norm


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over ⌈warmup_ratio · steps⌉ steps, then one of:

    `cosine`, `linear` (to the end), `constant`, and `wsd` (warm-up, stable, decay: constant, then linear over the last
    ⌈decay_ratio · steps⌉ steps; MiniCPM, Hu et al. 2024). The first step already moves (rate peak/warm-up), the last
    one ends at end_ratio · peak.
    """
    peak, end = config.learning_rate, config.learning_rate * config.end_ratio
    warmup = _share(config.warmup_ratio, steps)
    rest = max(1, steps - warmup)
    falling = min(rest, max(1, _share(config.decay_ratio, steps)))
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.end_ratio),
        "linear": optax.linear_schedule(peak, end, rest),
        "wsd": optax.linear_schedule(peak, end, falling, transition_begin=rest - falling),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return after
    rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def _share(ratio: float, steps: int) -> int:
    """⌈ratio · steps⌉, safe from the last bit of a float."""
    return -(-int(1e6 * ratio * steps) // 10**6)


def decay_mask(params: Any) -> Any:
    """Which parameters decay, a pytree of bools: all but biases and the scales of norms, as is usual for AdamW."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return getattr(path[-1], "key", None) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def make(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(optimizer, its schedule) for a run of `steps` steps.

    `adamw` (Loshchilov and Hutter 2019), `lion` (Chen et al. 2023; a third to a tenth of AdamW's rate suits it) and
    `adafactor` (Shazeer and Stern 2018: no first moment, a factored second one, updates relative to the parameters'
    own size; its decay is scaled by the learning rate, like the others').
    """
    schedule = make_schedule(config, steps)
    mask = decay_mask if config.decay == "matrices" else None
    decay: dict[str, Any] = {"weight_decay": config.weight_decay, "mask": mask}
    if config.kind == "adamw":
        chosen = optax.adamw(schedule, config.beta1, config.beta2, config.epsilon, **decay)
    elif config.kind == "lion":
        chosen = optax.lion(schedule, config.beta1, config.beta2, **decay)
    else:
        # optax adds Adafactor's decay after the learning rate; here it comes first, as in the other two.
        chosen = optax.chain(
            optax.adafactor(None, decay_rate=0.8),
            optax.add_decayed_weights(-config.weight_decay, mask),  # the updates already have their minus sign
            optax.scale_by_schedule(schedule),
        )
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), chosen), schedule
