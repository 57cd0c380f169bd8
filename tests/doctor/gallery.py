"""Broken training set-ups, one a function, and sound ones. Each returns what `examine` takes."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import time

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader, Dataset

import vmamba  # noqa: F401 registers the models
from vmamba.doctor import session
from vmamba.doctor.subject import Subject


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """fc1, a part to be replaced by something broken, fc2: 8 numbers -> 4 classes."""

    def __init__(self, part: nn.Module | None = None, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(8, width)
        self.part = part or nn.ReLU()
        self.fc2 = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc2(self.part(self.fc1(x)))


def subject(model: nn.Module | None = None, **changes) -> Subject:
    """A sound step, but for ``changes``."""
    model = model or Net()
    if "training_loss" not in changes:
        changes.setdefault("loss", nn.CrossEntropyLoss())
    changes.setdefault("batch", (numbers(16, 8), labels(16, 4)))
    if "optimizer" not in changes:
        changes["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    return Subject(model, **changes)


def sound() -> Subject:
    return subject(loader=[(numbers(16, 8), labels(16, 4))] * 3)


def sound_parts():
    """As people with a loop of their own would write it."""
    return Net(), nn.CrossEntropyLoss(), (numbers(16, 8), labels(16, 4))


def sound_on_tiny_images() -> Subject:
    """A quarter of their side is less than a pixel."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    return subject(model, batch=(numbers(16, 3, 1, 1), labels(16, 4)))


def given(make) -> Subject | str:
    """The subject itself where a child can inherit it; else its name, since not all of these can be pickled."""
    return make() if session._can_fork() else f"{make.__module__}:{make.__name__}"


# the loss


def vector_loss() -> Subject:
    return subject(loss=nn.CrossEntropyLoss(reduction="none"))


def detached_loss() -> Subject:
    return subject(loss=lambda output, target: F.cross_entropy(output.detach(), target))


class Detaches(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            return x.relu()


class Frozen(nn.Module):
    """Everything under no_grad: nothing is left of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net(Detaches())
        self.body.fc2.requires_grad_(False)

    def forward(self, x):
        return self.body(x)


def detached_in_a_module() -> Subject:
    return subject(Frozen())


def number_as_loss() -> Subject:
    return subject(loss=lambda output, target: F.cross_entropy(output, target).item())


def logarithm_in_the_loss() -> Subject:
    return subject(loss=lambda output, target: (output * 0).log().mean())


# the batch


def nan_input() -> Subject:
    images = numbers(16, 8)
    images[3, 5] = math.nan
    return subject(batch=(images, labels(16, 4)))


def inf_target() -> Subject:
    target = numbers(16, 4)
    target[7, 2] = math.inf
    return subject(loss=F.mse_loss, batch=(numbers(16, 8), target))


def label_out_of_range() -> Subject:
    target = labels(16, 4)
    target[2] = 4
    return subject(batch=(numbers(16, 8), target))


def negative_label() -> Subject:
    target = labels(16, 4)
    target[2] = -1
    return subject(batch=(numbers(16, 8), target))


def pixels_to_255() -> Subject:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    images = numbers(4, 3, 16, 16).sigmoid() * 255
    return subject(model, batch=(images, labels(4, 4)), optimizer=torch.optim.SGD(model.parameters(), lr=1e-6))


def mixed_devices() -> Subject:
    model = Net()
    model.fc2.to("meta")
    return subject(model)


class MakesItsOwn(nn.Module):
    """Adds a tensor that it makes on another device."""

    def forward(self, x):
        return x + torch.ones(x.shape, device="meta")


def mixed_devices_in_forward() -> Subject:
    return subject(Net(MakesItsOwn()))


# forward and backward


class Logarithm(nn.Module):
    def forward(self, x):
        return x.log()


def nan_in_forward() -> Subject:
    return subject(Net(nn.Sequential(nn.Tanh(), Logarithm())))


class RootOfZero(nn.Module):
    """Finite forward, infinite gradient."""

    def forward(self, x):
        return (x * 0).pow(2).sqrt() + x


def nan_in_backward() -> Subject:
    return subject(Net(RootOfZero()))


class TwoBranches(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 16)


def dead_branch() -> Subject:
    return subject(TwoBranches())


class ForgetsWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient * weight, None


class HalvesGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, 0.5 * (gradient * x).sum(0)


class RightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class Rounds(torch.autograd.Function):
    """A straight-through estimator: meant to have another gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        return (8 * x).round() / 8 + 0 * weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.sum(0)


class Scales(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        # as most do: the bound method under another name
        self.apply_function = function.apply

    def forward(self, x):
        return self.apply_function(x, self.weight)


def dead_branch_in_two_processes() -> Subject:
    return subject(TwoBranches(), processes=2)


def function_returns_none() -> Subject:
    return subject(Net(Scales(ForgetsWeight)))


def wrong_gradient() -> Subject:
    return subject(Net(Scales(HalvesGradient)))


def right_gradient() -> Subject:
    return subject(Net(Scales(RightGradient)))


def straight_through() -> Subject:
    return subject(Net(Scales(Rounds)))


class Wide(nn.Module):
    """Factors of 30 a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=8.0)

    def forward(self, x):
        return self.layers(x)


def exploding_gradient() -> Subject:
    model = Net(Wide())
    return subject(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2))


class Saturated(nn.Module):
    def forward(self, x):
        return (x - 1000).relu()


def dead_activation() -> Subject:
    return subject(Net(Saturated()))


class Deep(nn.Module):
    """Sigmoids upon sigmoids: each takes three quarters of the gradient away, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.rest = nn.Sequential(*(part for _ in range(14) for part in (nn.Sigmoid(), nn.Linear(16, 16))))

    def forward(self, x):
        return self.rest(self.first(x))


def vanishing_gradient() -> Subject:
    return subject(Net(Deep()))


class LooksForAnomalies(Net):
    def __init__(self) -> None:
        super().__init__()
        torch.autograd.set_detect_anomaly(True)


def anomaly_detection() -> Subject:
    """Only by its name: it is switched on for the whole process."""
    return subject(LooksForAnomalies())


def one_sample() -> Subject:
    return subject(Net(nn.BatchNorm1d(16)), batch=(numbers(1, 8), labels(1, 4)))


# the optimiser


def exploding_rate() -> Subject:
    model = Net()
    return subject(
        model,
        loss=F.mse_loss,
        batch=(numbers(16, 8), numbers(16, 4)),
        optimizer=torch.optim.SGD(model.parameters(), lr=50.0),
    )


def optimizer_of_another_model() -> Subject:
    return subject(optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))


class Huge(nn.Module):
    """Within the range of fp32 and of bf16, beyond that of fp16, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        nn.init.constant_(self.up.weight, 3e4)
        nn.init.constant_(self.down.weight, 1e-6)

    def forward(self, x):
        return self.down(self.up(x))


def fp16_overflow() -> Subject:
    model = Net(Huge())
    return subject(model, precision="fp16", optimizer=torch.optim.SGD(model.parameters(), lr=1e-8), clip_norm=1.0)


def large_loss_in_fp16() -> Subject:
    """Gradients that overflow at the first loss scales, as they may."""
    model = Net()
    return subject(
        model,
        loss=lambda output, target: 1000 * F.cross_entropy(output, target),
        precision="fp16",
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
    )


def sound_fp16() -> Subject:
    return subject(precision="fp16")


# memory


class KeepsLosses:
    """A loss with a memory."""

    def __init__(self) -> None:
        self.history = []

    def __call__(self, output, target):
        loss = F.cross_entropy(output, target)
        self.history.append(loss)
        return loss


class KeepsOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = x.sigmoid()
        self.seen.append(y * y)
        return y


def retained_graph() -> Subject:
    return subject(Net(KeepsOutputs()))


def kept_losses() -> Subject:
    return subject(loss=KeepsLosses())


class KeepsCopies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.copies = []

    def forward(self, x):
        self.copies.append(x.detach().repeat(8, 1))
        return x


def piled_up_tensors() -> Subject:
    return subject(Net(KeepsCopies()))


class KeepsState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(16)

    def forward(self, x):
        self.state = 0.9 * self.state + x.mean(0)
        return x + self.state


def graph_used_twice() -> Subject:
    return subject(Net(KeepsState()))


# time


class LoopScan(nn.Module):
    """The scan as a loop that indexes: (B, L, C); its backward fills a whole tensor at every step."""

    def __init__(self, unbind: bool = False) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((4,), 0.9))
        self.unbind = unbind

    def forward(self, x):
        state, states = torch.zeros_like(x[:, 0]), []
        steps = x.unbind(1) if self.unbind else None
        for i in range(x.shape[1]):
            state = self.decay * state + (steps[i] if self.unbind else x[:, i])
            states.append(state)
        return torch.stack(states, 1)


class Sequences(nn.Module):
    def __init__(self, scan: nn.Module) -> None:
        super().__init__()
        self.inner, self.scan, self.head = nn.Linear(3, 4), scan, nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.scan(self.inner(x)).mean(1))


def quadratic_loop(length: int = 96) -> Subject:
    return subject(Sequences(LoopScan()), batch=(numbers(2, length, 3), labels(2, 4)), optimizer=None)


def slow_quadratic_loop() -> Subject:
    """As in the official repository's fallback: long enough to look stuck."""
    return quadratic_loop(20_000)


def linear_loop() -> Subject:
    return subject(Sequences(LoopScan(unbind=True)), batch=(numbers(2, 96, 3), labels(2, 4)), optimizer=None)


class Attention(nn.Module):
    def forward(self, x):
        return F.softmax(x @ x.transpose(1, 2), dim=-1) @ x


def attention() -> Subject:
    return subject(Sequences(Attention()), batch=(numbers(2, 96, 3), labels(2, 4)))


# what never comes back


class Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        threading.Event().wait()
        return gradient


class HoldsTheLock(torch.autograd.Function):
    """In C, with the interpreter's lock held: no Python runs in its process any more."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        while True:
            ctypes.PyDLL(None).sleep(1000)


class Blocking(nn.Module):
    def __init__(self, function=Blocks) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def blocking_backward() -> Subject:
    return subject(Net(nn.Sequential(nn.Tanh(), Blocking())))


def backward_that_holds_the_lock() -> Subject:
    return subject(Net(nn.Sequential(nn.Tanh(), Blocking(HoldsTheLock))))


def blocking_backward_in_a_network() -> Subject:
    torch.manual_seed(0)
    model = timm.create_model("vmamba_nano", dims=8, depths=(1, 1, 1, 1), num_classes=4)
    model.stages[1].blocks[0].mlp.act = Blocking()
    return subject(model, batch=(numbers(2, 3, 32, 32), labels(2, 4)))


class Sleeps(nn.Module):
    def forward(self, x):
        threading.Event().wait()
        return x


def blocking_forward() -> Subject:
    return subject(Net(Sleeps()))


class TellsAndSleeps(nn.Module):
    """Writes down which process it runs in, and sleeps."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def forward(self, x):
        with open(self.file, "w") as file:
            file.write(str(os.getpid()))
        threading.Event().wait()


def telling_blocking_forward(file: str) -> Subject:
    return subject(Net(TellsAndSleeps(file)))


class Dies(nn.Module):
    def forward(self, x):
        os.abort()


def aborting_forward() -> Subject:
    return subject(Net(Dies()))


class Rows(Dataset):
    """Sixty-four samples; what happens at a sample is for subclasses."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index):
        self.at(index)
        return numbers(8, seed=index), index % 4

    def at(self, index: int) -> None:
        pass


class LockedRows(Rows):
    """A lock that the main process holds when the workers are forked: they wait for ever."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()

    def at(self, index: int) -> None:
        with self.lock:
            pass


class DyingRows(Rows):
    def at(self, index: int) -> None:
        if index == 20:
            os._exit(9)


class KilledRows(Rows):
    """As the system does when memory is short."""

    def at(self, index: int) -> None:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)


class BrokenRows(Rows):
    def at(self, index: int) -> None:
        if index == 20:
            raise OSError("image 20 is truncated")


class SlowRows(Rows):
    def at(self, index: int) -> None:
        time.sleep(0.03)


def loading(rows: Dataset, workers: int = 0) -> Subject:
    loader = DataLoader(rows, batch_size=16, num_workers=workers, multiprocessing_context="fork" if workers else None)
    return subject(loader=loader)


def slow_workers() -> Subject:
    def start(_: int) -> None:
        time.sleep(1.5)

    loader = DataLoader(Rows(), 16, num_workers=2, multiprocessing_context="fork", worker_init_fn=start)
    return subject(loader=loader)


def worker_deadlock() -> Subject:
    return loading(LockedRows(), workers=2)


def worker_dies() -> Subject:
    return loading(DyingRows(), workers=1)


def worker_is_killed() -> Subject:
    return loading(KilledRows(), workers=1)


def worker_is_found_dead() -> Subject:
    """What is left of a worker that died after it had announced a batch: no one answers at its socket."""

    class Unanswered:
        def detach(self):
            raise ConnectionResetError(104, "Connection reset by peer")

    class Loader:
        def __iter__(self):
            yield from DataLoader(Rows(), batch_size=16)
            reductions.rebuild_storage_fd(torch.UntypedStorage, Unanswered(), 64)

    return subject(loader=Loader())


def broken_sample() -> Subject:
    return loading(BrokenRows(), workers=1)


def slow_loader() -> Subject:
    return loading(SlowRows())


def only_first_waits(output, target):
    """A collective that only process 0 calls."""
    loss = F.cross_entropy(output, target)
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    return loss


def missing_collective() -> Subject:
    return subject(loss=only_first_waits, processes=2)


def hanging_set_up() -> Subject:
    threading.Event().wait()


def wrong_values() -> Subject:
    raise ValueError("no such shape")


def failing_set_up() -> Subject:
    raise RuntimeError("the licence server is away")
