"""Learning rates of the training loop against those of torch and timm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixzoo.scripts._schedules import SCHEDULES


def test_one_cycle_is_the_one_of_torch():
    for name, strategy in (("one-cycle", "cos"), ("one-cycle-linear", "linear")):
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.01, total_steps=50, pct_start=0.2, anneal_strategy=strategy
        )
        for done in range(50):
            share, beta = SCHEDULES[name](done, 50, 10)
            assert share * 0.01 == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
            assert beta == pytest.approx(optimizer.param_groups[0]["betas"][0])
            optimizer.step()
            if done < 49:
                theirs.step()


def test_cosine_is_the_one_of_timm():
    from timm.scheduler import create_scheduler_v2

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs, _ = create_scheduler_v2(
        optimizer,
        num_epochs=5,
        warmup_epochs=1.0,
        warmup_lr=3e-4,
        min_lr=3e-3,
        step_on_epochs=False,
        updates_per_epoch=7,
    )
    for done in range(36):
        theirs.step_update(done)
        assert SCHEDULES["cosine"](done, 35, 7)[0] * 0.3 == pytest.approx(optimizer.param_groups[0]["lr"])
