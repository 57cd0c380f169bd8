"""SS2D as attention: how much every pixel contributes to one pixel of the scan's output, through every route.

A selective scan is linear in its input once delta, B and C are known. Unrolled, with steps i <= t along a route,

    h_t = sum_i  prod_{i < j <= t} exp(delta_j A)  delta_i B_i x_i
    y_t = <C_t, h_t> + D x_t  =  sum_i  w_ti x_i + D x_t,     w_ti = sum_n C_t[n] B_i[n] decay_ti[n] delta_i
    decay_ti[n] = exp(A[n] sum_{i < j <= t} delta_j)

which is the form (Q . w)(K / w)^T V of the paper, with C for Q, B for K, x delta for V and the cumulated decay for w.
The decay is computed from the sum of delta between the two steps, never as a quotient, so that it cannot overflow.
Everything is computed in fp64 (fp32 on devices without it) from the numbers of one forward pass; no derivatives are
taken.

Sources: VMamba (arXiv 2401.10166), what it says of SS2D and self-attention, and its figures of attention and activation
maps; Mamba (arXiv 2312.00752) for the scan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import SS2D
from ..ops import ROUTES, ss2d
from ..ops.functional import scan_rows_both_ways
from ..ops.routes import route_indices
from .inspecting import evaluating, find_layer, near_names

__all__ = [
    "AttentionMap",
    "RoutedScan",
    "StateDecay",
    "attention_map",
    "attention_matrix",
    "routed_scan",
    "scan_attention",
    "scan_of_layer",
    "ss2d_layers",
    "state_decay",
]

STATES_AT_ONCE = 2**22  # decays computed at a time: 32 MB in fp64
LARGEST_MATRIX = 2**26  # weights that `attention_matrix` agrees to return: 0.5 GB in fp64


@dataclass(frozen=True)
class RoutedScan:
    """One image's 2-D scan: what each route reads, and with which parameters.

    Attributes:
        routes: "cross2d", "unidi", "bidi" or "cascade2d".
        sources: (K, H, W, E), the scan's input as route k reads it: x itself, the same for all; with "cascade2d" the
            normalised x for the rows (k = 0, 1), and for the columns (2, 3) the normalised output of the rows.
        code: (K, H, W, R + 2N), each pixel's [R for delta | B | C].
        dt_weight: (K, E, R). dt_bias: (K, E). A: (K, E, N). D: (K, E).
        output: (H, W, E), what the scan gave.

    All but `output` are fp64 (fp32 on devices without it).
    """

    routes: str
    sources: Tensor
    code: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    output: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.sources.shape[1:3])


@dataclass(frozen=True)
class AttentionMap:
    """How the scan's output at one pixel is made of its input. Without batch; 0 where a route has not been yet.

    Attributes:
        pixel: (row, column) of the output looked at. routes: as in `RoutedScan`.
        weights: (K, E, H, W), w: signed, by route and channel, without the skip.
        similarity: (K, H, W), <C of the pixel, B of every pixel>, the paper's Q K^T: without decay and delta, the same
            for all channels.
        decay: (K, H, W), what is left of a state that a pixel entered when the walk arrives; mean over channels and
            states, 1 at the step itself.
        sources: (K, H, W, E), what the weights multiply.
        skip: (K, E), D x, apart from the weights. With "cascade2d" a backward route's skip reads the mirrored pixel.
        steps: for each route how many pixels it has read, the last one included.
    """

    pixel: tuple[int, int]
    routes: str
    weights: Tensor
    similarity: Tensor
    decay: Tensor
    sources: Tensor
    skip: Tensor
    steps: tuple[int, ...]

    def contributions(self) -> Tensor:
        """(K, E, H, W): weights times input. Summed over pixels, plus `skip`, the output of each route."""
        return self.weights * self.sources.permute(0, 3, 1, 2).to(self.weights.dtype)

    def output(self) -> Tensor:
        """(E,): contributions and skip added up: what the scan gives at the pixel."""
        by_route = self.contributions().sum((2, 3), dtype=self.sources.dtype) + self.skip
        # the columns read what the rows gave, so the rows are in their sources already
        return by_route[2:].sum(0) if self.routes == "cascade2d" else by_route.sum(0)

    def by_route(self, *, weights: bool = False) -> Tensor:
        """(K, H, W): the contributions' absolute values, mean over channels; with `weights` those of the weights."""
        return self._values(weights).abs().mean(1)

    def all_routes(self, *, weights: bool = False) -> Tensor:
        """(H, W): the same of the routes' sum; what two routes give may cancel.

        Raises:
            ValueError: for "cascade2d", whose columns read the normalised output of its rows: their contributions
                are of different inputs and have no sum.
        """
        if self.routes == "cascade2d":
            raise ValueError(
                "cascade2d has no map of all routes: its columns read the normalised output of its rows, which is not "
                "linear in the scan's input. Look at by_route(): rows 0 and 1, columns 2 and 3"
            )
        return self._values(weights).sum(0).abs().mean(0)

    def _values(self, weights: bool) -> Tensor:
        return self.weights if weights else self.contributions()

    def half_life(self) -> list[float]:
        """For each route the steps after which less than half of a state is left, in the mean over channels and states;
        infinite where the whole walk up to the pixel is shorter than that.
        """
        kept = (self.decay >= 0.5).sum((1, 2)).tolist()  # decay falls with every step back
        return [math.inf if count == steps else float(count) for count, steps in zip(kept, self.steps, strict=True)]


@dataclass(frozen=True)
class StateDecay:
    """What is left of a state's entry after some steps along each route.

    Attributes:
        pixel: (row, column) where the walk stands.
        steps: (S,) how many steps ago.
        mean, low, high: (K, S) in [0, 1]: mean, 10th and 90th percentile over channels and states; NaN before the
            route's first pixel.
    """

    pixel: tuple[int, int]
    steps: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor


def ss2d_layers(model: nn.Module) -> list[str]:
    """Names of the model's SS2D layers, in the order of the network, such as "stages.0.blocks.0.ssm".

    Raises:
        ValueError: it has none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SS2D)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no SS2D layer: only VMamba networks have scan routes to look at")
    return names


def ss2d_layer(model: nn.Module, layer: str) -> str:
    """The name of an SS2D layer, given it or that of the block around it.

    Raises:
        ValueError: there is none; lists near names.
    """
    names = ss2d_layers(model)
    found = next((name for name in (layer, f"{layer}.ssm") if name in names), None)
    if found is None:
        raise ValueError(f"the model has no SS2D layer {layer!r}; {near_names(layer, names)}")
    return found


def scan_of_layer(model: nn.Module, image: Tensor, layer: str) -> RoutedScan:
    """What the scan of one SS2D layer reads and gives for an image.

    The model is in evaluation mode meanwhile, and as it was afterwards; the hooks are removed.

    Args:
        model: with SS2D layers, such as `VMamba`.
        image: (1, C, H, W), preprocessed as the model expects.
        layer: a name out of `ss2d_layers(model)`, or of the block around it.

    Raises:
        ValueError: not one image; no SS2D layer of that name (lists near names).
    """
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"one image is looked at, (1, C, H, W), got {tuple(image.shape)}")
    module = find_layer(model, ss2d_layer(model, layer))
    kept: dict[str, Tensor] = {}
    # with hooks on them the modules run one by one everywhere, on a GPU too, where a block is otherwise one operator
    handles = [
        module.act.register_forward_hook(lambda _, __, output: kept.update(x=output)),
        module.out_norm.register_forward_pre_hook(lambda _, inputs: kept.update(y=inputs[0])),
    ]
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            model(image.to(device))
    finally:
        for handle in handles:
            handle.remove()
    A = -torch.exp(module.A_log.detach().double() if device.type != "mps" else module.A_log.detach().float())
    weights = (module.x_proj_weight.detach(), module.dt_weight.detach(), module.dt_bias.detach(), A, module.D.detach())
    return _routed(kept["x"], *weights, module.routes, kept["y"])


def routed_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    routes: str = "cross2d",
) -> RoutedScan:
    """The same for the operator alone: arguments, and errors, as `vmamba.ops.ss2d`, with x (1, H, W, E)."""
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"one image is looked at, x (1, H, W, E), got {tuple(x.shape)}")
    with torch.no_grad():
        output = ss2d(x, x_proj_weight, dt_weight, dt_bias, A, D, routes=routes)
        return _routed(x, x_proj_weight, dt_weight, dt_bias, A, D, routes, output)


def _routed(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: str,
    output: Tensor,
) -> RoutedScan:
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    x, *weights = (t.to(dtype) for t in (x, x_proj_weight, dt_weight, dt_bias, A, D))
    x_proj, dt_weight, dt_bias, A, D = weights
    K, E, _ = dt_weight.shape
    if routes == "cascade2d":
        rows = F.layer_norm(x, (E,), eps=1e-5)
        columns = F.layer_norm(scan_rows_both_ways(rows, *weights, slice(0, 2)), (E,), eps=1e-5)
        sources = torch.cat([rows, rows, columns, columns])
    else:
        sources = x.expand(K, -1, -1, -1)
    code = torch.einsum("khwe,kre->khwr", sources, x_proj)
    return RoutedScan(
        routes, sources, code, dt_weight, dt_bias, A.unflatten(0, (K, E)), D.unflatten(0, (K, E)), output[0]
    )


def attention_map(scan: RoutedScan, pixel: tuple[int, int]) -> AttentionMap:
    """The contribution of every pixel to one pixel of the scan's output. Linear in the number of pixels.

    Args:
        scan: of `scan_of_layer` or `routed_scan`.
        pixel: (row, column) in the scan's grid.

    Returns:
        Weights and similarity in the dtype of the scan's output, fp32 at least.

    Raises:
        ValueError: the pixel lies outside the grid.
    """
    _check_pixel(pixel, scan.grid)
    K, E, _ = scan.A.shape
    height, width = scan.grid
    dtype = torch.promote_types(scan.output.dtype, torch.float32)
    new = {"device": scan.code.device, "dtype": dtype}
    weights = torch.zeros(K, E, height * width, **new)
    similarity, decay = torch.zeros(K, height * width, **new), torch.zeros(K, height * width, **new)
    skip, steps = [], []
    for k in range(K):
        walked, delta, B, C = _walk_to(scan, k, pixel)
        w, mean_decay = _scan_weights(delta, scan.A[k], B, C[-1])
        weights[k, :, walked] = w.t().to(dtype)
        similarity[k, walked] = (B @ C[-1]).to(dtype)
        decay[k, walked] = mean_decay.to(dtype)
        skip.append(scan.D[k] * scan.sources[k].flatten(0, 1)[walked[-1]])
        steps.append(len(walked))
    grid = (height, width)
    return AttentionMap(
        tuple(pixel),
        scan.routes,
        weights.unflatten(2, grid),
        similarity.unflatten(1, grid),
        decay.unflatten(1, grid),
        scan.sources,
        torch.stack(skip),
        tuple(steps),
    )


def attention_matrix(scan: RoutedScan, channels: list[int] | None = None) -> Tensor:
    """All pixels' weights, for small grids: (K, E, L, L), [.., q, i] of pixel i for the output at pixel q, row-major.

    Args:
        scan: as in `attention_map`.
        channels: which of the E channels; None for all.

    Raises:
        ValueError: more than `LARGEST_MATRIX` weights (an L x L matrix grows with the square of the pixels); a channel
            that there is not.
    """
    K, E, _ = scan.A.shape
    height, width = scan.grid
    channels = list(range(E)) if channels is None else channels
    if wrong := [c for c in channels if not 0 <= c < E]:
        raise ValueError(f"channels are 0 to {E - 1}, not {wrong[0]}")
    size = K * len(channels) * (height * width) ** 2
    if size > LARGEST_MATRIX:
        raise ValueError(
            f"{K} routes x {len(channels)} channels x ({height} x {width})^2 pixels are {size:,} weights, more than "
            f"{LARGEST_MATRIX:,}: name fewer channels, take a smaller image, or one pixel with attention_map"
        )
    rows = [attention_map(scan, divmod(q, width)).weights[:, channels].flatten(2) for q in range(height * width)]
    return torch.stack(rows, dim=2)


def state_decay(scan: RoutedScan, pixel: tuple[int, int], steps: int = 64) -> StateDecay:
    """What is left of the states of the last `steps` steps along each route, when it arrives at a pixel.

    Raises:
        ValueError: the pixel lies outside the grid, or `steps` is less than 1.
    """
    _check_pixel(pixel, scan.grid)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    steps = min(steps, scan.grid[0] * scan.grid[1])
    summaries = torch.full((3, scan.A.shape[0], steps), math.nan, dtype=scan.A.dtype, device=scan.A.device)
    for k, A in enumerate(scan.A):
        _, delta, _, _ = _walk_to(scan, k, pixel)
        passed = _passed_since(delta)[-steps:].flip(0)  # the step itself first
        decay = torch.exp(passed[..., None] * A).flatten(1)
        bounds = torch.quantile(decay, torch.tensor([0.1, 0.9], dtype=decay.dtype, device=decay.device), dim=1)
        summaries[:, k, : len(passed)] = torch.cat([decay.mean(1)[None], bounds])
    return StateDecay(tuple(pixel), torch.arange(steps), *summaries.cpu())


def scan_attention(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    step: int,
    delta_bias: Tensor | None = None,
    *,
    softplus: bool = False,
) -> Tensor:
    """The weights of one step of a plain selective scan, in the arguments of `vmamba.ops.selective_scan`.

    Args:
        delta: (batch, K*E, L). A: (K*E, N). B, C: (batch, K, N, L), K groups. delta_bias: (K*E,) or None.
        step: which step's output, 0 to L - 1.
        softplus: apply softplus to delta + delta_bias.

    Returns:
        (batch, K*E, L) in delta's dtype: y[..., step] = (weights * u).sum(-1) + D u[..., step]; 0 after the step.

    Raises:
        ValueError: for a step outside, or shapes that do not fit.
    """
    batch, channels, length = delta.shape
    if not 0 <= step < length:
        raise ValueError(f"the sequence has steps 0 to {length - 1}, not {step}")
    if B.ndim != 4 or B.shape != C.shape or channels % B.shape[1] or A.shape != (channels, B.shape[2]):
        raise ValueError(
            f"delta (batch, K*E, L), A (K*E, N), B and C (batch, K, N, L) are needed, got {tuple(delta.shape)}, "
            f"{tuple(A.shape)}, {tuple(B.shape)} and {tuple(C.shape)}"
        )
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if softplus:
        delta = F.softplus(delta)
    groups = B.shape[1]
    weights = torch.zeros_like(delta).unflatten(1, (groups, -1))
    for b in range(batch):
        for k in range(groups):
            steps = delta[b].unflatten(0, (groups, -1))[k, :, : step + 1].t().double()
            A_k = A.unflatten(0, (groups, -1))[k].double()
            w, _ = _scan_weights(steps, A_k, B[b, k, :, : step + 1].t().double(), C[b, k, :, step].double())
            weights[b, k, :, : step + 1] = w.t().to(weights.dtype)
    return weights.flatten(1, 2)


def _walk_to(scan: RoutedScan, k: int, pixel: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What route k reads up to the step that writes `pixel`: pixels (T,), delta (T, E), B (T, N), C (T, N)."""
    walked = _pixels_walked(scan.routes, k, pixel, scan.grid).to(scan.code.device)
    N = scan.A.shape[2]
    code, B, C = scan.code[k].flatten(0, 1)[walked].split([scan.dt_weight.shape[2], N, N], dim=-1)
    return walked, F.softplus(F.linear(code, scan.dt_weight[k], scan.dt_bias[k])), B, C


def _pixels_walked(routes: str, k: int, pixel: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    (row, column), (height, width) = pixel, grid
    if routes == "cascade2d":
        place, length = (column, width) if k < 2 else (row, height)
        places = torch.arange(place + 1)
        if k % 2:  # backward, and its output is not flipped back: step t is written at place t
            places = length - 1 - places
        return row * width + places if k < 2 else places * width + column
    order = route_indices(ROUTES[routes][k], height, width)
    return order[: int((order == row * width + column).nonzero()) + 1]


def _passed_since(delta: Tensor) -> Tensor:
    """(T, E): the sum of delta over the steps after each step, up to the last; 0 for the last itself."""
    later = delta.flip(0).cumsum(0).flip(0)
    return torch.cat([later[1:], torch.zeros_like(later[:1])])


def _scan_weights(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (T, E) of the steps of a scan for its last step's output, and their decay (T,), mean over E and N.

    Args:
        delta: (T, E), positive. A: (E, N). B: (T, N). C: (N,), of the last step.
    """
    passed = _passed_since(delta)
    weights, means = [], []
    at_once = max(1, STATES_AT_ONCE // A.numel())
    for passed_part, BC in zip(passed.split(at_once), (B * C).split(at_once), strict=True):
        decay = torch.exp(passed_part[..., None] * A)
        weights.append(torch.einsum("ten,tn->te", decay, BC))
        means.append(decay.mean((1, 2)))
    return torch.cat(weights) * delta, torch.cat(means)


def _check_pixel(pixel: tuple[int, int], grid: tuple[int, int]) -> None:
    if len(pixel) != 2 or not all(0 <= place < side for place, side in zip(pixel, grid, strict=True)):
        raise ValueError(
            f"the pixel (row, column) {tuple(pixel)} lies outside the layer's grid of {grid[0]} x {grid[1]}: rows are "
            f"0 to {grid[0] - 1}, columns 0 to {grid[1] - 1}"
        )
