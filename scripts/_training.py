"""One training loop for every task: optimiser, schedule, EMA, freezing, measuring, logging, interruption, resumption.

What is learnt is a `Task`: where batches come from, the loss of a batch, what is measured of it. The loop knows nothing
else of images, text or series.

Random numbers are functions of (seed, epoch, step, process), never of what ran before: a run that was interrupted,
even in the middle of an epoch, and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mixzoo import save

from ._data import seed_of
from ._runs import RunFolder, StopRequest
from ._schedules import SCHEDULES, set_rates

# steps between two looks at the loss, and of several processes at each other: both wait for the device
_LOOK_EVERY = 10


@dataclass(frozen=True)
class LoopSettings:
    """How to train, whatever the task.

    Attributes:
        lr: peak learning rate, of the head if ``layer_decay`` < 1.
        layer_decay: factor of the learning rate from one layer group to the one below it; 1 for the same everywhere.
        schedule: name in `SCHEDULES`. warmup_epochs: epochs of warm-up, part of ``epochs``.
        grad_clip: largest norm of the gradient, 0 for no limit.
        ema: decay of the averaged weights, which are then measured and saved; 0 for none.
        accumulate: batches per update.
        freeze: train the classifier only; the rest stays in eval mode.
        unfreeze_after: epochs after which ``freeze`` ends, None for never.
        patience: epochs without a new best value after which the run ends, None for never; ``min_gain``: what counts
            as one.
    """

    epochs: int
    lr: float
    weight_decay: float
    optimizer: str = "adamw"
    layer_decay: float = 1.0
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    grad_clip: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    freeze: bool = False
    unfreeze_after: int | None = None
    patience: int | None = None
    min_gain: float = 0.0
    seed: int = 0
    compile: bool = False


@dataclass(frozen=True)
class Loaders:
    """Batches of a task; ``batch_size`` is that of one process.

    ``sampler`` draws the training batches of its ``epoch`` from item ``start`` on, see `EpochSampler`.

    ``val_name`` is what the data calls the split that is measured after every epoch.
    """

    train: DataLoader
    val: DataLoader
    test: DataLoader | None
    sampler: Any
    batch_size: int
    val_name: str = "val"


class Task(Protocol):
    """What the loop asks of a problem.

    Attributes:
        metric: name of the measured value that picks the best epoch.
        higher_is_better: whether more of it is better.
        items: plural of what a batch consists of, for the throughput.
    """

    metric: str
    higher_is_better: bool
    items: str

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimise, and further means over the batch to show."""

    def measure(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """One value per item (B,) for each measured quantity."""

    def summarize(self, measured: Mapping[str, Tensor]) -> dict[str, float]:
        """Values to report from the measurements (N,) of a whole split."""

    def describe(self, values: Mapping[str, float]) -> str:
        """These values as a short text."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


def batch_length(batch: Any) -> int:
    """Items of a batch: the length of its first tensor."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)


class Trainer:
    """One run of ``net`` on ``task``, its files in ``folder``.

    Attributes:
        epoch, step: epochs done; batches done of the one under way.
        history: a row of values for every epoch done.
        best: best value of the task's metric so far and its epoch (from 1), or None.
        ema: the averaged model, or None. measured: the model whose values count: ``ema``, or the trained one.
    """

    def __init__(
        self,
        task: Task,
        loaders: Loaders,
        net: nn.Module,
        settings: LoopSettings,
        accelerator: Accelerator,
        folder: RunFolder,
    ):
        self.task, self.sampler, self.settings = task, loaders.sampler, settings
        self.accelerator, self.folder = accelerator, folder
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, int] | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self._seconds = 0.0
        self._stop: StopRequest | bool = False
        self._val_name = loaders.val_name
        self._items_per_step = loaders.batch_size * accelerator.num_processes

        self.net = net.to(accelerator.device)
        # copied before accelerate replaces `forward`, which in a copy would run the original
        self.ema = ModelEmaV3(self.net, decay=settings.ema, use_warmup=True) if settings.ema else None
        self.trainable = [p for p in self.net.parameters() if p.requires_grad]
        self._head = {id(p) for p in self.net.get_classifier().parameters()} if settings.freeze else set()
        # over all that may ever be trained: a frozen parameter has no gradient, which optimisers pass over
        self._optimizer = create_optimizer_v2(
            self.net,
            settings.optimizer,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        )
        self.train_loader, self.val_loader = accelerator.prepare(loaders.train, loaders.val)
        self.test_loader = accelerator.prepare(loaders.test) if loaders.test else None
        self.steps_per_epoch = len(self.train_loader)
        self._updates_per_epoch = math.ceil(self.steps_per_epoch / settings.accumulate)
        self._scaler_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, in tensors and plain containers."""
        scaler = self.accelerator.scaler
        return {
            "model": self.net.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self._optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "epoch": self.epoch,
            "step": self.step,
            "history": [dict(row) for row in self.history],
            "best": list(self.best) if self.best else None,
            "sums": dict(self._sums),
            "seconds": self._seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken; before `fit`."""
        self.net.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler_state = state["scaler"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = [dict(row) for row in state["history"]]
        self.best = tuple(state["best"]) if state["best"] else None
        # these are sums over all processes: one of them carries them on
        self._sums = defaultdict(float, state["sums"] if self.accelerator.is_main_process else {})
        self._seconds = state["seconds"]

    def fit(self) -> bool:
        """Train to the last epoch. False if a stop was asked for: last.pt then holds the state of that moment."""
        self._wrap()
        with StopRequest() as self._stop:
            while self.epoch < self.settings.epochs and not self.stalled:
                if not (self._train_epoch() and self._finish_epoch()):
                    self._write_state()
                    return False
        return True

    def measure(self, model: nn.Module, loader: DataLoader) -> dict[str, Tensor] | None:
        """What the task measures of every item (N,) of ``loader``, in eval mode; None if a stop was asked for.

        Every process gets the measurements of all.
        """
        model.eval()
        measured: dict[str, list[Tensor]] = defaultdict(list)
        with torch.no_grad(), self._bar(loader, "measuring") as bar:
            for count, batch in enumerate(bar, start=1):
                with self.accelerator.autocast():
                    values = self.task.measure(model, batch)
                for name, value in self.accelerator.gather_for_metrics(values).items():
                    measured[name].append(value.cpu())
                if self._stopping(count):
                    return None
        return {name: torch.cat(parts) for name, parts in measured.items()}

    @property
    def measured(self) -> nn.Module:
        return self.ema.module if self.ema else self.model

    @property
    def stalled(self) -> bool:
        """Whether the last ``patience`` epochs brought no new best value."""
        patience, sign = self.settings.patience, 1 if self.task.higher_is_better else -1
        best, at = -math.inf, 0
        for row in self.history:
            value = sign * row[f"val_{self.task.metric}"]
            if value > best + self.settings.min_gain:
                best, at = value, row["epoch"]
        return patience is not None and self.epoch - at >= patience

    @property
    def _updates(self) -> int:
        return self.epoch * self._updates_per_epoch + math.ceil(self.step / self.settings.accumulate)

    def _wrap(self) -> None:
        # data parallelism fixes at wrapping which gradients it exchanges: those that may come later must count then
        if self.settings.unfreeze_after is None:
            self._freeze()
        self.model, self._stepper = self.accelerator.prepare(self.net, self._optimizer)
        if self.settings.compile:
            self.model = torch.compile(self.model)
        if self._scaler_state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self._set_rates()

    def _set_rates(self) -> None:
        """Learning rates for the next update."""
        settings, updates = self.settings, self._updates_per_epoch
        rates = SCHEDULES[settings.schedule](self._updates, settings.epochs * updates, settings.warmup_epochs * updates)
        set_rates(self._optimizer, settings.lr, *rates)

    def _freeze(self) -> bool:
        """Set which parameters learn in this epoch; whether the backbone is frozen."""
        after = self.settings.unfreeze_after
        frozen = self.settings.freeze and (after is None or self.epoch < after)
        for parameter in self.trainable:
            parameter.requires_grad_(not frozen or id(parameter) in self._head)
        return frozen

    def _train_epoch(self) -> bool:
        """The rest of the epoch's batches; False if a stop was asked for."""
        self.model.train()
        if self._freeze():
            self.net.eval()
            self.net.get_classifier().train()
        if self.step == self.steps_per_epoch:  # stopped while measuring
            return True
        self.sampler.epoch, self.sampler.start = self.epoch, self.step * self._items_per_step
        title = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        started = time.perf_counter() - self._seconds
        stopped = False
        with self._bar(self.train_loader, title, initial=self.step, total=self.steps_per_epoch) as bar:
            for batch in bar:
                self._train_step(batch)
                self._seconds = time.perf_counter() - started
                if self.step % _LOOK_EVERY == 0:
                    self._look()
                    bar.set_postfix_str(self._progress(), refresh=False)
                if self.accelerator.sync_gradients and self._stopping(self.step):
                    stopped = True
                    break
        self._look()
        return not stopped

    def _train_step(self, batch: Any) -> None:
        set_seed(seed_of(self.settings.seed, self.epoch, self.step, self.accelerator.process_index))
        with self.accelerator.accumulate(self.model):
            loss, means = self.task.loss(self.model, batch)
            self.accelerator.backward(loss)
            if self.settings.grad_clip and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trainable, self.settings.grad_clip)
            self._stepper.step()
            self._stepper.zero_grad()
        self.step += 1
        self._pending.append((batch_length(batch), {"loss": loss.detach(), **means}))
        if self.accelerator.sync_gradients:
            self._set_rates()
            if self.ema:
                self.ema.update(self.net, step=self._updates)

    def _look(self) -> None:
        """Add what the last steps left on the device to the sums; raise if the loss is no number."""
        for items, means in self._pending:
            for name, value in means.items():
                self._sums[name] += float(value) * items
            self._sums["items"] += items
        self._pending.clear()
        if not math.isfinite(self._sums["loss"]):
            raise TrainingError(
                f"the loss became {self._sums['loss']} in epoch {self.epoch + 1}, before step {self.step + 1}: "
                "lower --lr, lengthen --warmup, set --grad-clip, or use --precision bf16 or no"
            )

    def _means(self) -> dict[str, float]:
        return {name: value / self._sums["items"] for name, value in self._sums.items() if name != "items"}

    @property
    def lr(self) -> float:
        """Learning rate of the head, the highest of all groups."""
        return max(group["lr"] for group in self._optimizer.param_groups)

    def _progress(self) -> str:
        return f"{self.task.describe(self._means())}, lr {self.lr:.1e}" if self._sums["items"] else ""

    def _collect_sums(self) -> None:
        """Bring the sums of all processes to the main one."""
        if self.accelerator.num_processes == 1:
            return
        everywhere, self._sums = gather_object([dict(self._sums)]), defaultdict(float)
        if self.accelerator.is_main_process:
            for sums in everywhere:
                for name, value in sums.items():
                    self._sums[name] += value

    def _finish_epoch(self) -> bool:
        """Measure, log and save; False if a stop was asked for while measuring."""
        started, lr = time.perf_counter(), self.lr
        measured = self.measure(self.measured, self.val_loader)
        if measured is None:
            return False
        values = self.task.summarize(measured)
        self._collect_sums()
        self.epoch, self.step = self.epoch + 1, 0
        value = values[self.task.metric]
        if self.best is None or (value > self.best[0] if self.task.higher_is_better else value < self.best[0]):
            self.best = (value, self.epoch)
        # every process keeps the history: all must agree on when to stop
        self.history.append(self._row(lr, values, time.perf_counter() - started))
        if self.accelerator.is_main_process:
            self._record(values)
        self._sums, self._seconds = defaultdict(float), 0.0
        self._write_state()
        self.accelerator.wait_for_everyone()
        return True

    def _row(self, lr: float, values: Mapping[str, float], measuring: float) -> dict[str, Any]:
        """The epoch's line of the log."""
        return {
            "epoch": self.epoch,
            "lr": lr,
            **{f"train_{name}": mean for name, mean in self._means().items()},
            **{f"val_{name}": value for name, value in values.items()},
            "seconds": round(self._seconds + measuring, 3),
            f"{self.task.items}_per_second": round(self._sums["items"] / self._seconds, 1),
        }

    def _record(self, values: Mapping[str, float]) -> None:
        """Save the best model, write the log and tell of the epoch."""
        row = self.history[-1]
        if self.best[1] == self.epoch:
            save(self.ema.module if self.ema else self.net, self.folder.best)
        self.folder.write_log(self.history)
        print(
            f"epoch {self.epoch:>{len(str(self.settings.epochs))}}/{self.settings.epochs}: "
            f"train {self.task.describe(self._means())} | {self._val_name} {self.task.describe(values)} | "
            f"lr {row['lr']:.1e}, {row['seconds']:.0f} s{' *' if self.best[1] == self.epoch else ''}",
            flush=True,
        )

    def _write_state(self) -> None:
        self._collect_sums()
        if self.accelerator.is_main_process:
            self.folder.write_state(self.state_dict())

    def _stopping(self, count: int) -> bool:
        """Whether any process was asked to stop; processes agree on it at every ``_LOOK_EVERY``-th count."""
        if self.accelerator.num_processes == 1:
            return bool(self._stop)
        if count % _LOOK_EVERY:
            return False
        if self._stop:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _bar(self, iterable: Any, title: str, **options: Any) -> tqdm:
        """Progress bar of the main process, on terminals only."""
        hidden = None if self.accelerator.is_main_process else True
        return tqdm(iterable, desc=title, leave=False, dynamic_ncols=True, disable=hidden, **options)
