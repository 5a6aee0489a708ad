"""What each rank of tests/integrations/test_ranks.py runs: `torchrun ranks.py FOLDER`."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import gossamer as gs

METHODS = {
    "rigl": lambda: gs.weights.RigL(0.2, every=2),
    "set": lambda: gs.weights.SET(0.2, every=2),
    "srste": lambda: gs.weights.SRSTE(decay=0.01),
}
STEPS, ROWS = 8, 6
"""Rows of a global batch: as many on one rank, half on each of two."""


def rows():
    """float64, so that the order of a sum over ranks cannot tip a ranking."""
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (x[:, :3].argmax(1))


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def found(callback, model):
    return {"run": callback.run.state_dict(), "model": dict(model.state_dict())}


def with_transformers(name, folder, world, resume=None):
    import transformers

    from gossamer.integrations.transformers import SparseTraining

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body()

        def forward(self, x, labels):
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS // world,
        max_grad_norm=0.05, learning_rate=0.1, report_to=[], lr_scheduler_type="constant",
        save_steps=3, logging_steps=1, disable_tqdm=True, use_cpu=True, seed=5,
        ddp_backend="gloo" if world > 1 else None,
    )  # fmt: skip
    model, callback = Net(), SparseTraining(METHODS[name](), seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [{"x": x, "labels": y} for x, y in zip(*rows(), strict=True)]
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=resume)
    return found(callback, model)


def with_lightning(name, folder, world, resume=None):
    import lightning.pytorch as lightning

    from gossamer.integrations.lightning import SparseTraining

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = body()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    model, callback = Net(), SparseTraining(METHODS[name](), seed=3)
    keep = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(
        callbacks=[callback, keep], accelerator="cpu", devices=world, max_steps=STEPS,
        strategy="ddp" if world > 1 else "auto", logger=False, gradient_clip_val=0.05,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(*rows())
    rank = int(os.environ["RANK"]) if world > 1 else 0
    # Lightning's own sampler shuffles on several ranks.
    mine = torch.utils.data.DistributedSampler(data, world, rank, shuffle=False)
    loader = torch.utils.data.DataLoader(data, ROWS // world, sampler=mine)
    trainer.fit(model, loader, ckpt_path=resume)
    return found(callback, model)


def main(folder):
    rank = int(os.environ["RANK"])
    out = {}
    for name in METHODS:
        out[f"transformers {name}"] = with_transformers(name, folder / f"hf-{name}", 2)
    out["transformers resumed"] = with_transformers(
        "rigl", folder / "hf-rigl", 2, str(folder / "hf-rigl" / "checkpoint-3")
    )
    for name in METHODS:
        out[f"lightning {name}"] = with_lightning(name, folder / f"pl-{name}", 2)
    torch.save(out, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
