"""The VSS block. Source: VMamba (arXiv 2401.10166), section 4.3 and figure 3."""

from __future__ import annotations

from timm.layers import DropPath, GluMlp, Mlp
from torch import Tensor, nn

from .act import ACTIVATIONS
from .norm import BranchNorm

__all__ = ["VSSBlock", "make_mlp"]


class VSSBlock(nn.Module):
    """x + drop_path(ssm(norm(x))), then x + drop_path(mlp(norm2(x))). (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: C.
        ssm: maps (B, H, W, C) to the same shape.
        mlp: likewise, or None for no second half.
        drop_path: probability of leaving a branch out, per image, in training.
        post_norm: normalise what comes out of each branch, not what goes in.
    """

    def __init__(
        self,
        dim: int,
        ssm: nn.Module,
        mlp: nn.Module | None = None,
        *,
        drop_path: float = 0.0,
        post_norm: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.post_norm = post_norm
        self.norm = BranchNorm(dim, device=device, dtype=dtype)
        self.ssm = ssm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = BranchNorm(dim, device=device, dtype=dtype) if mlp is not None else None
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._branch(x, self.ssm, self.norm))
        if self.mlp is not None:
            x = x + self.drop_path(self._branch(x, self.mlp, self.norm2))
        return x

    def _branch(self, x: Tensor, branch: nn.Module, norm: nn.Module) -> Tensor:
        return norm(branch(x)) if self.post_norm else branch(norm(x))


def make_mlp(dim: int, ratio: float, act: str = "gelu", *, gated: bool = False, device=None, dtype=None) -> nn.Module:
    """fc2(act(fc1(x))) with int(dim * ratio) hidden channels; gated: fc1 gives (a, z) and fc2 takes a * act(z)."""
    hidden = int(dim * ratio)
    dd = {"device": device, "dtype": dtype}
    if gated:
        return GluMlp(dim, 2 * hidden, act_layer=ACTIVATIONS[act], gate_last=True, **dd)
    return Mlp(dim, hidden, act_layer=ACTIVATIONS[act], **dd)
