"""The package as users get it: a wheel with `kernels/` inside as fusejax.kernels; a quick and lean import."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, cwd, path=None):
    environment = {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={"PATH": "", "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy of what is packaged, so that no build folder is left in the checkout.
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for package in ("fusejax", "kernels"):
        for file in (ROOT / package).rglob("*.py"):
            copy = source / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(command, cwd=source, check=True, timeout=300, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "fusejax").rglob("*.py")}
    expected |= {"fusejax/" + str(file.relative_to(ROOT)) for file in (ROOT / "kernels").rglob("*.py")}
    assert names == expected


def test_kernels_are_imported_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import fusejax.kernels.fusion_loss as m, fusejax.loss; print(m.__file__)"
    assert python(code, tmp_path, tmp_path / "site").strip().startswith(str(tmp_path / "site" / "fusejax" / "kernels"))


def test_kernels_are_imported_from_the_checkout(tmp_path):
    code = "import fusejax.kernels as m; print(m.__file__)"
    assert python(code, tmp_path).strip() == str(ROOT / "kernels" / "__init__.py")


def test_imports_stay_lean(tmp_path):
    """Nothing heavy before it is needed: neither torch, tensorflow nor data-set libraries; `--help` not even jax."""
    heavy = "{'torch', 'tensorflow', 'tensorflow_datasets', 'datasets', 'grain', 'lm_eval'} & set(sys.modules)"
    code = f"import sys, fusejax.training, fusejax.corpus, fusejax.models, fusejax.evaluation; print({heavy} or 'none')"
    assert python(code, tmp_path).strip() == "none"
    code = "import sys, fusejax.cli; print({'jax', 'transformers'} & set(sys.modules) or 'none')"
    assert python(code, tmp_path).strip() == "none"
