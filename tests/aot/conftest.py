"""What compiles for accelerators that are not here; tests skip, with the reason, where it is not installed."""

import pytest

from fusejax import aot
from fusejax.errors import UserError


@pytest.fixture(scope="session")
def devices():
    """A function: a topology's name → its devices."""
    found = {}

    def get(name):
        if name not in found:
            try:
                found[name] = aot.topology(name)
            except UserError as error:
                pytest.skip(str(error))
        return found[name]

    return get
