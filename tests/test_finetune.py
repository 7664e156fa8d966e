"""mixzoo finetune: learning, logs and files, resumption, freezing, sources of data, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import mixzoo
from mixzoo.scripts import _training, finetune
from mixzoo.scripts._classification import Classification, Pixels
from mixzoo.scripts._data import (
    ArrayImages,
    EpochSampler,
    TransformedImages,
    drawing_from,
    load_images,
    stratified_holdout,
)
from mixzoo.scripts._presets import PRESETS, preset_for
from mixzoo.scripts._runs import write_atomically

TINY = ("poolformerv2_s12", "--set", "depths=[1,1,1,1]", "--set", "dims=[8,16,24,32]", "--cpu")
CLASSES = 3


def run(*arguments, output) -> int:
    return finetune.main([str(a) for a in (*arguments, "--output", output)])


def log_of(output) -> list[dict[str, float]]:
    with (output / "log.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def state_of(output) -> dict:
    return torch.load(output / "last.pt", weights_only=True)


def same(a, b) -> bool:
    """Equality of nested containers, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def write_images(root, classes, count, start=0) -> None:
    digits = load_digits()
    for label in classes:
        folder = root / f"digit_{label}"
        folder.mkdir(parents=True)
        for image in digits.images[digits.target == label][start : start + count]:
            Image.fromarray((image * 15).astype(np.uint8)).resize((16, 16)).save(
                folder / f"{len(os.listdir(folder))}.png"
            )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A small data set in folders: train with 20 and val with 8 grey images of 16x16 of each of three classes."""
    root = tmp_path_factory.mktemp("data") / "photos"
    write_images(root / "train", range(CLASSES), 20)
    write_images(root / "val", range(CLASSES), 8, start=20)
    return root


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Two epochs of a tiny model on the digits."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    assert run(*TINY, "--epochs", 2, "--lr", 3e-3, "--plot", output=output) == 0
    return output


def test_learns_the_digits(digits_run):
    rows = log_of(digits_run)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["val_top1"] > 75
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["val_top5"] >= rows[1]["val_top1"]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in rows)
    assert (digits_run / "curves.png").stat().st_size > 1000
    assert not list(digits_run.glob(".tmp*"))


def test_best_file_is_the_measured_model(digits_run):
    """The accuracy in the log is that of the file, measured here without the command's own code."""
    model = mixzoo.load(digits_run / "best.safetensors").eval()
    assert model.class_names == [str(d) for d in range(10)]
    digits, (_, held) = load_digits(), stratified_holdout(load_digits().target)
    pixels = json.loads((digits_run / "run.json").read_text())["pixels"]
    right = 0
    for index in held:
        grey = (digits.images[index] * (255 / 16)).round().astype(np.uint8)
        image = Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC)
        x = (torch.tensor(np.array(image))[None, None] / 255 - pixels["mean"][0]) / pixels["std"][0]
        right += int(model(x).argmax() == digits.target[index])
    best = max(row["val_top1"] for row in log_of(digits_run))
    assert 100 * right / len(held) == pytest.approx(best)


MIXED = ("--preset", "cifar", "--epochs", 3, "--batch-size", 8, "--lr", 1e-3, "--seed", 5)


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    """Three epochs with every source of randomness, a schedule, averaged weights and accumulated gradients."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    extra = ("--ema", 0.9, "--accumulate", 2, "--drop-path", 0.2)
    assert run(*TINY, "--data", photos, *MIXED, *extra, output=output) == 0
    return output, extra


@pytest.mark.parametrize(("stop_at", "workers"), [(4, 0), (7, 2), (10, 0)])
def test_resumed_run_equals_an_uninterrupted_one(photos, straight, tmp_path, monkeypatch, capsys, stop_at, workers):
    """7 steps an epoch: stopped within the first epoch, while the first is measured, within the second one."""
    reference, extra = straight
    command = (*TINY, "--data", photos, *MIXED, *extra, "--workers", workers)
    step, count = _training.Trainer._train_step, 0

    def interrupted_step(trainer, batch):
        nonlocal count
        step(trainer, batch)
        count += 1
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(_training.Trainer, "_train_step", interrupted_step)
        assert run(*command, output=tmp_path) == 130
    shown = capsys.readouterr().out
    assert "go on with: mixzoo finetune" in shown
    assert "--resume" in shown
    assert state_of(tmp_path)["epoch"] == (stop_at - 1) // 7
    assert run(*command, "--resume", output=tmp_path) == 0
    expected, got = state_of(reference), state_of(tmp_path)
    for key in ("model", "ema", "optimizer", "epoch", "step", "best"):
        assert same(expected[key], got[key]), key
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in log_of(reference)]
    assert [{k: v for k, v in row.items() if "second" not in k} for row in log_of(tmp_path)] == timeless
    best = [mixzoo.load(folder / "best.safetensors").state_dict() for folder in (reference, tmp_path)]
    assert same(*best)


def test_ctrl_c_restores_the_handlers(photos, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run(*TINY, "--data", photos, "--epochs", 1, output=tmp_path) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_finished_run_resumes_to_its_report(digits_run, capsys):
    before = (digits_run / "last.pt").read_bytes()
    assert run(*TINY, "--epochs", 2, "--lr", 3e-3, "--resume", output=digits_run) == 0
    assert "test accuracy of" in capsys.readouterr().out
    assert (digits_run / "last.pt").read_bytes() == before


def test_output_of_another_run_is_not_replaced(photos, tmp_path, capsys):
    command = (*TINY, "--data", photos, "--epochs", 1)
    assert run(*command, output=tmp_path) == 0
    before = state_of(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run(*command, "--seed", 1, output=tmp_path)
    assert "holds another run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*command, "--seed", 1, "--resume", output=tmp_path)
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert same(before, state_of(tmp_path))
    assert run(*command, "--seed", 1, "--overwrite", output=tmp_path) == 0
    assert not same(before["model"], state_of(tmp_path)["model"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_freezing_trains_the_head_alone_and_then_everything(photos, digits_run, tmp_path):
    model = digits_run / "best.safetensors"
    recipe = ("--preset", "digits", "--batch-size", 8, "--epochs", 4, "--lr", 2e-2)
    command = (model, "--data", photos, "--cpu", "--freeze", *recipe)
    trained = mixzoo.load(model).state_dict()

    def changed(output) -> set[str]:
        now = state_of(output)["model"]
        return {key for key in now if now[key].shape != trained[key].shape or not torch.equal(now[key], trained[key])}

    assert run(*command, output=tmp_path / "head") == 0
    assert changed(tmp_path / "head") == {"head.fc.weight", "head.fc.bias"}
    assert log_of(tmp_path / "head")[-1]["val_top1"] > 70  # features of digits tell three of them apart
    assert run(*command, "--unfreeze-after", 1, output=tmp_path / "all") == 0
    still = {"stages.0.blocks.0.token.norm.weight"}  # smaller rates below may leave single tensors nearly as they were
    assert len(changed(tmp_path / "all") | still) > len(trained) // 2


def test_frozen_modules_stay_in_eval_mode(photos, digits_run, tmp_path, monkeypatch):
    modes = {}
    step = _training.Trainer._train_step

    def spying_step(trainer, batch):
        modes.update({name: module.training for name, module in trainer.net.named_modules()})
        step(trainer, batch)

    monkeypatch.setattr(_training.Trainer, "_train_step", spying_step)
    command = (digits_run / "best.safetensors", "--data", photos, "--cpu", "--freeze", "--epochs", 1)
    assert run(*command, output=tmp_path) == 0
    assert {name for name, training in modes.items() if training} == {"head.fc"}


def test_random_matrices_are_never_trained(photos, tmp_path):
    """Frozen parameters of the model itself stay out of optimiser, decay and average."""
    sets = ("--set", "depths=[1,1,1,1]", "--set", "dims=[8,16,24,32]")
    command = ("randformer_s12", *sets, "--cpu", "--data", photos, "--img-size", 32, "--ema", 0.5, "--epochs")
    assert run(*command, 1, output=tmp_path / "one") == 0
    assert run(*command, 2, output=tmp_path / "two") == 0
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    matrices = [key for key in one["model"] if key.endswith("random_matrix")]
    assert matrices
    for key in matrices:
        assert torch.equal(one["model"][key], two["model"][key])
        assert torch.equal(two["ema"][key], two["model"][key])
    tuned = sum(len(group["params"]) for group in two["optimizer"]["param_groups"])
    assert tuned == len(one["model"]) - len(matrices)


def test_layer_decay_lowers_the_rates_below(photos, digits_run, tmp_path):
    command = (digits_run / "best.safetensors", "--data", photos, "--cpu", "--epochs", 1, "--layer-decay", 0.5)
    assert run(*command, output=tmp_path) == 0
    scales = {group["lr_scale"] for group in state_of(tmp_path)["optimizer"]["param_groups"]}
    assert max(scales) == 1
    assert min(scales) <= 0.5**4


def test_own_model_goes_on_with_its_head_or_gets_a_new_one(photos, digits_run, tmp_path):
    model = digits_run / "best.safetensors"
    assert run(model, "--data", "digits", "--cpu", "--epochs", 1, "--lr", 1e-5, output=tmp_path / "same") == 0
    assert log_of(tmp_path / "same")[0]["val_top1"] > log_of(digits_run)[-1]["val_top1"] - 5
    assert run(model, "--data", photos, "--cpu", "--epochs", 1, output=tmp_path / "new") == 0
    assert mixzoo.load(tmp_path / "new" / "best.safetensors").class_names == ["digit_0", "digit_1", "digit_2"]


def test_checkpoint_of_a_swapped_and_larger_model(photos, tmp_path):
    """--checkpoint, --token-mixer, a non-square input, three channels and spare outputs meet in one run."""
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "token_mixer": "identity"}
    source = mixzoo.create_model("poolformerv2_s12", num_classes=7, **options)
    mixzoo.save(source, tmp_path / "source.safetensors")
    command = (*TINY, "--checkpoint", tmp_path / "source.safetensors", "--token-mixer", "identity", "--data", photos)
    assert run(*command, "--img-size", 32, 48, "--num-classes", 5, "--epochs", 1, output=tmp_path / "run") == 0
    model = mixzoo.load(tmp_path / "run" / "best.safetensors")
    assert (model.num_classes, model.in_chans, tuple(model.img_size)) == (5, 3, (32, 48))
    assert model.class_names is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["loop"]["layer_decay"] < 1


BAD = [
    (("no_such_model",), "no_such_model"),
    (("missing.safetensors",), "missing.safetensors"),
    ((*TINY, "--data", "no_such_folder"), "no_such_folder"),
    ((*TINY, "--data", "tfds/mnist"), "streamed"),
    ((*TINY, "--data", "torch/no_such_set"), "torch/no_such_set"),
    ((*TINY, "--lr", "0"), "--lr"),
    ((*TINY, "--lr", "nan"), "--lr"),
    ((*TINY, "--epochs", "0"), "--epochs"),
    ((*TINY, "--epochs", "2.5"), "--epochs"),
    ((*TINY, "--smoothing", "1"), "--smoothing"),
    ((*TINY, "--layer-decay", "1.1"), "--layer-decay"),
    ((*TINY, "--img-size", "32", "32", "32"), "--img-size"),
    ((*TINY, "--warmup", "3", "--epochs", "3"), "--warmup"),
    ((*TINY, "--batch-size", "33", "--mixup", "0.8"), "--batch-size 33"),
    ((*TINY, "--optimizer", "adamx"), "adamx"),
    ((*TINY, "--num-classes", "9"), "--num-classes 9"),
    ((*TINY, "--token-mixer", "no_such_mixer"), "no_such_mixer"),
    ((*TINY, "--set", "depths"), "KEY=VALUE"),
    ((*TINY, "--set", "no_such_option=1"), "no_such_option"),
    ((*TINY, "--checkpoint", "missing.pth"), "missing.pth"),
    ((*TINY, "--checkpoint", "x.pth", "--pretrained"), "not allowed with"),
    ((*TINY, "--freeze"), "--freeze needs weights"),
    ((*TINY, "--unfreeze-after", "1"), "--unfreeze-after needs --freeze"),
    ((*TINY, "--pretrained", "--stem", "small"), "--stem small"),
    ((*TINY, "--precision", "fp16"), "fp16"),
    ((*TINY, "--resume"), "--resume"),
    ((*TINY, "--resume", "--overwrite"), "not both"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(a[-2:]) for a, _ in BAD])
def test_bad_arguments_are_named_and_create_nothing(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*arguments, output=tmp_path / "run")
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mixzoo finetune: error: ")
    assert named in message
    assert not list(tmp_path.iterdir())


def test_help_shows_presets_and_small_image_rules(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in ("digits", "cifar", "imagenet", "--stem", "small images", "--layer-decay"):
        assert text in shown


def test_loss_that_is_no_number_ends_the_run(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Classification, "loss", lambda self, model, batch: (model(batch[0]).sum() * float("nan"), {}))
    assert run(*TINY, "--data", photos, "--epochs", 1, output=tmp_path) == 1
    assert "the loss became nan in epoch 1" in capsys.readouterr().err
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(tmp_path, capsys, workers):
    write_images(tmp_path / "data", range(2), 20)
    (tmp_path / "data" / "digit_0" / "1.png").write_bytes(b"no image")
    command = (*TINY, "--data", tmp_path / "data", "--epochs", 1, "--workers", workers)
    assert run(*command, output=tmp_path / "run") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mixzoo finetune: ")
    assert "1.png cannot be read" in message


def test_named_data_set(tmp_path):
    """torch/mnist, from files in its format."""
    digits, raw = load_digits(), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, part in (("train", slice(0, 40)), ("t10k", slice(40, 60))):
        pixels = np.kron((digits.images[part] * 15).astype(np.uint8), np.ones((1, 3, 3), np.uint8))
        labels = digits.target[part].astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + labels.tobytes())
    data = load_images("torch/mnist", data_dir=str(tmp_path))
    assert (data.name, len(data.train), len(data.val), data.channels, data.size) == ("torch-mnist", 40, 20, 1, (24, 24))
    assert len(data.class_names) == 10
    assert data.class_names[0].startswith("0")
    assert [label for _, label in data.val] == digits.target[40:60].tolist()


def test_preset_follows_the_data():
    assert preset_for("digits", (8, 8), 1) == "digits"
    assert preset_for("torch/mnist", (28, 28), 1) == "digits"
    assert preset_for("torch/cifar10", (32, 32), 3) == "cifar"
    assert preset_for("photos", (375, 500), 3) == "imagenet"


@pytest.mark.parametrize("row", PRESETS, ids=" ".join)
def test_every_preset_makes_images_of_the_right_shape(row):
    pixels = Pixels(3, (24, 32), (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9)
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8))
    for transform in (pixels.train_transform(PRESETS[row].augmentation), pixels.eval_transform()):
        for seed in range(40):
            with drawing_from(seed):
                assert transform(image).shape == (3, 24, 32)


def test_folder_splits(photos, tmp_path):
    data = load_images(str(photos))
    assert (len(data.train), len(data.val), data.test, data.val_name) == (60, 24, None, "val")
    assert (data.size, data.channels, data.class_names) == ((16, 16), 1, ["digit_0", "digit_1", "digit_2"])
    only = load_images(str(photos / "train"))
    assert (len(only.train), len(only.val), only.val_name) == (48, 12, "held-out")
    assert "held out" in only.note
    write_images(tmp_path / "train", range(3), 2)
    write_images(tmp_path / "val", [2], 2)
    write_images(tmp_path / "test", [1, 2], 2)
    three = load_images(str(tmp_path))
    # a split without some classes keeps the labels of the training split
    assert [label for _, label in three.val] == [2, 2]
    assert [label for _, label in three.test] == [1, 1, 2, 2]
    write_images(tmp_path / "val2" / "val", [7], 2)
    write_images(tmp_path / "val2" / "train", range(2), 2)
    with pytest.raises(ValueError, match="classes that the training split lacks: digit_7"):
        load_images(str(tmp_path / "val2"))
    write_images(tmp_path / "val3" / "val", range(2), 2)
    with pytest.raises(ValueError, match="no train folder"):
        load_images(str(tmp_path / "val3"))


def test_holdout_takes_its_share_of_every_class():
    targets = [0] * 10 + [1] * 5 + [2]
    kept, held = stratified_holdout(targets)
    assert sorted(kept + held) == list(range(16))
    assert [sum(targets[i] == label for i in held) for label in range(3)] == [2, 1, 0]
    assert stratified_holdout(targets) == (kept, held)


def test_draws_depend_on_seed_epoch_and_place_alone():
    def noisy(image):
        return torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002

    images = TransformedImages(ArrayImages(np.zeros((6, 2, 2), np.uint8), range(6)), noisy, "L")
    sampler = EpochSampler(6, seed=3)
    first = list(sampler)
    sampler.start = 2
    assert list(sampler) == first[2:]
    assert len(sampler) == 4
    sampler.epoch, sampler.start = 1, 0
    assert [i for i, _ in sampler] != [i for i, _ in first]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws = [images[item] for item in first]
    assert torch.equal(torch.rand(3), expected)
    assert same(draws, [images[item] for item in first])
    assert len({float(draw[0][0]) for draw in draws}) == 6
    with drawing_from(1):
        inside = random.random()
    with drawing_from(1):
        assert random.random() == inside


def test_equal_logits_are_no_right_answer():
    task = Classification(12)
    labels = torch.tensor([0, 1, 7, 11])
    values = task.summarize(task.measure(nn.Linear(2, 12).eval().requires_grad_(False), (torch.zeros(4, 2), labels)))
    assert values.keys() == {"loss", "top1", "top5"}
    flat = task.summarize(task.measure(lambda x: torch.zeros(4, 12), (None, labels)))
    assert flat["top1"] == 25
    assert flat["top5"] == 50
    undefined = task.summarize(task.measure(lambda x: torch.full((4, 12), torch.nan), (None, labels)))
    assert undefined["top5"] == 0


def test_mixed_labels_add_up():
    task = Classification(4, mixup=1.0, smoothing=0.1)
    seen = {}

    def model(x):
        seen["x"] = x.clone()
        return torch.zeros(len(x), 4)

    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 2).clone()
    loss, means = task.loss(model, (images, torch.arange(4)))
    assert loss.item() == pytest.approx(np.log(4), rel=1e-5)
    assert seen["x"].mean().item() == pytest.approx(1.5)
    assert 0 <= means["top1"] <= 100


def test_further_classifiers_weigh_less():
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([0, 3, 1])
    loss, means = Classification(4, aux_weight=0.4).loss(lambda x: logits, (torch.zeros(3, 1), labels))
    main, aux = (torch.nn.functional.cross_entropy(y, labels).item() for y in logits)
    assert loss.item() == pytest.approx(main + 0.4 * aux)
    assert means["top1"] == pytest.approx((logits[0].argmax(1) == labels).float().mean().item() * 100)


def test_auxiliary_classifier_is_trained(photos, tmp_path):
    small = {"depths": [1, 1, 1, 1], "focus_depths": [1, 1], "dims": [16, 16, 32, 32], "focus_heads": [2, 2]}
    sets = [part for key, value in small.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = ("overlock_xt", *sets, "--cpu", "--data", photos, "--img-size", 32, "--epochs")
    assert run(*command, 1, output=tmp_path / "one") == 0
    assert run(*command, 2, output=tmp_path / "two") == 0
    one, two = (state_of(tmp_path / name)["model"] for name in ("one", "two"))
    assert any("aux_head" in key and not torch.equal(one[key], two[key]) for key in one)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
