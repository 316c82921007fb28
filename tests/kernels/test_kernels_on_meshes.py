import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("variants", ["few", pytest.param("every", marks=pytest.mark.slow)])
def test_eight_devices_give_the_same(variants):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, Path(__file__).with_name("on_eight_devices.py"), variants]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["same", "on", "8", "devices"]
