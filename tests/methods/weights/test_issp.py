"""ISS-P against the formula."""

import torch
from torch import nn

import gossamer as gs


def test_the_smallest_shrink_after_each_step_and_vanish_at_the_end_of_the_stage():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20, bias=False))
    twin = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gs.sparse_training(
        model, optimizer, gs.weights.ISSP(0.1, alpha=0.7), total_steps=12
    ) as run:
        for step in range(1, 13):
            x = torch.randn(8, 10)
            optimizer.zero_grad()
            loss = model(x).square().mean() - model(x)[:, 0].mean()
            loss.backward()
            gradient = torch.autograd.functional.jacobian(
                lambda w, x=x: (x @ w.t()).square().mean() - (x @ w.t())[:, 0].mean(), twin
            )
            if step <= 6:
                twin = twin - 0.05 * gradient
                chosen = twin.abs() >= twin.abs().flatten().topk(20).values[-1]
                twin = torch.where(chosen, twin, 0.7 * twin)
                if step == 6:
                    twin = twin * chosen
            else:
                twin = twin - 0.05 * gradient * chosen
            optimizer.step()
            torch.testing.assert_close(model[0].weight.detach(), twin)
            assert run.density == (1.0 if step < 6 else 0.1)
