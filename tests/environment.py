"""The environment of processes that tests start."""

import os


def on_cpus(devices=1, **more):
    """That of this process, with so many CPU devices; what is printed comes at once."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONUNBUFFERED": "1", **more}
