"""Our kernel projects as the `kernels` library loads them: built, checked, pushed, and put into models' layers.

A build is `build/torch-<backend>/` with the project's files and `metadata.json`, as kernel-builder lays out projects
without compiled code.
"""

import hashlib
import json
import shutil
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernels._rust import Build, Metadata
from torch import nn

import hf_efficiency.kernels
from hf_efficiency.saving import staged_folder

# The name under which a model's layer asks for a kernel: the project and its layer.
LAYERS = {
    "RMSNorm": ("decoder_layers", "RMSNorm"),
    "GatedMLP": ("decoder_layers", "GatedMLP"),
}
_SUFFIXES = {".py"}


@dataclass(frozen=True)
class Project:
    """One kernel project.

    Attributes:
        package: The folder of its Python files.
        name: Its name on the Hub, with hyphens.
        version: Its major version; the branch `v<version>` of the Hub repository holds it.
        license: SPDX name.
        backends: What it runs on: `cpu`, `cuda`, `rocm`.
        repo_id: Its repository on the Hub.
    """

    package: Path
    name: str
    version: int
    license: str
    backends: tuple[str, ...]
    repo_id: str

    @property
    def import_name(self) -> str:
        """Name of the package below `hf_efficiency.kernels`."""
        return self.package.name

    @property
    def root(self) -> Path:
        """Folder of `build.toml` and `CARD.md`: the project's in a checkout, the package itself in a wheel."""
        parent = self.package.parent.parent
        return parent if (parent / "build.toml").is_file() else self.package

    def files(self) -> list[Path]:
        """The Python files, sorted."""
        return sorted(path for path in self.package.rglob("*") if path.suffix in _SUFFIXES and path.is_file())


def projects() -> dict[str, Project]:
    """All kernel projects by import name."""
    folders = [folder for base in hf_efficiency.kernels.__path__ for folder in Path(base).iterdir()]
    return {folder.name: _read(folder) for folder in sorted(folders) if (folder / "build.toml").is_file()}


def find_project(name: str) -> Project:
    """The project of a name, written with hyphens or underscores.

    Raises:
        ValueError: If there is none.
    """
    known = projects()
    project = known.get(name.replace("-", "_"))
    if project is None:
        raise ValueError(f"there is no kernel {name!r}: choose one of {', '.join(p.name for p in known.values())}")
    return project


def _read(package: Path) -> Project:
    general = tomllib.loads((package / "build.toml").read_text(encoding="utf-8"))["general"]
    return Project(
        package,
        general["name"],
        int(general["version"]),
        general["license"],
        tuple(general["backends"]),
        general["hub"]["repo-id"],
    )


def build(project: Project, output: Path) -> Path:
    """Writes the project's build to `output`, in place of what was there, and returns `output`.

    The folder has `build/torch-<backend>/` for each backend, `README.md` (the card) and `build.toml`.

    Raises:
        OSError: The folder can't be written.
    """
    digest = _digest(project)
    with staged_folder(output) as stage:
        for backend in project.backends:
            variant = stage / "build" / f"torch-{backend}"
            for path in project.files():
                target = variant / path.relative_to(project.package)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            metadata = {
                # Modules are imported under this name, so it tells apart backends, versions and states of the code.
                "id": f"{project.import_name}_{backend}_{digest}",
                "name": project.name,
                "version": project.version,
                "license": project.license,
                "python-depends": [],
                "backend": {"type": backend},
            }
            (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(project.package / "build.toml", stage / "build.toml")
        card = project.root / "CARD.md"
        if card.is_file():
            shutil.copyfile(card, stage / "README.md")
    return output


def _digest(project: Project) -> str:
    """Of the project's code and settings, 12 hexadecimal digits."""
    digest = hashlib.sha256((project.package / "build.toml").read_bytes())
    for path in project.files():
        digest.update(path.relative_to(project.package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check(folder: Path) -> dict[str, list[str]]:
    """Checks a build as the `kernels` library would load it: settings, metadata, import.

    Returns:
        For each variant (`torch-cuda`, say) the layers that it offers.

    Raises:
        ValueError: What is wrong, naming the file.
    """
    try:
        Build.open(folder)
    except ValueError as error:
        raise ValueError(f"{folder / 'build.toml'}: {error}") from error
    variants = sorted(path for path in (folder / "build").glob("torch-*") if path.is_dir())
    if not variants:
        raise ValueError(f"{folder} holds no build/torch-*: make it with `hf-efficiency kernels build`")
    return {variant.name: _check_variant(variant) for variant in variants}


def _check_variant(variant: Path) -> list[str]:
    try:
        metadata = Metadata.read_from_file(variant / "metadata.json")
    except ValueError as error:
        raise ValueError(f"{variant / 'metadata.json'}: {error}") from error
    if metadata.name.python_name not in metadata.id:
        raise ValueError(f"{variant / 'metadata.json'}: the id {metadata.id!r} does not name {metadata.name!s}")
    try:
        module = get_local_kernel(variant)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{variant} can't be imported: {error}") from error
    if not hasattr(module, "layers"):
        raise ValueError(f"{variant / '__init__.py'} does not import `layers`, where the kernels library looks")
    return sorted(name for name, value in vars(module.layers).items() if _is_layer(value, module.layers.__name__))


def _is_layer(value: Any, module: str) -> bool:
    return isinstance(value, type) and value.__module__ == module and hasattr(value, "forward")


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a checked build to the branch `v<version>` of a kernel repository; returns its address.

    Raises:
        ValueError: The build does not pass `check`.
        OSError: The Hub refuses (no token, no right) or can't be reached.
    """
    variants = check(folder)
    metadata = Metadata.read_from_file(folder / "build" / next(iter(variants)) / "metadata.json")
    api, branch = HfApi(), f"v{metadata.version}"
    kernel = constants.REPO_TYPE_KERNEL
    repo_id = api.create_repo(repo_id, repo_type=kernel, private=private or None, exist_ok=True).repo_id
    api.create_branch(repo_id, branch=branch, repo_type=kernel, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        repo_type=kernel,
        revision=branch,
        folder_path=folder,
        commit_message=f"Upload {metadata.name!s} version {metadata.version}",
    )
    return f"{api.endpoint}/{repo_id}/tree/{branch}"


def local_repository(project: Project) -> Path:
    """A build of the project in the user's cache, made if its code has changed since."""
    folder = Path(constants.HF_HOME) / "hf_efficiency" / "kernels" / f"{project.import_name}-{_digest(project)}"
    return folder if folder.is_dir() else build(project, folder)


def layer_mapping(backends: Iterable[str] = ("cuda", "rocm")) -> dict[str, dict[str, LocalLayerRepository]]:
    """What `kernels.use_kernel_mapping` and `register_kernel_mapping` take: our layers by name and device type.

    Args:
        backends: Types of devices; `"cpu"` too, where the layers run plain torch (or Triton's interpreter).
    """
    mapping = {}
    for name, (import_name, layer) in LAYERS.items():
        repository = LocalLayerRepository(local_repository(find_project(import_name)), layer_name=layer)
        mapping[name] = dict.fromkeys(backends, repository)
    return mapping


def open_gated_mlps(*classes: type[nn.Module]) -> None:
    """Lets `kernelize` replace the forward of gated MLP classes (`LlamaMLP`, say), which transformers leaves closed.

    It concerns instances whose activation is SiLU.

    Raises:
        TypeError: A class that is no module.
    """
    for kind in classes:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"{kind!r} is no class of torch modules: pass a class such as LlamaMLP")
        replace_kernel_forward_from_hub(kind, "GatedMLP", condition=_is_gated_mlp)


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module looks like `down_proj(silu(gate_proj(x)) * up_proj(x))` and has nothing else below it."""
    parts = dict(module.named_children())
    activation = parts.pop("act_fn", None)
    # transformers' SiLU is a class of its own where its `kernels` hooks are on.
    return parts.keys() == {"gate_proj", "up_proj", "down_proj"} and type(activation).__name__ in (
        "SiLU",
        "SiLUActivation",
    )


def kernelize_layers(model: nn.Module, *, training: bool = False, device: str | None = None) -> nn.Module:
    """Puts our RMSNorm and gated MLP into a model, through the `kernels` library.

    Args:
        model: A model of transformers; quantized projections are fine.
        training: Whether the layers must have gradients.
        device: Type of device; by default that of the model. On a CPU the layers run plain torch.

    Returns:
        The model itself. `kernels.kernelize` with an empty mapping undoes it.
    """
    device = device or next(model.parameters()).device.type
    open_gated_mlps(*{type(m) for m in model.modules() if _is_gated_mlp(m)})
    mode = Mode.TRAINING if training else Mode.INFERENCE
    with use_kernel_mapping(layer_mapping((device,)), inherit_mapping=False):
        return kernelize(model, mode=mode | Mode.TORCH_COMPILE, device=device)
