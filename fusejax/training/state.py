"""What is trained: parameters, optimizer state and step, laid out over the mesh, and the jitted step beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fusejax import fusion, models, sharding
from fusejax import optimizer as optimizers
from fusejax.batches import token_tables
from fusejax.config import Config
from fusejax.training.step import make_step


@dataclass(frozen=True)
class Trainer:
    """The jitted step of one run, and what it needs."""

    config: Config
    mesh: jax.sharding.Mesh
    state: dict[str, Any]  # params, optimizer, step: arrays laid out over the mesh
    step: Callable[..., tuple[dict[str, Any], dict[str, jax.Array]]]
    tables: list[fusion.TokenTable]
    graphdef: Any
    model_config: models.DecoderConfig
    steps_total: int

    @classmethod
    def make(cls, config: Config, steps_total: int, with_sources: bool) -> "Trainer":
        """Load the target onto the mesh, lay out the optimizer's state beside it, compile nothing yet."""
        mesh = sharding.make_mesh(config.mesh)
        model = models.load(
            config.target.model,
            mesh=mesh,
            revision=config.target.revision,
            compute_dtype=jnp.dtype(config.precision.compute),
            remat=config.remat,
        )
        graphdef, variables = nnx.split(model)
        params = nnx.to_pure_dict(variables)
        optimizer, schedule = optimizers.make(config.optimizer, steps_total)
        state = init_state(params, optimizer, mesh)
        tables = token_tables(config) if with_sources else []
        tables = jax.device_put(tables, sharding.replicated(mesh))
        step = make_step(config, graphdef, optimizer, schedule, steps_total, sharding.like(state), mesh)
        return cls(config, mesh, state, step, tables, graphdef, model.config, steps_total)


def init_state(params: Any, optimizer: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Training state; every moment of the optimizer is laid out as its parameter, scalars are replicated."""
    abstract = jax.eval_shape(optimizer.init, params)
    by_path = {jax.tree_util.keystr(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def layout(path: Any, leaf: Any) -> jax.sharding.Sharding:
        # A moment's path in the state ends with its parameter's path.
        key = jax.tree_util.keystr(path)
        for name, placed in by_path.items():
            if key.endswith(name) and leaf.ndim:
                return placed
        return sharding.replicated(mesh)

    layouts = jax.tree_util.tree_map_with_path(layout, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=layouts)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return {"params": params, "optimizer": opt_state, "step": step}
