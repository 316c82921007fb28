import subprocess
import sys
from pathlib import Path

import pytest
from environment import on_cpus


@pytest.mark.parametrize("variants", ["few", pytest.param("every", marks=pytest.mark.slow)])
def test_eight_devices_give_the_same(variants):
    command = [sys.executable, Path(__file__).with_name("on_eight_devices.py"), variants]
    result = subprocess.run(command, env=on_cpus(8), capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["same", "on", "8", "devices"]
