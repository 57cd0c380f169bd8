"""The classifier: norm, pool, dropout, linear."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["GLOBAL_POOLS", "ClassifierHead"]

GLOBAL_POOLS = ("avg", "")


class ClassifierHead(nn.Module):
    """LayerNorm, mean over pixels, dropout, linear.

    (B, H, W, C) -> (B, num_classes); (B, C) with num_classes = 0; (B, num_classes, H, W), a score map, with
    global_pool = "".
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop_rate)
        self.dim, self.global_pool = dim, global_pool
        self.reset(num_classes, global_pool, device=device, dtype=dtype)

    def reset(self, num_classes: int, global_pool: str | None = None, *, device=None, dtype=None) -> None:
        """A fresh linear layer for `num_classes` (0: none), and another pooling when one is named.

        Raises:
            ValueError: for a negative class count or an unknown pooling; nothing is changed then.
        """
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be an integer >= 0 (0 for no classifier), got {num_classes!r}")
        if global_pool is not None and global_pool not in GLOBAL_POOLS:
            raise ValueError(f"unknown global_pool {global_pool!r}: choose 'avg', or '' for no pooling")
        if global_pool is not None:
            self.global_pool = global_pool
        if num_classes:
            self.fc = nn.Linear(self.dim, num_classes, device=device, dtype=dtype)
            nn.init.trunc_normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)
        else:
            self.fc = nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(x)
        if self.global_pool:
            x = x.mean((1, 2))
        x = self.drop(x)
        if not pre_logits:
            x = self.fc(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)
