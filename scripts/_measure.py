"""What `mixzoo bench` measures: steps of several contestants timed in interleaved rounds, and the memory a step needs.

Clocks drift, on shared machines by tens of per cent within minutes, so contestants are never timed one after the
other: every round runs each of them once, and ratios are taken inside a round, where the drift is common.

    inference step: eval mode, torch.inference_mode, forward
    training step:  train mode, gradients dropped, forward, mean of the outputs, backward; no optimiser

Peak memory is what one step adds to the memory the model and its input already hold. On the CPU a fresh process
measures it, so that freed memory of earlier work is not reused unseen:

    python -m mixzoo.scripts._measure '{"name": "poolformer_s12", "batch_size": 8}'
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TIMM_PREFIX = "timm:"
MIN_TURN_S = 0.25
MIN_ROUNDS = 3
MATMUL_SIDE = 2048
# what a model may raise on a size or device it does not support; a row reports it and the run goes on
FAILURES = (RuntimeError, MemoryError, ValueError, AssertionError)

Step = Callable[[], None]


@dataclass(frozen=True)
class Contestant:
    """One model in one memory format under one set of conditions: all that another process needs to rebuild it.

    Attributes:
        name: a mixzoo name, ``arch`` or ``arch.tag``, or ``timm:NAME``.
        channels_last: model and input in torch.channels_last memory.
        img_size: (H, W) of the images.
        token_mixer: swapped mixers of a mixzoo model, in the grammar of `mixzoo.create_model`.
        threads: torch threads; None keeps torch's own choice.
    """

    name: str
    channels_last: bool = False
    batch_size: int = 16
    img_size: tuple[int, int] = (224, 224)
    seq_len: int | None = None
    token_mixer: Any = None
    device: str = "cpu"
    dtype: str = "float32"
    train: bool = False
    compile: bool = False
    threads: int | None = None

    @property
    def is_timm(self) -> bool:
        return self.name.startswith(TIMM_PREFIX)

    @property
    def memory_format(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"


@dataclass(frozen=True)
class Memory:
    """Growth in MiB over the memory held before the step, and how it was observed."""

    mib: float
    method: str


def published_size(name: str) -> tuple[int, int]:
    """(H, W) of the images a model was published for."""
    if name.startswith(TIMM_PREFIX):
        import timm

        input_size = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)).input_size
    else:
        from mixzoo.models._registry import RELEASES, resolve_name

        spec, release = resolve_name(name)
        input_size = RELEASES[release].input_size if release else spec.input_size
    return tuple(input_size[-2:])


def build(contestant: Contestant) -> tuple[nn.Module, Tensor]:
    """The contestant's model, in the mode of its step and not compiled, and its first input.

    Images are (B, in_chans, H, W); texts have ``seq_len`` tokens, by default as many as their models take, and series
    the length of theirs.
    """
    if contestant.threads:
        torch.set_num_threads(contestant.threads)
    torch.manual_seed(0)
    options = {} if not contestant.train else {"drop_path_rate": 0.0}
    model = _build_timm(contestant, options) if contestant.is_timm else _build_ours(contestant, options)
    placement = {"device": torch.device(contestant.device), "dtype": getattr(torch, contestant.dtype)}
    if contestant.channels_last:
        placement["memory_format"] = torch.channels_last
    model = model.to(**placement).train(contestant.train)
    if getattr(model, "modality", "image") == "image":
        return model, torch.randn(contestant.batch_size, model.in_chans, *contestant.img_size).to(**placement)
    from mixzoo.models import example_inputs

    size = contestant.seq_len if model.modality == "text" else None
    return model, next(iter(example_inputs(model, contestant.batch_size, size=size).values()))


def _build_ours(contestant: Contestant, options: dict[str, Any]) -> nn.Module:
    import mixzoo
    from mixzoo.models._registry import resolve_name
    from mixzoo.models.timm_bridge import skeleton_options

    spec, _ = resolve_name(contestant.name)
    known = skeleton_options(spec)
    options = {option: value for option, value in options.items() if option in known}
    if spec.modality == "image":
        options["img_size"] = tuple(contestant.img_size)
    if contestant.token_mixer is not None:
        options["token_mixer"] = contestant.token_mixer
    model = mixzoo.create_model(contestant.name, **options)
    if contestant.seq_len and spec.modality == "text" and not model.takes(contestant.seq_len):
        model.set_input_size(contestant.seq_len)
    return model


def _build_timm(contestant: Contestant, options: dict[str, Any]) -> nn.Module:
    import timm

    name = contestant.name.removeprefix(TIMM_PREFIX)
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = tuple(contestant.img_size)
    try:
        return timm.create_model(name, **options)
    except TypeError:
        # a few of timm's families have no drop path at all
        options.pop("drop_path_rate", None)
        return timm.create_model(name, **options)


def _mean(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.mean()
    values = output.values() if isinstance(output, Mapping) else output
    return torch.stack([_mean(value) for value in values]).sum()


def other_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a model gets besides its first input: the time marks of a series."""
    if getattr(model, "modality", "image") != "series":
        return {}
    from mixzoo.models import example_inputs

    _, *others = example_inputs(model, len(x)).items()
    return dict(others)


def make_step(model: nn.Module, x: Tensor, *, train: bool, compile: bool = False) -> Step:
    """The step of a model on its inputs, see the head of this module."""
    run, others = torch.compile(model) if compile else model, other_inputs(model, x)

    def infer() -> None:
        with torch.inference_mode():
            run(x, **others)

    def learn() -> None:
        model.zero_grad(set_to_none=True)
        _mean(run(x, **others)).backward()

    return learn if train else infer


def matmul_step(device: str, dtype: str) -> Step:
    """The yardstick: a product of two square matrices of `MATMUL_SIDE` rows, ``2 MATMUL_SIDE^3`` flops."""
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=getattr(torch, dtype))
    b, out = torch.randn_like(a), torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def time_step(step: Step, device: str, repeats: int = 1) -> float:
    """Mean seconds of a step over ``repeats`` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the host's or the device's allocator lies behind ``error``."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def describe(error: BaseException) -> str:
    """One line for the note column of a row whose measurement failed."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def interleave(
    steps: Mapping[str, Step],
    *,
    device: str,
    rounds: int,
    budget_s: float,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time all steps in turn, round after round.

    Every step first runs twice unmeasured. A step shorter than `MIN_TURN_S` is repeated inside its turn and averaged.
    Rounds start at another step each time, and end early, after `MIN_ROUNDS` at least, when ``budget_s`` is spent.

    Returns:
        seconds of every round by step, and the failures by step; a failed step is out of the race.
    """
    repeats, failures = {}, {}
    for name, step in steps.items():
        try:
            step()
            repeats[name] = max(1, math.ceil(MIN_TURN_S / max(time_step(step, device), 1e-6)))
        except FAILURES as error:
            failures[name] = describe(error)
    times: dict[str, list[float]] = {name: [] for name in repeats}
    end = time.perf_counter() + budget_s
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
        first = turn % max(1, len(repeats))
        for name in [*repeats][first:] + [*repeats][:first]:
            gc.collect()
            times[name].append(time_step(steps[name], device, repeats[name]))
    return times, failures


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Children of the model by name; those of a list or sequence of stages one by one."""
    parts = {}
    for name, child in model.named_children():
        if isinstance(child, nn.Identity):
            continue
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            parts |= {f"{name}.{index}": part for index, part in child.named_children()}
        else:
            parts[name] = child
    return parts


def part_times(model: nn.Module, x: Tensor, *, device: str, rounds: int) -> dict[str, float]:
    """Median seconds that each part of the model takes within a forward pass, in the order the data meets the parts."""
    starts: dict[str, float] = {}
    times: dict[str, list[float]] = {}

    def enter(name: str) -> None:
        synchronize(device)
        starts[name] = time.perf_counter()

    def leave(name: str) -> None:
        synchronize(device)
        times.setdefault(name, []).append(time.perf_counter() - starts[name])

    handles = []
    for name, part in _parts(model).items():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(part.register_forward_hook(lambda *_, name=name: leave(name)))
    try:
        step = make_step(model, x, train=False)
        step()
        times.clear()
        for _ in range(rounds):
            step()
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_memory(contestant: Contestant, timeout_s: float = 600.0) -> Memory | str:
    """Memory that one step adds, or the reason why it is not known.

    CPU: a fresh process reports the growth of its resident set. CUDA: growth of the allocator's peak in this process.
    """
    device = torch.device(contestant.device).type
    if device == "cuda":
        return _cuda_growth(contestant)
    if device != "cpu":
        return f"no peak memory on {device}"
    # the working folder must not shadow modules of the standard library
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            _command(contestant), capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"no memory figure within {timeout_s:.0f} s"
    if done.returncode == -signal.SIGKILL:
        return "out of memory"
    if done.returncode != 0:
        return ["no memory figure", *done.stderr.strip().splitlines()][-1]
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _command(contestant: Contestant) -> list[str]:
    return [sys.executable, "-m", __name__, json.dumps(asdict(contestant))]


def _cuda_growth(contestant: Contestant) -> Memory | str:
    try:
        model, x = build(contestant)
        step = make_step(model, x, train=contestant.train, compile=contestant.compile)
        step()
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        step()
        return Memory((torch.cuda.max_memory_allocated(x.device) - before) / 2**20, "cuda allocator")
    except FAILURES as error:
        return describe(error)
    finally:
        model = x = step = None
        release(contestant.device)


def release(device: str) -> None:
    """Give freed memory back, so that the next contestant starts from the same state."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def resident_growth(step: Step) -> Memory:
    """Growth of this process's resident set during a step, up to its highest point."""
    try:
        # 5 resets the high-water mark of the resident set to its present size
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_mib("VmHWM")
        step()
        return Memory(_resident_mib("VmHWM") - before, "resident set")
    except OSError:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        return Memory((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit, "ru_maxrss")


def _measure_here(contestant: Contestant) -> Memory:
    model, x = build(contestant)
    if contestant.compile:
        step = make_step(model, x, train=contestant.train, compile=True)
        step()
    else:
        # a small batch brings in the kernels' code and the thread pool, which are no part of the step
        make_step(model, x[:2], train=contestant.train)()
        step = make_step(model, x, train=contestant.train)
    model.zero_grad(set_to_none=True)
    release(contestant.device)
    return resident_growth(step)


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measure_here(Contestant(**json.loads(sys.argv[1]))))))
    except FAILURES as failure:
        sys.exit(describe(failure))
