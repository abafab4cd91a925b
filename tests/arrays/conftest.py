"""JAX for the tests of apply."""

import pytest

from .problems import optional


@pytest.fixture(scope="session")
def jax():
    """JAX with float64 and, as it is used here for the first time, two devices on the host."""
    module = optional("jax")
    module.config.update("jax_num_cpu_devices", 2)
    module.config.update("jax_enable_x64", True)
    yield module
    module.config.update("jax_enable_x64", False)
