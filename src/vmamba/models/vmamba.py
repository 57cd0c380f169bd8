"""The network: stem, four stages of VSS blocks, classifier; as timm expects a model to be.

Source: VMamba (arXiv 2401.10166), section 4.3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo, checkpoint_seq
from torch import Tensor, nn

from vmamba.layers import DOWNSAMPLES, SS2D, STEMS, ClassifierHead, VSSBlock, make_mlp
from vmamba.layers.fusion import is_untouched
from vmamba.ops.ahead import compile_ahead, first_step

from .config import VMambaConfig

__all__ = ["FeatureGetter", "VMamba"]

# Leaving these out of weight decay is what their authors meant (Mamba marks them; see no_weight_decay).
_NO_DECAY = ("A_log", "D", "dt_bias", "pos_embed")


class Stage(nn.Module):
    """Downsampling (none in the first stage), then VSS blocks. (B, H, W, C_in) -> (B, H', W', C)."""

    def __init__(self, config: VMambaConfig, index: int, drop_path: list[float], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim = config.dims[index]
        self.grad_checkpointing = False
        self.downsample = DOWNSAMPLES[config.downsample](config.dims[index - 1], dim, **dd) if index else nn.Identity()
        self.blocks = nn.Sequential(*(_block(config, dim, rate, **dd) for rate in drop_path))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


def _block(config: VMambaConfig, dim: int, drop_path: float, **dd: Any) -> VSSBlock:
    ssm = SS2D(
        dim,
        d_state=config.d_state,
        dt_rank=config.dt_rank,
        ssm_ratio=config.ssm_ratio,
        conv=config.ssm_conv,
        conv_bias=config.ssm_conv_bias,
        act=config.ssm_act,
        gate=config.ssm_gate,
        gate_act=config.ssm_gate_act,
        out_norm=config.ssm_out_norm,
        out_act=config.ssm_out_act,
        routes=config.routes,
        init=config.ssm_init,
        **dd,
    )
    mlp = make_mlp(dim, config.mlp_ratio, config.mlp_act, gated=config.gated_mlp, **dd) if config.mlp_ratio else None
    return VSSBlock(dim, ssm, mlp, drop_path=drop_path, post_norm=config.post_norm, **dd)


class VMamba(nn.Module):
    """VMamba as a classifier and as a backbone.

    Images (B, in_chans, H, W), any H and W >= 32, become stage features at about 1/4, 1/8, 1/16 and 1/32, and scores
    (B, num_classes). Inside, tensors are (B, H, W, C); features leave as NCHW views.

    Args:
        config: the architecture; `architecture` gives or overrides single fields of it.
        in_chans: channels of the image.
        num_classes: 0 for no classifier.
        global_pool: "avg", or "" for none.
        drop_rate: dropout before the classifier.
        output_stride: 32, or `8 * patch_size`: there is no other than the architecture's.

    Raises:
        ValueError: for values that cannot be, naming the remedy.
    """

    def __init__(
        self,
        config: VMambaConfig | None = None,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        output_stride: int = 32,
        device=None,
        dtype=None,
        **architecture: Any,
    ):
        super().__init__()
        given = {} if config is None else {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        config = VMambaConfig.from_dict(given | architecture)
        if isinstance(in_chans, bool) or not isinstance(in_chans, int) or in_chans < 1:
            raise ValueError(f"in_chans must be a positive integer, got {in_chans!r}")
        if output_stride not in (32, 8 * config.patch_size):
            raise ValueError(
                f"output_stride must be 32, got {output_stride!r}: the grids of VMamba's stages are fixed; for finer "
                "features take earlier stages (features_only=True, out_indices=...)"
            )
        dd = {"device": device, "dtype": dtype}
        self.config = config
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_features = self.head_hidden_size = config.dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": config.patch_size * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(config.dims)
        ]

        self.stem = STEMS[config.stem](in_chans, config.dims[0], config.patch_size, **dd)
        if config.pos_embed:
            grid = [size // config.patch_size for size in config.img_size]
            self.pos_embed = nn.Parameter(torch.empty(1, config.dims[0], *grid, **dd))
        else:
            self.pos_embed = None
        depth = sum(config.depths)
        # plain Python numbers: reading them out of a tensor would fail on the meta device
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        starts = [sum(config.depths[:i]) for i in range(len(config.depths))]
        self.stages = nn.Sequential(
            *(Stage(config, i, rates[start : start + config.depths[i]], **dd) for i, start in enumerate(starts))
        )
        self.head = ClassifierHead(self.num_features, num_classes, global_pool=global_pool, drop_rate=drop_rate, **dd)
        self._init_weights()

    def _init_weights(self) -> None:
        # Linear layers only: norms start at 1 and 0, convolutions as torch draws them, SS2D draws its own parameters.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: A_log, D, dt_bias, pos_embed."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in _NO_DECAY}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by layer, from the stem to the head, for layer-wise learning rates."""
        return {
            "stem": r"^stem|^pos_embed",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^head\.norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity when there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes` (0: none), on the device and in the dtype of the network."""
        like = next(self.stem.parameters())
        self.head.reset(num_classes, global_pool, device=like.device, dtype=like.dtype)
        self.num_classes, self.global_pool = num_classes, self.head.global_pool

    def load_pretrained(self, path: str) -> None:
        """Load released weights, as timm asks of a model whose files it cannot read itself.

        A classifier of another size stays fresh and the stem takes the number of image channels, since asking for
        pretrained weights under another `num_classes` or `in_chans` is asking for that.
        """
        from .checkpoint import load_checkpoint  # the checkpoint module builds networks, so it imports this one

        load_checkpoint(self, path, new_head=True, adapt_input=True)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage features, each taken after its stage's blocks.

        Args:
            x: (B, in_chans, H, W).
            indices: stages; an integer for the last n, None for all; negative ones count from the end.
            norm: apply the classifier's norm to the last stage's features, when they are among them.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Returns:
            The features in stage order, NCHW, and (before them, unless `intermediates_only`) the last features as
            `forward_features` gives them.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken = self._stage_indices(indices)
        features = []
        self.compile_ahead(x)
        x = self._embed(x)
        for i, stage in enumerate(self.stages[: max(taken) + 1] if stop_early else self.stages):
            x = stage(x)
            if i in taken:
                last = i == len(self.config.depths) - 1
                features.append((self.head.norm(x) if norm and last else x).permute(0, 3, 1, 2))
        return features if intermediates_only else (x.permute(0, 3, 1, 2), features)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one asked for, and the classifier; returns the stages asked for."""
        taken = self._stage_indices(indices)
        cut = max(taken) + 1 < len(self.stages)
        self.stages = self.stages[: max(taken) + 1]
        if prune_norm or cut:
            self.head.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        self.num_features = self.head_hidden_size = self.head.dim = self.config.dims[max(taken)]
        return taken

    def _stage_indices(self, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
        count = len(self.stages)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 0 < indices <= count:
                raise ValueError(f"indices must be 1 to {count} for the last n stages, got {indices}")
            return list(range(count - indices, count))
        taken = [index + count if index < 0 else index for index in indices]
        if not taken or not all(0 <= index < count for index in taken):
            raise ValueError(f"indices must be stages 0 to {count - 1} (or -{count} to -1), got {tuple(indices)}")
        return taken

    def _embed(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) -> (B, H/P, W/P, C), P the patch size; with the position embedding, if any."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        x = self.stem(x)
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, x.shape[1:3]).permute(0, 2, 3, 1)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last stage's features, not normalised, (B, C, H/32, W/32)."""
        self.compile_ahead(x)
        return self.stages(self._embed(x)).permute(0, 3, 1, 2)

    def compile_ahead(self, x: Tensor) -> None:
        """Compile the kernels for images like x (B, in_chans, H, W), side by side instead of each when it is met.

        Autocast, training mode and the recording of gradients are those of the call. The first eager step does this by
        itself, a compiled one cannot: call it before the first step of `torch.compile(model)`. Does nothing off a GPU,
        the second time, or where modules have hooks.
        """
        kind = (self.config, self.in_chans, len(self.stages), self.training)
        # hooks would see numbers that mean nothing, and buffers may count what passes
        first = first_step(kind, x)
        if first is not None and is_untouched(self) and not any(True for _ in self.buffers()):
            x = x.detach()
            compile_ahead(first, lambda: self.stages(self._embed(x)), x, self.parameters())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) as from `forward_features` -> scores (B, num_classes), or the pooled features (B, C)."""
        return self.head(x.permute(0, 2, 3, 1), pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> scores (B, num_classes)."""
        x = self.forward_features(x)
        return self.forward_head(x)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding (1, C, h, w) for another grid (H, W): bicubic, computed in fp32."""
    if pos_embed.shape[2:] == tuple(grid):
        return pos_embed
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    resized = F.interpolate(pos_embed.to(dtype), size=tuple(grid), mode="bicubic", align_corners=False)
    return resized.to(pos_embed.dtype)


class FeatureGetter(nn.Module):
    """VMamba as a backbone: images -> a list of NCHW stage features. What timm's `features_only=True` gives.

    Args:
        model: the network; pruned in place to what is needed.
        out_indices: stages, as in `VMamba.forward_intermediates`.
        out_norm: put a LayerNorm on each returned feature, as the official detection and segmentation backbones do.
    """

    def __init__(
        self, model: VMamba, out_indices: int | list[int] | tuple[int, ...] = (0, 1, 2, 3), out_norm: bool = False
    ):
        super().__init__()
        self.out_indices = tuple(sorted(model.prune_intermediate_layers(out_indices, prune_norm=True)))
        self.model = model
        kept = model.feature_info[: max(self.out_indices) + 1]
        self.feature_info = FeatureInfo(kept, self.out_indices)
        like = next(model.stem.parameters())
        self.out_norms = nn.ModuleDict(
            {
                str(i): nn.LayerNorm(kept[i]["num_chs"], device=like.device, dtype=like.dtype)
                for i in self.out_indices
                if out_norm
            }
        )
        # transformers' backbone classes write here which features they want next, as with timm's own extractors
        self.return_layers = {kept[i]["module"]: str(i) for i in self.out_indices}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """As `VMamba.no_weight_decay`, under this module's names."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As `VMamba.group_matcher`, under this module's names; the output norms come last."""
        groups = self.model.group_matcher(coarse)
        blocks = [(groups["blocks"], None)] if coarse else groups["blocks"]
        blocks = [(pattern.replace("^", r"^model\."), order) for pattern, order in blocks]
        return {
            "stem": groups["stem"].replace("^", r"^model\."),
            "blocks": [*blocks, (r"^out_norms", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `VMamba.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the features of the stages asked for, (B, C_i, H_i, W_i) each."""
        stages = [int(module.rpartition(".")[2]) for module in self.return_layers]
        features = self.model.forward_intermediates(x, stages, intermediates_only=True)
        if not self.out_norms:
            return features
        return [
            self.out_norms[str(i)](y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if str(i) in self.out_norms else y
            for i, y in zip(sorted(stages), features, strict=True)
        ]
