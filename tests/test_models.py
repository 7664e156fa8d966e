"""Properties of every registered model, narrow and with one block a stage: a new one is tested by being registered."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import mixzoo
from mixzoo.mixers.pooling import Pooling
from mixzoo.models import _slicing, example_inputs
from mixzoo.models._registry import MODELS
from mixzoo.models.affnet import AFFNet
from mixzoo.models.inception_transformer import InceptionTransformer
from mixzoo.models.overlock import OverLoCK
from mixzoo.models.timm_bridge import skeleton_options

ODD_SIZES = ((65, 33), (47, 96))
# parameter of a block whose token mixer is of this class -> why its gradient is zero
WITHOUT_GRADIENT = {("token.norm.bias", Pooling): "pooling minus its input annihilates constants"}
ANNIHILATED = "batch norm annihilates constants"
# pattern of parameters of a model of this class -> why their gradient is zero
WITHOUT_GRADIENT_IN = {
    (r"stages\.[01]\.convs\.\d\.bn3\.bias", AFFNet): "a 1 x 1 convolution and batch norm annihilate constants",
    (r"(stem\.conv\d|stages\.\d\.downsample\.conv)\.bias", InceptionTransformer): ANNIHILATED,
    (r".*\.(mix\.conv|lepe)\.(conv|norm|branches\.\w+\.norm)\.bias|.*\.fuse_conv\.bias", OverLoCK): ANNIHILATED,
    (r"stages\.3\.focus\.\d\.channel\.(res_bias|op\.norm\.beta|op\.fc2\.bias)", OverLoCK): ANNIHILATED,
    (r".*\.mix\.(blocks\.\d+|proj\.bn)\.bias", AFFNet): "a 1 x 1 convolution and batch norm annihilate constants",
}
# names of models -> (pattern of their parameters, why their gradient is zero)
SHARED = "all channels share the bias, and the norms over channels that read it annihilate constants"
WITHOUT_GRADIENT_BY_NAME = {
    "mixer_*_224": (r".*\.token\.op\.fc2\.bias", SHARED),
    "raftmlp_*org_mixer*": (r"stages\..*\.token\.op\.fc2\.bias", SHARED),
    "lra_softmax_*": (r".*\.token\.op\.k\.bias", "it adds one number to all scores of a query"),
    "patchtsmixer_student_t_*": (r"head\.time\.[02]\..*", "the mean does not depend on the freedom and the scale"),
    "raftmlp_12_r1": (r".*\.token\.op\.(vertical|horizontal)\.fc2\.bias", SHARED),
}


def images(size: Sequence[int], batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def tensors(output: Tensor | list[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def total(output: Tensor | list[Tensor]) -> Tensor:
    """A scalar that depends on every value in its own way."""
    generator = torch.Generator().manual_seed(2)
    return sum((y * torch.randn(y.shape, generator=generator)).sum() for y in tensors(output))


def inputs_of(model: nn.Module, batch: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return example_inputs(model, batch)


def values_and_gradients(
    model: nn.Module, run: Callable, inputs: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    leaves = {key: x.clone().requires_grad_() if x.is_floating_point() else x for key, x in inputs.items()}
    output = run(**leaves)
    total(output).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return [y.detach() for y in tensors(output)], gradients | {
        key: x.grad for key, x in leaves.items() if x.is_leaf and x.requires_grad
    }


def has_no_gradient(model: nn.Module, name: str) -> bool:
    if any(isinstance(model, kind) and re.fullmatch(pattern, name) for pattern, kind in WITHOUT_GRADIENT_IN):
        return True
    for models, (pattern, _) in WITHOUT_GRADIENT_BY_NAME.items():
        if fnmatch.fnmatch(model.config["model"].partition(".")[0], models) and re.fullmatch(pattern, name):
            return True
    for suffix, mixer in WITHOUT_GRADIENT:
        if name.endswith(suffix):
            return isinstance(model.get_submodule(name.removesuffix("norm.bias") + "op"), mixer)
    return False


def test_every_model_runs(model_name, small):
    model = small(model_name)
    with torch.no_grad():
        for y in tensors(model(**inputs_of(model))):
            assert y.shape[0] == 3
            assert y.isfinite().all()
    assert model.config["model"].partition(".")[0] == model_name


def valid_size(take: Callable[[tuple[int, int]], object], size: tuple[int, int]) -> tuple[int, int]:
    """The size, or where it is refused the first one that the message names."""
    try:
        take(size)
    except ValueError as refusal:
        named = re.search(r"nearest valid sizes? \w+ \((\d+), (\d+)\)", str(refusal))
        if named is None:
            raise
        return int(named[1]), int(named[2])
    return size


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes_work_or_the_nearest_valid_ones_are_named(image_kind, small, size):
    size = valid_size(lambda side: small(image_kind, img_size=side), size)
    model = small(image_kind, img_size=size)
    with torch.no_grad():
        assert all(y.isfinite().all() for y in tensors(model(images(size))))
        if not MODELS[image_kind].fixed_input_size:
            assert all(y.isfinite().all() for y in tensors(model(images((size[1], size[0])))))


def test_size_changes_with_set_input_size(image_kind, small):
    model = small(image_kind)
    for size in ODD_SIZES:
        size = valid_size(model.set_input_size, size)
        model.set_input_size(size)
        assert tuple(model.img_size) == size
        with torch.no_grad():
            assert all(y.isfinite().all() for y in tensors(model(images(size))))


def test_fixed_sizes_are_named_when_another_comes(image_kind, small):
    model = small(image_kind)
    other = (2 * model.img_size[0], model.img_size[1])
    if not MODELS[image_kind].fixed_input_size:
        model(images(other))
        return
    message = f"{re.escape(str(other))}.*{re.escape(str(tuple(model.img_size)))}.*set_input_size"
    with pytest.raises(ValueError, match=message):
        model(images(other))


def test_smallest_size_is_named_and_works(image_kind, small):
    try:
        model = small(image_kind, img_size=1)
    except ValueError as error:
        refusal = str(error)
    else:
        # some take whatever there is
        with torch.no_grad():
            assert all(y.isfinite().all() for y in tensors(model(images((1, 1)))))
        return
    assert re.search(r"img_size.*at least \d+", refusal)
    smallest = int(re.search(r"at least (\d+)", refusal)[1])
    model = small(image_kind, img_size=smallest)
    with torch.no_grad():
        assert all(y.isfinite().all() for y in tensors(model(images((smallest, smallest)))))
    with pytest.raises(ValueError, match=f"at least {smallest}"):
        model(images((smallest, smallest - 1)))


def test_other_tensors_than_images_are_refused(image_kind, small):
    model = small(image_kind)
    size = tuple(model.img_size)
    for shape in ((2, 5, *size), (3, *size), (2, *size, 3)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            model(torch.zeros(shape))


@pytest.mark.parametrize("size", [0, -32, (32,), (32, 32, 32), 31.5])
def test_impossible_sizes_are_refused(image_kind, small, size):
    with pytest.raises(ValueError, match="img_size"):
        small(image_kind, img_size=size)


def test_empty_batches_pass(image_kind, small):
    with torch.no_grad():
        model = small(image_kind)
        assert all(y.shape[0] == 0 for y in tensors(model(images(model.img_size, batch=0))))


def test_gradient_reaches_every_trainable_parameter(model_kind, small):
    # in double precision, where rounding is far below the least gradient
    model = small(model_kind).train().double()
    _, gradients = values_and_gradients(model, model, inputs_of(model))
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-10 * scale or has_no_gradient(model, name), name


def test_eval_is_deterministic_and_leaves_the_input_alone(model_kind, small):
    dropped = {"drop_path_rate": 0.5} if "drop_path_rate" in skeleton_options(MODELS[model_kind]) else {}
    model = small(model_kind, **dropped)
    inputs = inputs_of(model)
    before = {key: x.clone() for key, x in inputs.items()}
    with torch.no_grad():
        first, second = tensors(model(**inputs)), tensors(model(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[key], x) for key, x in before.items())


def test_samples_do_not_see_each_other(model_kind, small):
    model = small(model_kind)
    inputs = inputs_of(model)
    with torch.no_grad():
        together = tensors(model(**inputs))
        parts = [tensors(model(**{key: x[rows] for key, x in inputs.items()})) for rows in (slice(1), slice(1, 3))]
        alone = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_slices_of_the_batch_change_nothing(image_kind, small, monkeypatch):
    model = small(image_kind).train()
    x = images(model.img_size)
    results = []
    for size in (1, 2**40):
        monkeypatch.setattr(_slicing, "samples_per_slice", lambda x, hidden, size=size: size)
        results.append(values_and_gradients(model, model, {"x": x}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_hooks_see_whole_batches(image_kind, small, monkeypatch):
    monkeypatch.setattr(_slicing, "samples_per_slice", lambda x, hidden: 1)
    model = small(image_kind)
    x = images(model.img_size)
    expected, seen = model(x), []
    block = next(module for name, module in model.named_modules() if name.endswith("blocks.0"))
    block.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    torch.testing.assert_close(model(x), expected)
    assert seen == [3]


def test_compiles_without_graph_breaks(model_kind, small):
    model = small(model_kind).double()
    inputs = inputs_of(model)
    # recompilations are limited, and all models share their code
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = [values_and_gradients(model, run, inputs) for run in (model, compiled)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_exports_with_a_free_batch(model_kind, small):
    model = small(model_kind)
    inputs = inputs_of(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={key: {0: batch} for key in inputs})
    assert "mixzoo" not in program.graph_module.code, "a program must run where this package is not"
    fewer = {key: x[:2] for key, x in inputs.items()}
    with torch.no_grad():
        results = tensors(program.module()(**fewer)), tensors(model(**fewer))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_saved_models_come_back(model_kind, small, tmp_path):
    model = small(model_kind)
    inputs = inputs_of(model)
    classes = getattr(model, "num_classes", None)
    model.class_names = classes and [f"class {i}" for i in range(classes)]
    mixzoo.save(model, tmp_path / "model.safetensors")
    back = mixzoo.load(tmp_path / "model.safetensors").eval()
    assert back.config["model"] == model.config["model"]
    assert back.class_names == model.class_names
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tensors(back(**inputs)), tensors(model(**inputs)), strict=True))


def test_every_operator_is_counted(model_name, small):
    with torch.device("meta"):
        model = small(model_name)
    assert not mixzoo.complexity(model).uncounted


@pytest.mark.parametrize("mixer", [name for name, entry in mixzoo.list_mixers().items() if 2 in entry.ranks])
def test_every_mixer_plugs_into_the_open_backbone(mixer, small, tmp_path):
    for spec in (mixer, (mixer, {}), ["identity", mixer, (mixer, {}), [mixer]]):
        model = small("metaformer_s12", num_classes=5, token_mixer=spec)
        x = images(model.img_size)
        assert model(x).shape == (3, 5)
        mixzoo.save(model, tmp_path / "model.safetensors")
        with torch.no_grad():
            assert torch.equal(mixzoo.load(tmp_path / "model.safetensors").eval()(x), model(x))


@pytest.mark.parametrize(
    "spec", ["no_such_mixer", ["pooling", "pooling"], ("pooling", {"size": 3}), 3, [["pooling"] * 9] * 4]
)
def test_impossible_mixers_are_refused(spec):
    with pytest.raises((ValueError, TypeError), match=r"token.mixer"):
        mixzoo.create_model("metaformer_s12", token_mixer=spec)


def test_unknown_options_are_refused(model_kind):
    with pytest.raises(TypeError, match=rf"{model_kind}.*'no_such_option'.*accepted.*token_mixer"):
        mixzoo.create_model(model_kind, no_such_option=1)


def test_unknown_names_are_refused_with_their_neighbours():
    with pytest.raises(ValueError, match=r"'poolformer_s13'.*'poolformer_s12'"):
        mixzoo.create_model("poolformer_s13")
    with pytest.raises(ValueError, match=r"no_such_tag.*poolformer_s12\."):
        mixzoo.create_model("poolformer_s12.no_such_tag")


def test_list_models():
    assert mixzoo.list_models() == sorted(MODELS)
    assert mixzoo.list_models("caformer_*") == [name for name in sorted(MODELS) if name.startswith("caformer_")]
    assert not mixzoo.list_models("no_such_model")
    assert all("." in name for name in mixzoo.list_models(pretrained=True))
