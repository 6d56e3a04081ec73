"""What a user gets: the wheel holds every module under the name it is imported by, and works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

IMPORT_EVERYTHING = """
import pkgutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import hf_efficiency
here = Path(sys.argv[1]).resolve()
found = {"hf_efficiency"}
for module in pkgutil.walk_packages(hf_efficiency.__path__, "hf_efficiency."):
    found.add(module.name)
    if not module.name.endswith("__main__"):
        __import__(module.name)
for name in found & sys.modules.keys():
    file = Path(sys.modules[name].__file__).resolve()
    assert file.is_relative_to(here), f"{name} came from {file}"
print(*sorted(found))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of the wheel, built offline with the tools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, ROOT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def module_files(folder):
    """Every Python file below a folder of the checkout, relative to it."""
    return {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}


def test_wheel_holds_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"hf_efficiency/{file}" for file in module_files("hf_efficiency")}
    expected |= {f"hf_efficiency/integrations/{file}" for file in module_files("integrations")}
    assert len(expected) > 5
    assert expected - names == set()
    assert "hf_efficiency/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "hf_efficiency",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_declares_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "hf-efficiency = hf_efficiency.cli:main" in archive.read(entry_points).decode()


def test_every_module_imports_from_the_installed_wheel(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, target],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = {
        ".".join(["hf_efficiency", "integrations", *file.with_suffix("").parts]).removesuffix(".__init__")
        for file in module_files("integrations")
    }
    assert expected <= set(done.stdout.split())
