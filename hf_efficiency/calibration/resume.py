"""Finished blocks on disk, so that an interrupted calibration goes on where it stopped."""

import hashlib
import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_efficiency.calibration.method import BlockContext, BlockMethod, layer_like

_SAMPLE = 64


class BlockCheckpoints:
    """Keeps each finished block in a safetensors file of `folder`.

    Args:
        folder: Made if it does not exist.
        method: Its `repr` is part of what must match on resuming.
        tokens: Likewise.
        blocks: Names, shapes and a sample of the weights are, too.

    Raises:
        ValueError: If the folder holds the blocks of another run.
    """

    def __init__(self, folder: str | Path, method: BlockMethod, tokens: Tensor, blocks: nn.ModuleList) -> None:
        self.folder = Path(folder)
        self.method = method
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(repr(method).encode())
        digest.update(tokens.cpu().numpy().tobytes())
        for name, p in blocks.named_parameters():
            sample = p.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes()
            digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode() + sample)
        self.fingerprint = digest.hexdigest()
        marker = self.folder / "run.json"
        if marker.exists():
            found = json.loads(marker.read_text())["fingerprint"]
            if found != self.fingerprint:
                raise ValueError(
                    f"{self.folder} holds blocks of another run (other model, method or calibration data). "
                    "Name an empty folder, or delete this one."
                )
        else:
            marker.write_text(json.dumps({"fingerprint": self.fingerprint}))

    def _path(self, ctx: BlockContext) -> Path:
        return self.folder / f"block-{ctx.index:05d}.safetensors"

    def save(self, ctx: BlockContext) -> None:
        """Writes the storage layers, and the block's other parameters (a method may have changed norms)."""
        stored = {
            f"layer.{name}.{key}": t for name, layer in ctx.layers.items() for key, t in layer.state_dict().items()
        }
        dense = {f"{ctx.name}.{n}.": None for n, _ in ctx.block.named_modules() if f"{ctx.name}.{n}" in ctx.layers}
        for key, tensor in ctx.block.state_dict().items():
            if not f"{ctx.name}.{key}".startswith(tuple(dense)):
                stored[f"block.{key}"] = tensor
        temporary = self._path(ctx).with_suffix(".partial")
        # Tensors may share memory (tied norms); safetensors wants each to own its own.
        save_file(
            {key: t.detach().cpu().clone().contiguous() for key, t in stored.items()},
            temporary,
            metadata={"layers": json.dumps(list(ctx.layers))},
        )
        os.replace(temporary, self._path(ctx))

    def load(self, ctx: BlockContext) -> bool:
        """Restores a finished block into `ctx`; False where there is none."""
        path = self._path(ctx)
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["layers"])
            for name in names:
                layer = layer_like(self.method, name, ctx.linears[name], ctx.dtype)
                keys = [k for k in file.keys() if k.startswith(f"layer.{name}.")]  # noqa: SIM118 - no mapping
                layer.load_state_dict({k.removeprefix(f"layer.{name}."): file.get_tensor(k) for k in keys})
                ctx.layers[name] = layer
            rest = {k.removeprefix("block."): file.get_tensor(k) for k in file.keys() if k.startswith("block.")}  # noqa: SIM118
        ctx.block.load_state_dict(rest, strict=False)
        return True
