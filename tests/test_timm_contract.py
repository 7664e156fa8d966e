"""timm's model contract over every registered image classifier, one block a stage and narrow.

timm's own suite (`mixzoo timm-suite`) checks full-size models and mostly shapes. Here values are compared, after every
parameter got a random value, since scales that start at zero or one hide what is missing.
"""

from __future__ import annotations

import copy
import fnmatch
import math

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import mixzoo
from mixzoo.models._registry import MODELS
from mixzoo.models.timm_bridge import timm_name

CLASSES = 7


@pytest.fixture
def tiny(small):
    """``tiny(name, **options)``: a small model of CLASSES classes."""
    return lambda name, **options: small(name, **{"num_classes": CLASSES} | options)


def images(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(1))


def test_shapes_follow_the_attributes(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.ndim == 4
        assert features.shape[:2] == (2, model.num_features)
        assert pooled.shape == (2, model.head_hidden_size)
        assert model(x).shape == (2, CLASSES)
        torch.testing.assert_close(model(x), model.forward_head(features))
    assert (model.num_classes, model.in_chans) == (CLASSES, 3)
    assert list(model.get_classifier().parameters())


def test_reset_classifier(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        assert model.num_classes == 0
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        unpooled = model(x)
        assert unpooled.shape[1] in (model.num_features, model.head_hidden_size)
        assert unpooled.shape[2:] == features.shape[2:]
        model.reset_classifier(5, "avg")
        assert model(x).shape == (2, 5)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)


def test_reset_classifier_keeps_the_pooling(classifier_kind, tiny):
    model = tiny(classifier_kind, global_pool="max")
    x = images(model)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        model.reset_classifier(5)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        model.reset_classifier(5, "avg")
        assert not torch.allclose(model.forward_head(features, pre_logits=True), pooled)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_new_classifier_inherits_device_dtype_and_mode(classifier_kind, tiny, device, training):
    model = tiny(classifier_kind).train(training).to(device=device, dtype=torch.float64)
    model.reset_classifier(0)
    model.reset_classifier(2)
    parameters = list(model.get_classifier().parameters())
    assert parameters
    assert all(p.device.type == device and p.dtype == torch.float64 for p in parameters)
    assert all(module.training == training for module in model.modules())


def test_frozen_model_stays_frozen(classifier_kind, tiny):
    model = tiny(classifier_kind).requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    model.set_input_size([2 * side for side in model.img_size])
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_constructor_without_classifier_or_pooling(classifier_kind, tiny):
    full = tiny(classifier_kind)
    x = images(full)
    with torch.no_grad():
        features = full.forward_features(x)
        torch.testing.assert_close(
            tiny(classifier_kind, num_classes=0)(x), full.forward_head(features, pre_logits=True)
        )
        unpooled = tiny(classifier_kind, num_classes=0, global_pool="")(x)
    # a head may widen the map before it pools
    assert unpooled.shape[1] in (full.num_features, full.head_hidden_size)
    assert (unpooled.shape[0], *unpooled.shape[2:]) == (features.shape[0], *features.shape[2:])


def test_features_only_gives_the_models_own_maps(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    backbone = tiny(classifier_kind, features_only=True)
    info = backbone.feature_info
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        maps = backbone(x)
    assert len(maps) == len(expected) >= 3
    for a, b, channels, reduction in zip(maps, expected, info.channels(), info.reduction(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.shape[1] == channels
        for side, pixels in zip(a.shape[2:], model.img_size, strict=True):
            assert pixels / (2 * reduction) < side <= math.ceil(pixels / reduction) + 1
    assert info.reduction() == sorted(info.reduction())


def test_features_only_takes_chosen_maps(classifier_kind, tiny):
    backbone = tiny(classifier_kind, features_only=True, out_indices=(1, -1))
    levels = len(tiny(classifier_kind).feature_info)
    assert [info["index"] for info in backbone.feature_info.get_dicts()] == [1, levels - 1]
    with torch.no_grad():
        assert [m.shape[1] for m in backbone(images(tiny(classifier_kind)))] == backbone.feature_info.channels()


def test_forward_intermediates(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]

        def take(**options) -> list[Tensor]:
            return model.forward_intermediates(x, intermediates_only=True, **options)

        for indices, expected in ((2, maps[-2:]), ([0, -1], [maps[0], maps[last]]), ([1], [maps[1]])):
            for stop_early in (False, True):
                taken = take(indices=indices, stop_early=stop_early)
                assert len(taken) == len(expected)
                for a, b in zip(taken, expected, strict=True):
                    torch.testing.assert_close(a, b)
        for a, b in zip(take(output_fmt="NHWC"), maps, strict=True):
            torch.testing.assert_close(a.permute(0, 3, 1, 2), b)
        normed = take(norm=True)
        assert [m.shape for m in normed] == [m.shape for m in maps]
        normalises = any(not isinstance(norm, nn.Identity) for norm in (model.norm, model.head.norm))
        assert torch.allclose(normed[-1], maps[-1]) != normalises


def test_forward_intermediates_refuses_impossible_requests(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[len(model.feature_info)])
    with pytest.raises((ValueError, AssertionError), match=r"output_fmt|NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruned_models_keep_their_maps(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        headed = copy.deepcopy(model)
        assert headed.prune_intermediate_layers([-1], prune_head=False) == [last]
        torch.testing.assert_close(headed(x), model(x))
    for i in range(last + 1):
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([i], prune_norm=True)
        assert take == [i]
        assert pruned.num_features == pruned.head_hidden_size == model.feature_info[i]["num_chs"]
        with torch.no_grad():
            torch.testing.assert_close(pruned.forward_features(x), maps[i])
        pruned.forward_features(x).sum().backward()
        assert not [n for n, p in pruned.named_parameters() if p.requires_grad and p.grad is None]
        pruned.reset_classifier(3, "avg")
        assert pruned(x).shape == (2, 3)


def test_pruning_shrinks_the_model(classifier_kind, tiny):
    model = tiny(classifier_kind)
    before = sum(p.numel() for p in model.stages.parameters())
    model.prune_intermediate_layers([0])
    assert sum(p.numel() for p in model.stages.parameters()) < before / 2


def test_grad_checkpointing_changes_nothing(classifier_kind, tiny):
    outputs, gradients = [], []
    for enable in (False, True):
        model = tiny(classifier_kind).train()
        model.set_grad_checkpointing(enable)
        outputs.append(model(images(model)))
        outputs[-1].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_group_matcher_orders_parameters_by_depth(classifier_kind, tiny):
    model = tiny(classifier_kind)
    parameters = dict(model.named_parameters())
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(groups) == set(parameters)
        assert len(set(groups.values())) > 1
        stem = [group for n, group in groups.items() if n.startswith("stem.")]
        classifier = [group for n, group in groups.items() if n.startswith(MODELS[classifier_kind].classifier)]
        assert set(stem) == {min(groups.values())}
        assert set(classifier) == {max(groups.values())}


def test_layer_decay_reaches_every_trainable_parameter(classifier_kind, tiny):
    model = tiny(classifier_kind)
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    taken = {id(p) for group in groups for p in group["params"]}
    assert taken == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({group["lr_scale"] for group in groups}) > 2


def test_no_weight_decay_names_parameters(classifier_kind, tiny):
    model = tiny(classifier_kind)
    names = [n for n, _ in model.named_parameters()]
    assert all(any(fnmatch.fnmatch(n, pattern) for n in names) for pattern in model.no_weight_decay())


def test_fx_trace(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    with torch.inference_mode():
        taps = {info["module"]: info["module"] for info in model.feature_info}
        outputs = create_feature_extractor(model, {**taps, "head": "logits"})(x)
        torch.testing.assert_close(outputs.pop("logits"), model(x))
        for tapped, expected in zip(outputs.values(), model.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(tapped, expected, rtol=1e-4, atol=1e-4)


def test_fx_trace_trains(classifier_kind, tiny):
    model = tiny(classifier_kind, drop_path_rate=0.1).train()
    traced = create_feature_extractor(model, {"head": "logits"})
    traced(images(model))["logits"].mean().backward()
    assert not [n for n, p in traced.named_parameters() if p.requires_grad and p.grad is None]


def test_unknown_keywords_are_refused(classifier_kind, tiny):
    with pytest.raises(TypeError, match="no_such_option"):
        tiny(classifier_kind, no_such_option=1)
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model(timm_name(classifier_kind), no_such_option=1)


@pytest.mark.parametrize("how", ["context", "argument"])
def test_meta_device(classifier_kind, tiny, how):
    if how == "context":
        with torch.device("meta"):
            model = tiny(classifier_kind)
    else:
        model = tiny(classifier_kind, device="meta", dtype=torch.float32)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not [n for n, t in tensors.items() if t.device.type != "meta"]
    x = images(model).to("meta")
    assert model(x).shape == (2, CLASSES)
    assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_dtype_argument(classifier_kind, tiny):
    model = tiny(classifier_kind, dtype=torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    with torch.no_grad():
        logits = model(images(model).to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_state_dict_is_complete(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    other = tiny(classifier_kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.uniform_(-1, 1)
        other.load_state_dict(model.state_dict(), strict=True)
        torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("channels", [1, 5])
def test_input_channels(classifier_kind, tiny, channels):
    model = tiny(classifier_kind, in_chans=channels)
    assert model.in_chans == channels
    with torch.no_grad():
        assert model(images(model)).shape == (2, CLASSES)


def test_set_input_size(classifier_kind, tiny):
    model = tiny(classifier_kind)
    model.set_input_size([2 * side for side in model.img_size])
    with torch.no_grad():
        assert model(images(model)).shape == (2, CLASSES)


def test_memory_format_of_the_input_does_not_matter(classifier_kind, tiny):
    model = tiny(classifier_kind)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_drop_path_grows_with_depth(classifier_kind, tiny):
    model = tiny(classifier_kind, drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    model.train()
    x = images(model, batch=32)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


def test_cfg_describes_the_model(classifier_name, shrink):
    with torch.device("meta"):
        model = mixzoo.create_model(classifier_name, **shrink(classifier_name))
    cfg, keys = model.pretrained_cfg, model.state_dict()
    assert cfg["architecture"] == timm_name(classifier_name)
    assert model.in_chans == cfg["input_size"][0]
    assert f"{cfg['first_conv']}.weight" in keys
    assert f"{cfg['classifier']}.weight" in keys
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])


def test_timm_creates_our_model(classifier_name, shrink):
    with torch.device("meta"):
        theirs = timm.create_model(timm_name(classifier_name), **shrink(classifier_name))
        ours = mixzoo.create_model(classifier_name, **shrink(classifier_name))
    assert type(theirs) is type(ours)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
