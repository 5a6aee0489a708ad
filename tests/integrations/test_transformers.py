"""Sparse training under transformers.Trainer against the same steps taken by hand."""

import pytest
import torch
from torch import nn

import gossamer as gs

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

METHODS = {
    "rigl": lambda: gs.weights.RigL(0.2, every=2),
    "set": lambda: gs.weights.SET(0.2, every=2),
    "srste": lambda: gs.weights.SRSTE(decay=0.01),
}
DATA = [
    {"x": torch.randn(8, generator=torch.Generator().manual_seed(i)), "labels": torch.tensor(i % 3)}
    for i in range(48)
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.seen = []

    def forward(self, x, labels):
        self.seen.append((x.clone(), labels.clone(), torch.get_rng_state()))
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(folder, method, model=None, **more):
    from gossamer.integrations.transformers import SparseTraining

    model = model or Net()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, max_grad_norm=0.05, learning_rate=0.1, report_to=[],
        lr_scheduler_type="constant", save_steps=3, logging_steps=1, disable_tqdm=True,
        use_cpu=True, seed=5, **more,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    callback = SparseTraining(METHODS[method](), seed=3)
    built = transformers.Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA[:6], callbacks=[callback],
        optimizers=(optimizer, None),
    )  # fmt: skip
    return built, callback, model


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_same_steps_by_hand(name, tmp_path):
    built, callback, model = trainer(tmp_path, name)
    built.train()
    assert built.args.max_grad_norm == 0.05 and callback.run.step == 8
    assert "itop_rate" in built.state.log_history[0]
    weight = model.body[0].weight.detach().clone()
    assert not weight[~callback.run.masks["body.0"]].any()
    other = Net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    with gs.sparse_training(other, optimizer, METHODS[name](), total_steps=8, seed=3) as run:
        for step in range(8):
            optimizer.zero_grad()
            for x, labels, random in model.seen[2 * step : 2 * step + 2]:
                torch.set_rng_state(random)
                (other(x, labels)["loss"] / 2).backward()
            run.mask_gradients()
            norm = nn.utils.clip_grad_norm_(other.parameters(), 0.05)
            assert norm > 0.05
            optimizer.step()
    for key, mask in run.masks.items():
        assert torch.equal(mask, callback.run.masks[key])
    assert torch.equal(other.body[0].weight, weight)
    before = callback.run.step
    built.optimizer.step()
    assert callback.run.step == before  # the hooks are gone


@pytest.mark.parametrize("name", METHODS)
def test_resumed_from_a_checkpoint_is_bitwise_equal(name, tmp_path):
    whole, callback, model = trainer(tmp_path, name)
    whole.train()
    resumed, again, other = trainer(tmp_path, name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.run.step == 8
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    for key, mask in callback.run.masks.items():
        assert torch.equal(mask, again.run.masks[key])
    assert again.run.itop_rate == callback.run.itop_rate


def test_a_checkpoint_without_our_state_is_refused(tmp_path):
    built, _, _ = trainer(tmp_path, "set")
    built.train()
    (tmp_path / "checkpoint-3" / "sparse_training.safetensors").unlink()
    resumed, _, _ = trainer(tmp_path, "set")
    with pytest.raises(gs.UsageError, match="checkpoint-3"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("name", ["set", "srste"])
def test_the_best_checkpoint_brings_its_own_support(name, tmp_path):
    """Loaded at the end, its support is an older one than the last."""
    built, callback, model = trainer(
        tmp_path, name, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="first", greater_is_better=False, save_strategy="steps",
    )  # fmt: skip
    scores = iter(range(9))
    built.compute_metrics = lambda _: {"first": next(scores)}
    built.train()
    assert built.state.best_model_checkpoint.endswith("checkpoint-3")
    assert callback.run.step == 3
    weight, mask = model.body[0].weight, callback.run.masks["body.0"]
    assert not weight[~mask].any() and callback.run.density < 0.6


def test_a_failed_training_leaves_the_callback_usable(tmp_path):
    built, callback, model = trainer(tmp_path, "set")
    forward, model.forward = model.forward, lambda x, labels: 1 / 0
    with pytest.raises(ZeroDivisionError):
        built.train()
    nn.init.ones_(model.body[0].weight)
    model.forward = forward
    built.train()
    assert callback.run.step == 8
