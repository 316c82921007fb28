"""What is trained: parameters, optimizer state and step, laid out over the mesh, and the jitted step beside them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import fusion, models, sharding
from fusejax import optimizer as optimizers
from fusejax.batches import token_tables
from fusejax.config import Config
from fusejax.progress import say
from fusejax.training import guard, tuning
from fusejax.training.step import State, Step, make_step


@dataclass(frozen=True)
class Trainer:
    """The jitted step of one run, and what it needs.

    state: params (those that are trained), optimizer, step, guard, and ema where asked for; fixed: the others, which no
    checkpoint holds. All of them arrays laid out over the mesh.
    """

    config: Config
    mesh: jax.sharding.Mesh
    state: State
    fixed: Any
    step: Step
    tables: list[fusion.TokenTable]
    graphdef: Any
    model_config: models.DecoderConfig
    steps_total: int

    @classmethod
    def make(cls, config: Config, steps_total: int, with_sources: bool) -> "Trainer":
        """Load the target onto the mesh, lay out the optimizer's state beside it, compile nothing yet."""
        mesh = sharding.job_mesh(config, models.read_config(config.target.model, config.target.revision)[1])
        if config.mesh.is_open:
            say(f"mesh: {sharding.described(mesh)}")
        sharding.check_kernels(config.kernels, mesh)
        model = models.load(
            config.target.model,
            mesh=mesh,
            revision=config.target.revision,
            compute_dtype=jnp.dtype(config.precision.compute),
            remat=config.remat,
            attention=config.attention,
        )
        graphdef, variables = nnx.split(model)
        trained, fixed = tuning.split(config, nnx.to_pure_dict(variables), model, mesh)
        optimizer, schedule = optimizers.make(config.optimizer, steps_total)
        state = init_state(config, trained, optimizer, mesh)
        tables = token_tables(config) if with_sources else []
        tables = jax.tree.map(lambda table: sharding.put_parameter(np.asarray(table), mesh, ()), tables)
        layouts = sharding.like(state), sharding.like(fixed)
        step = make_step(config, graphdef, optimizer, schedule, steps_total, *layouts, mesh)
        return cls(config, mesh, state, fixed, step, tables, graphdef, model.config, steps_total)

    def model(self, state: State) -> models.Decoder:
        """The model of a state: with the running mean of the parameters where there is one, adapters merged."""
        trained = state.get("ema", state["params"])
        return nnx.merge(self.graphdef, jax.jit(lambda t, f: tuning.combine(self.config, t, f))(trained, self.fixed))


def init_state(config: Config, trained: Any, optimizer: Any, mesh: jax.sharding.Mesh) -> State:
    """The state before the first step. Every moment is made in the layout of its parameter; scalars are replicated."""
    make = partial(_beside, config, optimizer)
    layouts = sharding.like(_abstract_beside(make, trained, mesh))
    return {"params": trained} | jax.jit(make, out_shardings=layouts)(trained)


def abstract_state(config: Config, trained: Any, optimizer: Any, mesh: jax.sharding.Mesh) -> State:
    """`init_state` as shapes with their shardings, from those of the trained parameters."""
    return {"params": trained} | _abstract_beside(partial(_beside, config, optimizer), trained, mesh)


def _beside(config: Config, optimizer: Any, trained: Any) -> State:
    """What the state holds besides the parameters."""
    made = {"optimizer": optimizer.init(trained), "step": jnp.zeros((), jnp.int32), "guard": guard.init()}
    if config.optimizer.ema is not None:
        made["ema"] = jax.tree.map(jnp.copy, trained)
    return made


def _abstract_beside(make: Any, trained: Any, mesh: jax.sharding.Mesh) -> State:
    whole = sharding.replicated(mesh)
    by_path = {tuple(path): (leaf.shape, leaf.sharding) for path, leaf in jax.tree_util.tree_leaves_with_path(trained)}

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        # A moment's path ends with its parameter's; a factored moment has another shape and is small.
        for start in range(len(path)):
            shape, placed = by_path.get(tuple(path[start:]), (None, whole))
            if shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(make, trained))
