"""What each rank of tests/engine/test_distributed.py runs: `torchrun ranks.py FOLDER`."""

import copy
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "methods"))
from examples import TOPOLOGY

import gossamer as gs

TOTAL, STOP, ROWS = 13, 7, 8
SETS = (gs.Coupled(12, ("4",), (), (), ("6",)),)


ALL = {
    name: lambda made=x.make: made(SETS, 3)
    for name, x in TOPOLOGY.items()
    # A batch norm sees its own rank's batch only, so two ranks differ from one.
    if "-" not in name and not x.make(SETS, 3).trains_scales
}
METHODS = {name: make for name, make in ALL.items() if name not in ("grasp", "synflow")}
"""Those that any number of ranks may train with, and sharded weights."""
RESUMED = ("rigl", "srste", "scl")


def build():
    """float64, so that the order of a sum over ranks cannot tip a ranking; 5 rows shard unevenly."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 12), nn.ReLU(), nn.Linear(12, 5),
    ).double()  # fmt: skip


def loss_of(model, step, rank, world, part=0, parts=1):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 4, 4, 4, generator=generator, dtype=torch.float64)
    y = (x.mean((1, 2, 3)) * 20).long().clamp(0, 4)
    mine = slice(rank + part * world, None, world * parts)
    return nn.functional.cross_entropy(model(x[mine]), y[mine])


class Job:
    """One run of one method: `wrap` distributes the model, None leaves it alone."""

    def __init__(self, method, rank=0, world=1, wrap=None, state=None, **more):
        self.rank, self.world = rank, world
        self.plain = build()
        self.model = self.plain if wrap is None else wrap(self.plain)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        if state is not None:
            self.put(state)
        self.open = gs.sparse_training(
            self.model, self.optimizer, ALL[method](), total_steps=TOTAL,
            loss=lambda: self.loss(0), state=None if state is None else state["run"], **more,
        )  # fmt: skip

    def loss(self, step, part=0, parts=1):
        return loss_of(self.model, step, self.rank, self.world, part, parts)

    def advance(self, run, steps, clip=False, parts=1):
        for step in steps:
            self.optimizer.zero_grad()
            for part in range(parts):
                last = part == parts - 1
                held = hasattr(self.model, "no_sync") and not last
                with self.model.no_sync() if held else nullcontext():
                    (self.loss(step, part, parts) / parts).backward()
            if clip:
                run.mask_gradients()
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()

    def put(self, state):
        from torch.distributed.checkpoint import state_dict as dcs

        state = copy.deepcopy(state)  # torch shards it in place
        options = dcs.StateDictOptions(full_state_dict=True)
        dcs.set_state_dict(
            self.plain, self.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"], options=options,
        )  # fmt: skip

    def state(self, run):
        from torch.distributed.checkpoint import state_dict as dcs

        options = dcs.StateDictOptions(full_state_dict=True)
        model, optimizer = dcs.get_state_dict(self.plain, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer, "run": run.state_dict()}


def result(job, run):
    weights = {x.name: x.matrix(x.weight).clone() for x in run.layers}
    return {"run": run.state_dict(), "weights": weights, "density": run.density}


def whole_run(method, rank=0, world=1, wrap=None, clip=False, parts=1, **more):
    job = Job(method, rank, world, wrap, **more)
    with job.open as run:
        job.advance(run, range(TOTAL), clip, parts)
        return result(job, run)


def first_part(method, rank=0, world=1, wrap=None):
    job = Job(method, rank, world, wrap)
    with job.open as run:
        job.advance(run, range(STOP))
        return job.state(run)


def second_part(method, state, rank=0, world=1, wrap=None):
    job = Job(method, rank, world, wrap, state=state)
    with job.open as run:
        job.advance(run, range(STOP, TOTAL))
        return result(job, run)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[4])
    return fully_shard(model)


def own_reduction(rank, world):
    """Neither DDP nor FSDP: only the gradients of kept weights are sent, after masking."""
    job = Job("rigl", rank, world, group=distributed.group.WORLD)
    with job.open as run:
        for step in range(TOTAL):
            job.optimizer.zero_grad()
            job.loss(step).backward()
            run.mask_gradients()
            for parameter in job.plain.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= world
            job.optimizer.step()
        return result(job, run)


def message(call):
    try:
        call()
    except gs.UsageError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def diverged(rank, world):
    """Weights that differ between ranks are an error on all of them at the next update."""
    job = Job("rigl", rank, world, ddp)
    with job.open as run:
        with torch.no_grad():
            weight = job.plain[4].weight
            weight.add_(rank * torch.randn(12, 96, dtype=torch.float64) * (weight != 0))
        return message(lambda: job.advance(run, range(3)))


def strayed(rank, world, wrap):
    """Weights outside the support on one rank are an error on all of them before the step."""
    job = Job("set", rank, world, wrap)
    with job.open as run:
        job.advance(run, range(1))
        if rank == 1:
            local = job.plain[4].weight.detach()
            (local.to_local() if hasattr(local, "to_local") else local).fill_(1)
        said = message(lambda: job.advance(run, range(1, 2)))
        dropped = run.apply_to(job.model)
        job.advance(run, range(1, 2))
        return {"said": said, "dropped": dropped, "step": run.step}


def nan_on_one_rank(rank, world):
    """The rank whose shard is sound must not wait for the other for ever."""
    job = Job("set", rank, world, fsdp)
    with job.open as run:
        job.loss(0).backward()
        if rank == 1:
            job.plain[4].weight.grad.to_local()[0, 0] = float("nan")
        said = message(job.optimizer.step)
        job.advance(run, range(1))
        return {"said": said, "step": run.step}


def refused(method, rank, world, wrap):
    """An error at the start, before anything changed."""
    job = Job(method, rank, world, wrap)
    return message(lambda: job.open.__enter__())


def flattened(rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(build(), device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    return message(lambda: gs.SparseRun(wrapped, optimizer, gs.weights.SET(0.2), TOTAL))


def after_evaluation(rank, world):
    """FSDP2 leaves the root gathered after a forward without backward."""
    job = Job("set", rank, world, fsdp)
    with torch.no_grad():
        job.loss(0)
    with job.open as run:
        job.advance(run, range(TOTAL))
        return result(job, run)


def main(folder):
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    ones = torch.load(folder / "one.pt", weights_only=True)
    out = {}
    for name in METHODS:
        out[f"ddp {name}"] = whole_run(name, rank, world, ddp, seed=rank)
        out[f"fsdp {name}"] = whole_run(name, rank, world, fsdp, seed=rank)
    for kind, wrap in (("ddp", ddp), ("fsdp", fsdp)):
        out[f"{kind} clipped"] = whole_run("rigl", rank, world, wrap, clip=True)
    out["ddp accumulated"] = whole_run("rigl", rank, world, ddp, parts=2)
    for name in RESUMED:
        out[f"part {name}"] = first_part(name, rank, world, fsdp)
        out[f"again {name}"] = second_part(name, out[f"part {name}"], rank, world, fsdp)
        out[f"from one {name}"] = second_part(name, ones[name], rank, world, fsdp)
        out[f"to ddp {name}"] = second_part(name, ones[name], rank, world, ddp)
    out["ddp synflow"] = whole_run("synflow", rank, world, ddp)
    for name, wrap in (("grasp", ddp), ("synflow", fsdp)):
        out[f"refused {name}"] = refused(name, rank, world, wrap)
    out["own reduction"] = own_reduction(rank, world)
    out["diverged"] = diverged(rank, world)
    for kind, wrap in (("ddp", ddp), ("fsdp", fsdp)):
        out[f"{kind} strayed"] = strayed(rank, world, wrap)
    out["nan"] = nan_on_one_rank(rank, world)
    out["flattened"] = flattened(rank, world)
    out["after evaluation"] = after_evaluation(rank, world)
    torch.save(out, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
