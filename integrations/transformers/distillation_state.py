"""What a checkpoint of `DistillTrainer` holds besides the student: projections with their map, the averaged teacher."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_efficiency.distillation.ema import EMATeacher
from hf_efficiency.distillation.features import FeatureLoss

STATE_FILE = "distillation.safetensors"


def save_state(folder: Path, features: FeatureLoss | None, ema: EMATeacher | None) -> None:
    """Writes the file, if there is anything to write."""
    tensors = {} if ema is None else {name: tensor.cpu().contiguous() for name, tensor in ema.state_dict().items()}
    layer_map: list[tuple[int, int]] = []
    if features is not None:
        layer_map = list(features.layer_map)
        tensors |= {f"features.{name}": tensor.cpu() for name, tensor in features.state_dict().items()}
    if tensors:
        save_file(tensors, folder / STATE_FILE, metadata={"layer_map": json.dumps(layer_map)})


def load_state(folder: Path, features: FeatureLoss | None, ema: EMATeacher | None, *, fixed: bool) -> None:
    """Reads it back.

    Args:
        folder: The checkpoint.
        features: Gets its projections, and the map if it was found from the data.
        ema: Gets its averages.
        fixed: Whether the layer map is given by the config.

    Raises:
        ValueError: The file is missing, or belongs to other settings.
    """
    if features is None and ema is None:
        return
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"The checkpoint {str(folder)!r} has no {STATE_FILE}: it was made without hidden_weight and ema_decay. "
            "Resume with the settings it was made with."
        )
    tensors = load_file(path)
    if ema is not None:
        ema.load_state_dict(tensors)
    if features is None:
        return
    with safe_open(path, "pt") as file:
        layer_map = tuple((s, t) for s, t in json.loads((file.metadata() or {}).get("layer_map", "[]")))
    if (fixed and layer_map != features.layer_map) or len(layer_map) != len(features.layer_map):
        raise ValueError(
            f"The checkpoint {str(folder)!r} matches the blocks {layer_map}, the config {features.layer_map}: resume "
            "with the layer_map it was made with."
        )
    features.layer_map = layer_map
    own = {name.removeprefix("features."): t for name, t in tensors.items() if name.startswith("features.")}
    features.load_state_dict(own)
