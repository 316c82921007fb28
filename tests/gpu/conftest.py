"""What only an NVIDIA GPU can show: `make test-gpu` on such a machine; elsewhere these tests are skipped."""

import os

import jax
import pytest


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu" or os.environ.get("FUSEJAX_REQUIRE_GPU"):
        return
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU (make test-gpu)"))
