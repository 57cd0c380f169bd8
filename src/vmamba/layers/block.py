"""The VSS block. Source: VMamba (arXiv 2401.10166), section 4.3 and figure 3."""

from __future__ import annotations

import torch
from timm.layers import DropPath, GluMlp, Mlp
from torch import Tensor, nn

from vmamba.ops.inference import norm_mlp
from vmamba.ops.training import WIDEST_MLP, norm_mlp_kept

from .act import ACTIVATIONS
from .fusion import fused_dtype, fused_training_dtype, is_plain
from .norm import BranchNorm
from .ss2d import SS2D

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
        dtype = fused_dtype(self, x)
        if dtype is not None and self._is_usual():
            return self._forward_fused(x, dtype)
        x = x + self.drop_path(self._branch(x, self.ssm, self.norm))
        if self.mlp is None:
            return x
        dtype = self._mlp_dtype(x)
        if dtype is not None:
            return self._add_mlp(x, dtype)
        return x + self.drop_path(self._branch(x, self.mlp, self.norm2))

    def _branch(self, x: Tensor, branch: nn.Module, norm: nn.Module) -> Tensor:
        return norm(branch(x)) if self.post_norm else branch(norm(x))

    def _is_usual(self) -> bool:
        """Whether the block is one that the joined operators know: every released model's is."""
        mlp = self.mlp
        return (
            not self.post_norm
            and is_plain(self.ssm, SS2D)
            and self.ssm.is_usual()
            and is_plain(self.norm, BranchNorm)
            and (mlp is None or self._has_usual_mlp())
        )

    def _has_usual_mlp(self) -> bool:
        return is_plain(self.mlp, Mlp) and is_plain(self.norm2, BranchNorm) and _is_usual_mlp(self.mlp)

    def _forward_fused(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.ssm.forward_residual(x, self.norm, dtype)
        if self.mlp is None:
            return x
        norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
        return norm_mlp(x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias, dtype)

    def _mlp_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype in which the MLP runs joined where gradients are recorded; None: module by module."""
        if self.post_norm or not self._has_usual_mlp() or not is_plain(self.drop_path, DropPath, nn.Identity):
            return None
        mlp = self.mlp
        C, N = mlp.fc1.in_features, mlp.fc1.out_features
        if C > WIDEST_MLP or C % 32 or N % 64 or (self.training and (mlp.drop1.p > 0 or mlp.drop2.p > 0)):
            return None
        return fused_training_dtype(self, x)

    def _add_mlp(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
        # stochastic depth is a factor for each image: what its own module makes of ones
        is_on = self.training and not isinstance(self.drop_path, nn.Identity)
        scale = self.drop_path(x.new_ones(x.shape[0])) if is_on else None
        weights = (norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return norm_mlp_kept(x, *weights, scale, dtype)


def _is_usual_mlp(mlp: Mlp) -> bool:
    return (
        is_plain(mlp.act, nn.GELU)
        and mlp.act.approximate == "none"
        and is_plain(mlp.norm, nn.Identity)
        and all(is_plain(layer, nn.Linear) and layer.bias is not None for layer in (mlp.fc1, mlp.fc2))
    )


def make_mlp(dim: int, ratio: float, act: str = "gelu", *, gated: bool = False, device=None, dtype=None) -> nn.Module:
    """fc2(act(fc1(x))) with int(dim * ratio) hidden channels; gated: fc1 gives (a, z) and fc2 takes a * act(z)."""
    hidden = int(dim * ratio)
    dd = {"device": device, "dtype": dtype}
    if gated:
        return GluMlp(dim, 2 * hidden, act_layer=ACTIVATIONS[act], gate_last=True, **dd)
    return Mlp(dim, hidden, act_layer=ACTIVATIONS[act], **dd)
