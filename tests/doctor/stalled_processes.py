"""Two processes (gloo) that train together; the second stops coming. `stalled_processes.py WHAT FOLDER`.

WHAT is "stop", a barrier in the loop, with a watchdog that stops the first, or one of DDP's own collectives: "forward",
where the second forward orders the gradients anew, or "backward", the exchange of gradients. Prints how the first
process ended, None if by this program.
"""

import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vmamba.doctor import Watchdog

LIMIT = 3.0


def train(rank, what, folder, meeting):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    model = torch.nn.Linear(4, 4)
    if what != "stop":
        model = torch.nn.parallel.DistributedDataParallel(model)
    last = 3 if what == "backward" else 2
    on_stall = "stop" if what == "stop" and rank == 0 else "dump"
    with Watchdog(LIMIT, folder, on_stall=on_stall, advice="go on") as watchdog:
        for number in range(1, last + 1):
            if number == last and rank == 1:
                with watchdog.phase("elsewhere"):
                    time.sleep(200)
            with watchdog.phase("forward"):
                loss = model(torch.ones(2, 4)).sum()
                if what == "stop":
                    dist.barrier()
            with watchdog.phase("backward"):
                loss.backward()
            watchdog.step()


if __name__ == "__main__":
    what, folder = sys.argv[1:]
    with tempfile.TemporaryDirectory() as meeting:
        context = mp.get_context("spawn")
        processes = [context.Process(target=train, args=(rank, what, folder, f"{meeting}/file")) for rank in range(2)]
        for process in processes:
            process.start()
        if what == "stop":
            processes[0].join()
        while not all(Path(folder, f"stall-1{suffix}.txt").exists() for suffix in ("", "-rank1")):
            time.sleep(0.05)
        first = processes[0].exitcode
        for process in processes:
            process.kill()
            process.join()
    print(first)
