"""Sparse training under Lightning against the same steps taken by hand."""

import pytest
import torch
from torch import nn

import gossamer as gs

lightning = pytest.importorskip("lightning.pytorch")

METHODS = {
    "rigl": lambda: gs.weights.RigL(0.2, every=2),
    "srste": lambda: gs.weights.SRSTE(decay=0.01),
}
X = torch.randn(18, 8, generator=torch.Generator().manual_seed(1))
DATA = torch.utils.data.TensorDataset(X, (X.sum(1) > 0).long())


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.scale = 1.0

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.body(x), y) * self.scale

    def training_step(self, batch, index):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(rows=18):
    return torch.utils.data.DataLoader(torch.utils.data.Subset(DATA, range(rows)), batch_size=3)


def fit(name, folder, path=None, model=None, rows=18, accumulate=2):
    from gossamer.integrations.lightning import SparseTraining

    callback, model = SparseTraining(METHODS[name](), seed=3), model or Net()
    keep = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)
    runner = lightning.Trainer(
        callbacks=[callback, keep], accelerator="cpu", max_steps=8, logger=False,
        accumulate_grad_batches=accumulate, gradient_clip_val=0.05, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, loader(rows), ckpt_path=path)
    return callback, model


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_same_steps_by_hand(name, tmp_path):
    callback, model = fit(name, tmp_path)
    assert callback.run.step == 8
    other = Net()
    optimizer = other.configure_optimizers()
    batches = list(loader())
    with gs.sparse_training(other, optimizer, METHODS[name](), total_steps=8, seed=3) as run:
        for step in range(8):
            optimizer.zero_grad()
            for part in (2 * step, 2 * step + 1):
                (other.loss(*batches[part % 6]) / 2).backward()
            run.mask_gradients()
            assert nn.utils.clip_grad_norm_(other.parameters(), 0.05) > 0.05
            optimizer.step()
    for key, mask in run.masks.items():
        assert torch.equal(mask, callback.run.masks[key])
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_resumed_from_a_checkpoint_is_bitwise_equal(name, tmp_path):
    """One batch an epoch: Lightning itself repeats a batch of a longer epoch when it resumes."""
    callback, model = fit(name, tmp_path, rows=3, accumulate=1)
    saved = next(tmp_path.glob("*step=3*"))
    again, resumed = fit(name, tmp_path / "b", saved, rows=3, accumulate=1)
    assert callback.run.step == again.run.step == 8
    for key, mask in callback.run.masks.items():
        assert torch.equal(mask, again.run.masks[key])
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert again.run.itop_rate == callback.run.itop_rate


def test_bad_input_and_nan_end_with_one_error_and_no_hooks(tmp_path):
    model = Net()
    model.scale = float("nan")
    before = model.body[2].bias.clone()
    with pytest.raises(gs.NonFiniteError, match="NaN"):
        fit("rigl", tmp_path, model=model)
    assert torch.equal(model.body[2].bias, before)
    optimizer = model.trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def averaging(kind, **more):
    from torch.optim.swa_utils import get_ema_avg_fn

    if kind == "swa":
        return lightning.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)
    return lightning.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_of_other_callbacks_keep_to_the_support(kind, first, tmp_path):
    from gossamer.integrations.lightning import SparseTraining

    class Watched(Net):
        seen = ()

        def validation_step(self, batch, index):
            mask = callback.run.masks["body.0"]
            self.seen = (*self.seen, bool(self.body[0].weight[~mask].any()))

    callback, model = SparseTraining(gs.weights.SET(0.2, every=2), seed=3), Watched()
    other = averaging(kind)
    keep = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    runner = lightning.Trainer(
        callbacks=[callback, other, keep] if first else [other, callback, keep], accelerator="cpu",
        max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    runner.fit(model, loader(), loader(6))
    mask = callback.run.masks["body.0"]
    assert model.seen and not any(model.seen)
    assert not model.body[0].weight[~mask].any() and model.body[0].weight.any()
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=False)
        state = saved["callbacks"][callback.state_key]
        assert not saved["state_dict"]["body.0.weight"][~state["masks"]["body.0"]].any(), path


def test_weights_that_another_callback_writes_are_an_error(tmp_path):
    from gossamer.integrations.lightning import SparseTraining

    class Writes(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            nn.init.ones_(pl_module.body[0].weight)

    for order in (1, -1):
        callbacks = [SparseTraining(gs.weights.SET(0.2, every=2)), Writes()][::order]
        runner = lightning.Trainer(
            callbacks=callbacks, accelerator="cpu", max_steps=3, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        with pytest.raises(gs.UsageError, match=r"body\.0: \d+ weights outside"):
            runner.fit(Net(), loader())


def test_layers_that_thaw_are_an_error(tmp_path):
    from gossamer.integrations.lightning import SparseTraining

    class Thaws(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            pl_module.body[2].requires_grad_(index > 1)

    model = Net()
    model.body[2].requires_grad_(False)
    runner = lightning.Trainer(
        callbacks=[SparseTraining(gs.weights.SET(0.2, every=9)), Thaws()], accelerator="cpu", max_steps=5,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(gs.UsageError, match=r"body\.2: was frozen"):
        runner.fit(model, loader())
