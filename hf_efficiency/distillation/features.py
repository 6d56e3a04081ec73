"""Hidden states of the student drawn towards the teacher's, through learned projections.

Shape legend: n rows (tokens), d_s and d_t features, L matched pairs of blocks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficiency.distillation.layer_map import LayerMap

HIDDEN_LOSSES = ("mse", "normalized_mse", "cosine")


class FeatureLoss(nn.Module):
    """The mean over matched blocks of the distance of W h_s from h_t (FitNets, Romero et al. 2015; TinyBERT, eq. 8).

    W is d_t × d_s without bias, the identity at first where the sizes are the same, and else orthogonal.

    Args:
        layer_map: Pairs (student block, teacher block).
        d_s: Features of the student.
        d_t: Features of the teacher.
        kind: `"mse"`: the mean over features of the squared difference; `"normalized_mse"`: its sum divided by the
            teacher's sum of squares of the same token, so that the few tokens with huge states count like all others;
            `"cosine"`: 1 - cos.
        seed: Of the orthogonal projections.
    """

    def __init__(self, layer_map: LayerMap, d_s: int, d_t: int, kind: str = "cosine", seed: int = 0) -> None:
        super().__init__()
        if kind not in HIDDEN_LOSSES:
            raise ValueError(f"hidden_loss={kind!r} is unknown: choose one of {', '.join(HIDDEN_LOSSES)}.")
        self.layer_map, self.kind = layer_map, kind
        generator = torch.Generator().manual_seed(seed)
        self.projections = nn.ModuleList()
        for _ in layer_map:
            projection = nn.Linear(d_s, d_t, bias=False, device="cpu", dtype=torch.float32)
            if d_s == d_t:
                nn.init.eye_(projection.weight)
            else:
                nn.init.orthogonal_(projection.weight, generator=generator)
            self.projections.append(projection)

    def forward(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss () summed over rows, and the relative errors ‖W h_s - h_t‖² / ‖h_t‖² (L,), summed likewise.

        Args:
            student: (n, d_s) for each student block of the map.
            teacher: (n, d_t) for each teacher block.
        """
        losses, errors = [], []
        for (s, t), projection in zip(self.layer_map, self.projections, strict=True):
            target = teacher[t].detach().float()
            ours = projection(student[s].float()).float()
            squares = (ours - target).square().sum(-1)
            relative = squares / target.square().sum(-1).clamp(min=1e-12)
            if self.kind == "cosine":
                losses.append((1 - F.cosine_similarity(ours, target, dim=-1)).sum())
            else:
                losses.append((squares / target.shape[-1] if self.kind == "mse" else relative).sum())
            errors.append(relative.detach().sum())
        return torch.stack(losses).mean(), torch.stack(errors)
