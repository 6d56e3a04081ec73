"""What is to happen once a package has been imported."""

import importlib
import sys

import pytest

from hf_efficiency._after_import import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Name of a package that nobody has imported, with a submodule that its own import needs."""
    name = "a_package_for_this_test"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from .part import value\nready = True\n")
    (tmp_path / name / "part.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield name
    sys.meta_path[:] = finders
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def test_later_import(package):
    calls = []
    after_import(package, lambda: calls.append(sys.modules[package].ready))
    after_import(package, lambda: calls.append("twice"))  # one is enough
    assert calls == []
    importlib.import_module(f"{package}.part")
    importlib.import_module(package)
    assert calls == [True]


def test_earlier_import(package):
    importlib.import_module(package)
    calls = []
    after_import(package, lambda: calls.append(1))
    assert calls == [1]


def test_missing_package():
    finders = list(sys.meta_path)
    after_import("no_such_package_anywhere", lambda: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package_anywhere")
    assert sys.meta_path == finders
