"""Checks of arguments: known values are checked, traced ones are not."""

import math

import jax
import jax.numpy as jnp
import pytest

from fusejax import arguments


def test_numbers_have_ranges():
    arguments.within("x", 0.5, 0, 1)
    arguments.within("x", jnp.float32(1), 0, 1)
    for value in (-1, 2, math.nan, math.inf, jnp.float32(2)):
        with pytest.raises(ValueError, match=r"^x: .* should be a finite number, at least 0, at most 1$"):
            arguments.within("x", value, 0, 1)
    with pytest.raises(ValueError, match=r"^x: 0 should be a finite number, greater than 0$"):
        arguments.within("x", 0, above=0)


def test_traced_values_pass():
    def traced(x):
        arguments.within("x", x, 0, 1)
        assert arguments.weights_objection([x, -1.0]) is None
        return x

    assert jax.jit(traced)(7.0) == 7


@pytest.mark.parametrize("weights", [(math.nan, 1), (math.inf, 1), (1e-60, 1), (1e60, 1), (-1, 1), (0, 0), ()])
def test_weights_that_give_no_share(weights):
    assert "should" in arguments.weights_objection(weights)


def test_shapes_and_choices():
    arguments.shape("x", None, (2, 3), "")
    arguments.shape("x", jnp.zeros((2, 3)), (2, 3), "")
    with pytest.raises(ValueError, match=r"^x: shape \(3, 2\) should be \(2, 3\), as of y$"):
        arguments.shape("x", jnp.zeros((3, 2)), (2, 3), "as of y")
    with pytest.raises(ValueError, match=r"^x: 'c' should be a or b$"):
        arguments.one_of("x", "c", ("a", "b"))
