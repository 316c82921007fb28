"""The guard of a run: steps whose loss or gradient is no number, or whose loss spikes, leave everything as it was.

Its state is a few scalars: `skipped` steps in all and `in_a_row`, and of the `seen` losses of steps that were made an
exponentially weighted `mean` and `variance`.
"""

import jax
import jax.numpy as jnp

from fusejax.config import GuardConfig

_MEMORY = 0.98  # weight of the past: about the last 50 steps
_LEAST_SEEN = 50  # steps before a spike can be told from noise

State = dict[str, jax.Array]


def init() -> State:
    """Nothing seen, nothing skipped."""
    zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return {"skipped": count, "in_a_row": count, "seen": count, "mean": zero, "variance": zero}


def check(config: GuardConfig, state: State, loss: jax.Array, gradient_norm: jax.Array) -> tuple[jax.Array, State]:
    """(whether the step may be made, the guard's next state), from float32 scalars.

    A spike is a loss above mean + spike · standard deviation of the losses so far, once there are 50.
    """
    fine = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if config.spike is not None:
        high = loss > state["mean"] + config.spike * jnp.sqrt(state["variance"])
        fine &= ~(high & (state["seen"] >= _LEAST_SEEN))
    # The first values weigh more, so that the start (0) does not count.
    share = jnp.maximum(1 - _MEMORY, 1 / (1 + state["seen"].astype(jnp.float32)))
    delta = loss - state["mean"]
    seen = {
        "seen": state["seen"] + 1,
        "mean": state["mean"] + share * delta,
        "variance": (1 - share) * (state["variance"] + share * delta**2),
    }
    counts = {"skipped": state["skipped"] + 1 - fine, "in_a_row": jnp.where(fine, 0, state["in_a_row"] + 1)}
    return fine, counts | {key: jnp.where(fine, value, state[key]) for key, value in seen.items()}
