"""Counting: against closed forms, against torch's own counter, across devices and wrappers, and published figures."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mixzoo
from mixzoo.mixers import _counting, _decomposition
from mixzoo.mixers._counting import COLUMNS, FREE, RULES, count, numel
from mixzoo.models import example_inputs
from mixzoo.models._registry import RELEASES
from mixzoo.models.complexity import Complexity, Counts, complexity

C = 32
GRIDS = {1: (9,), 2: (5, 7), 3: (2, 3, 4)}
SIZE = (64, 96)
MIXERS = mixzoo.list_mixers()
each_mixer_and_rank = pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name, info in MIXERS.items() for rank in info.ranks if rank in GRIDS]
)

# multiply-adds of one map of N tokens, C channels and that rank
MIXER_MACS = {
    "identity": lambda n, rank: 0,
    "pooling": lambda n, rank: 0,
    "random": lambda n, rank: n * n * C,
    "spatial_fc": lambda n, rank: n * n * C,
    "separable_conv": lambda n, rank: n * (2 * C * C + 2 * C * 7**rank + 2 * C * C),
    "attention": lambda n, rank: 4 * n * C * C + 2 * n * n * C,
}


class Apply(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def count_call(function: Callable[..., Tensor], *tensors: Tensor) -> Complexity:
    return complexity(Apply(function), inputs=tensors)


def counted_by_torch(model: nn.Module, *inputs: Tensor, **named: Tensor) -> int:
    """Multiply-adds of matrix products and convolutions by torch's counter, which counts two flops for each."""
    # its module tracker takes a module that returns its own parameter for one that is differentiated
    model = copy.deepcopy(model).eval().requires_grad_(False)
    # fused attention on the CPU is not counted by every version of torch; its plain form is
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs, **named)
    return counter.get_total_flops() // 2


def tiny(name: str, shrink: Callable[[str], dict], device: str = "cpu", **options) -> nn.Module:
    with torch.device(device):
        return mixzoo.create_model(name, **shrink(name) | options)


# closed forms


@pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name in MIXER_MACS for rank in MIXERS[name].ranks if rank in GRIDS]
)
def test_mixers_follow_their_closed_form(name, rank):
    grid = GRIDS[rank]
    mixer = mixzoo.create_mixer(name, C, rank=rank, grid_size=grid)
    assert complexity(mixer, inputs=torch.zeros(2, *grid, C)).macs == 2 * MIXER_MACS[name](math.prod(grid), rank)


def test_pooling_costs_its_window_and_the_difference():
    counted = complexity(mixzoo.create_mixer("pooling", C, pool_size=5), inputs=torch.zeros(1, 5, 7, C))
    assert counted.other_ops == 35 * C * (25 + 1)
    assert counted.macs == counted.norm_ops == counted.parameters == 0


def test_attention_costs_its_softmax_and_scale():
    counted = complexity(mixzoo.create_mixer("attention", C, head_dim=8), inputs=torch.zeros(1, 5, 7, C))
    assert counted.by_operator["scaled_dot_product_attention"] == Counts(
        macs=2 * 35 * 35 * C, other_ops=35 * C + 5 * 4 * 35 * 35, activations=4 * 35 * 35 + 35 * C
    )


@pytest.mark.parametrize("token_mixer", ["identity", "pooling", "separable_conv", "attention"])
def test_the_backbone_follows_its_closed_form(token_mixer):
    depths, dims, classes, (height, width) = (1, 2, 1, 1), (32, 32, 64, 96), 10, SIZE
    options = {"depths": depths, "dims": dims, "num_classes": classes, "img_size": SIZE}
    model = mixzoo.create_model("metaformer_s12", token_mixer=token_mixer, **options)
    expected, norms, before = dims[-1] * classes, dims[-1], 3
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        kernel, stride = (7, 4) if stage == 0 else (3, 2)
        entering = height * width * before
        height, width = height // stride, width // stride
        n = height * width
        expected += n * before * kernel**2 * dim
        norms += n * dim if stage == 0 else entering
        mixer = {
            "separable_conv": n * (4 * dim**2 + 2 * 49 * dim),
            "attention": 4 * n * dim**2 + 2 * n**2 * dim,
        }.get(token_mixer, 0)
        expected += depth * (mixer + 8 * n * dim**2)
        norms += depth * 2 * n * dim
        before = dim
    counted = complexity(model)
    assert counted.macs == expected
    assert counted.norm_ops == 5 * norms
    assert counted.input_shapes == ((1, 3, *SIZE),)


# torch's counter


@pytest.fixture
def averages_by_pooling(monkeypatch):
    """Moving averages are counted as the pooling that they are, not as the products that short ones take."""
    monkeypatch.setattr(_decomposition, "MATRIX_LENGTH", 0)


@each_mixer_and_rank
@pytest.mark.usefixtures("averages_by_pooling")
def test_mixers_agree_with_the_counter_of_torch(name, rank):
    grid = GRIDS[rank]
    mixer, x = mixzoo.create_mixer(name, C, rank=rank, grid_size=grid), torch.randn(2, *grid, C)
    counted = complexity(mixer, inputs=x)
    assert not counted.uncounted
    # transforms may be matrix products inside, which torch's counter sees
    if not counted.transform_macs:
        assert counted.macs == counted_by_torch(mixer, x)


@pytest.mark.usefixtures("averages_by_pooling")
def test_backbones_agree_with_the_counter_of_torch_and_on_meta(model_kind, shrink):
    model = tiny(model_kind, shrink)
    counted = complexity(model)
    assert complexity(tiny(model_kind, shrink, "meta")) == counted
    assert not counted.uncounted
    # transforms may be matrix products inside, which torch's counter sees
    if not counted.transform_macs:
        inputs = example_inputs(model)
        if "input_ids" in inputs:
            # graphs always have the mask, which an eager call leaves out where no token is padding
            inputs["input_ids"][..., -1] = model.pad_token_id
        assert counted.macs == counted_by_torch(model, **inputs)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 8, 4, padding="same"),
        nn.Conv1d(4, 6, 3, dilation=2, bias=False),
        nn.Conv2d(4, 8, (3, 5), stride=2, groups=2, padding=1),
        nn.Conv2d(4, 4, 3, groups=4, padding="valid"),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 8, (1, 3, 3)),
        nn.ConvTranspose1d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1, groups=2),
    ],
    ids=str,
)
def test_convolutions_agree_with_the_counter_of_torch_on_every_device(conv):
    x = torch.randn(2, 4, *[9] * (conv.weight.ndim - 2))
    counted = complexity(conv, inputs=x)
    assert counted.macs == counted_by_torch(conv, x)
    assert counted.activations == conv(x).numel()
    assert complexity(conv.to("meta"), inputs=x) == counted


EINSUMS = [
    ("bnc,bmc->bnm", (2, 5, 3), (2, 7, 3)),
    ("...ij,jk->...ik", (2, 3, 4, 5), (5, 6)),
    ("bhwc,cd", (2, 3, 4, 5), (5, 6)),
    ("ij,jk,kl->il", (3, 4), (4, 5), (5, 6)),
    ("bgnc,gcd->bgnd", (2, 3, 4, 5), (3, 5, 6)),
]


@pytest.mark.parametrize(("equation", "shapes"), [(e, shapes) for e, *shapes in EINSUMS])
def test_einsums_agree_with_the_counter_of_torch(equation, shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    call = Apply(lambda *operands: torch.einsum(equation, *operands))
    counted = complexity(call, inputs=tensors)
    assert counted.macs == counted_by_torch(call, *tensors)
    assert not counted.uncounted


def test_letters_that_are_only_summed_are_no_products():
    counted = count_call(lambda a, b: torch.einsum("nck,nd->ncd", a, b), torch.randn(3, 4, 5), torch.randn(3, 6))
    assert (counted.macs, counted.other_ops) == (3 * 4 * 6, 3 * 4 * 5)
    assert count_call(lambda a: torch.einsum("ij->ji", a), torch.randn(3, 4)) == count_call(torch.t, torch.randn(3, 4))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mixer_s32_224"])
def test_models_of_timm_agree_with_the_counter_of_torch(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    counted = complexity(model, 224)
    assert counted.macs == counted_by_torch(model, torch.zeros(1, 3, 224, 224, device="meta"))
    assert not counted.uncounted


# operators


X = torch.randn(2, 6, 8)
IMAGE = torch.randn(1, 4, 6, 8)
Z = torch.randn(3, 5, dtype=torch.complex64)
OPERATORS = {
    "linear": (lambda x: F.linear(x, torch.ones(3, 8)), X, {"macs": 2 * 6 * 3 * 8, "activations": 36}),
    "complex matmul": (lambda z: z @ z.mT, Z, {"macs": 4 * 3 * 3 * 5, "activations": 9}),
    "relu": (lambda x: x.relu_(), X, {"other_ops": 96}),
    "lerp": (lambda x: torch.lerp(x, x, 0.5), X, {"other_ops": 288}),
    "addcmul": (lambda x: torch.addcmul(x, x, x), X, {"other_ops": 192}),
    "softmax": (lambda x: x.softmax(-1), X, {"other_ops": 480}),
    "mean": (lambda x: x.mean(1), X, {"other_ops": 96}),
    "variance": (lambda x: x.var(-1), X, {"other_ops": 288}),
    "layer norm": (lambda x: F.layer_norm(x, (8,)), X, {"norm_ops": 480, "other_ops": 480}),
    "group norm": (lambda x: F.group_norm(x, 2), IMAGE, {"norm_ops": 960, "other_ops": 960}),
    "batch norm": (nn.BatchNorm2d(4), IMAGE, {"norm_ops": 384, "other_ops": 384, "parameters": 8}),
    "average pooling": (lambda x: F.avg_pool2d(x, 3, 1), IMAGE, {"other_ops": 9 * 4 * 4 * 6}),
    "maximum pooling": (lambda x: F.max_pool2d(x, (1, 2)), IMAGE, {"other_ops": 192}),
    "adaptive pooling": (lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE, {"other_ops": 192}),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE, {"other_ops": 4 * 768}),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), IMAGE, {}),
    "indices": (lambda x: x[:, torch.arange(x.shape[1]) * 2 // 2 % 3], X, {}),
    "views": (lambda x: x.flatten(1).reshape(2, 8, 6).permute(0, 2, 1).contiguous()[:, ::2].to(torch.float64), X, {}),
    "fft": (lambda z: torch.fft.fft(z, n=8), Z, {"transform_macs": 3 * 5 * 8 * 3 // 2}),
    "real fft": (torch.fft.rfft, X, {"transform_macs": 12 * 5 * 8 * 3 // 4}),
    "odd real fft": (torch.fft.rfft, X[..., :7], {"transform_macs": round(12 * 5 * 7 * math.log2(7) / 4)}),
    "padded real fft": (lambda x: torch.fft.rfft(x, n=16), X, {"transform_macs": 12 * 5 * 16 * 4 // 4}),
    "inverse real fft": (lambda x: torch.fft.irfft(x, n=8), Z[:, :5], {"transform_macs": 3 * 5 * 8 * 3 // 4}),
    "fft2": (lambda x: torch.fft.rfft2(x, dim=(0, 2)), X, {"transform_macs": 6 * 5 * 16 * 4 // 4}),
    "fftn": (lambda x: torch.fft.rfftn(x), X[:, :4], {"transform_macs": 5 * 64 * 6 // 4}),
    "complex product": (lambda z: z * z, Z, {"transform_macs": 3 * 15}),
    "complex times real": (lambda z: z * 2.0, Z, {"transform_macs": 15}),
    "complex sum": (lambda z: z + z, Z, {"transform_macs": 15}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_cost_what_the_documentation_says(name):
    function, x, expected = OPERATORS[name]
    model = function if isinstance(function, nn.Module) else Apply(function)
    counted = complexity(model, inputs=x.clone())
    fields = ("macs", "transform_macs", "norm_ops", "other_ops", "activations", "parameters")
    assert {field: getattr(counted, field) for field in fields} == dict.fromkeys(fields, 0) | expected
    assert not counted.uncounted


class UnfusedAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if mask is None else scores + mask).softmax(-1) @ v


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_counts_as_unfused(masked):
    q, k, v, mask = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4), torch.randn(5, 7)
    tensors = (q, k, v, mask) if masked else (q, k, v)
    unfused, fused = (
        complexity(UnfusedAttention(), inputs=tensors),
        count_call(F.scaled_dot_product_attention, *tensors),
    )
    for field in ("macs", "other_ops", "activations"):
        assert getattr(fused, field) == getattr(unfused, field)
    causal = count_call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    assert causal.macs == fused.macs


def test_the_fast_path_of_torch_is_counted_as_its_parts():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False)
    counted = complexity(layer, inputs=torch.zeros(2, 5, 8))
    assert counted.macs == 2 * (5 * (4 * 64 + 2 * 8 * 16) + 2 * 25 * 8)
    assert not counted.uncounted
    assert torch.backends.mha.get_fastpath_enabled()


# what has no rule


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x / 2


def test_unknown_operators_are_listed():
    counted = count_call(lambda x: torch.cdist(x, x) + torch.cdist(x, x) + Halve.apply(x)[:, :, :6], X)
    assert counted.uncounted == {"aten::cdist": 2, "prim::PythonOp.Halve": 1}
    assert counted.other_ops == 2 * 72
    assert "aten::cdist (2 calls)" in str(counted)


def test_what_a_rule_cannot_say_is_listed(monkeypatch):
    monkeypatch.delitem(RULES, "aten::tanh")
    count("aten::tanh", column="other")(lambda inputs, outputs: None)
    assert count_call(torch.tanh, X).uncounted == {"aten::tanh": 1}


def test_a_rule_beside_its_operator_counts_it(monkeypatch):
    monkeypatch.setattr(_counting, "RULES", RULES)

    @torch.library.custom_op("mixzoo_tests::scan", mutates_args=())
    def scan(x: Tensor) -> Tensor:
        return x.cumsum(-1)

    scan.register_fake(torch.empty_like)
    assert count_call(scan, X).uncounted == {"mixzoo_tests::scan": 1}
    count("mixzoo_tests::scan", column="transform")(lambda inputs, outputs: 9 * numel(inputs[0]))
    try:
        counted = count_call(scan, X)
        assert counted.by_operator == {"scan": Counts(transform_macs=9 * 96)}
        assert not counted.uncounted
        with pytest.raises(ValueError, match="counted already"):
            count("mixzoo_tests::scan", column="other")(lambda inputs, outputs: 0)
    finally:
        del RULES["mixzoo_tests::scan"]
    with pytest.raises(ValueError, match="column must be one of matmul"):
        count("mixzoo_tests::scan", column="flops")


def test_nothing_is_ignored_that_is_not_on_our_list():
    from fvcore.nn.jit_analysis import _IGNORED_OPS

    assert set(_IGNORED_OPS) <= {*RULES, *FREE}
    assert not set(RULES) & FREE


# devices, wrappers, inputs


def test_wrapped_and_compiled_models_count_as_they_are(shrink):
    model = tiny("caformer_s18", shrink)
    counted = complexity(model)
    assert complexity(torch.compile(model)) == counted
    assert complexity(nn.DataParallel(model)) == counted
    assert complexity(torch.compile(nn.DataParallel(torch.compile(model)))) == counted
    model.stages[1] = torch.compile(model.stages[1])
    model.stages[2].compile()
    compiled, call = model.stages[1], model.stages[2]._compiled_call_impl
    assert complexity(model) == counted
    assert model.stages[1] is compiled
    assert model.stages[2]._compiled_call_impl is call


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="module '1' is TorchScript"):
        complexity(nn.Sequential(nn.ReLU(), scripted), inputs=torch.zeros(1, 4))


def state(model: nn.Module) -> list:
    flags = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return [flags, [p.requires_grad for p in model.parameters()], [p._version for p in model.parameters()]]


def test_the_model_and_the_world_are_left_as_they_were(shrink, capfd):
    model = tiny("poolformer_s12", shrink).train()
    model.stages[1].eval()
    model.stem.requires_grad_(False)
    model.stem.register_forward_hook(lambda *_: None)
    before, random = state(model), torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        complexity(model)
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError):
        complexity(model, inputs=torch.zeros(1, 5, *SIZE))
    assert state(model) == before


class Two(nn.Module):
    """A model of named tensors that returns more than tensors."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.fc.weight
        self.tied.requires_grad_(False)
        self.fc.bias.requires_grad_(True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict:
        y = self.fc(x) + self.tied(x)
        return {"y": y if mask is None else y * mask, "nothing": None, "name": "two"}


def test_inputs_by_position_and_by_name():
    model, x, mask = Two(), torch.zeros(3, 4), torch.ones(3, 6)
    plain = complexity(model, inputs=x)
    assert (plain.macs, plain.other_ops) == (2 * 3 * 4 * 6, 18)
    by_name = complexity(model, inputs={"mask": mask, "x": x})
    assert by_name.other_ops == 36
    assert by_name.input_shapes == ((3, 6), (3, 4))
    assert by_name.by_module == complexity(model, inputs=(x, mask)).by_module


def test_shared_parameters_are_counted_once():
    counted = complexity(Two(), inputs=torch.zeros(3, 4))
    assert (counted.parameters, counted.frozen_parameters, counted.trainable_parameters) == (30, 24, 6)
    assert counted.by_module["tied"].parameters == 24
    assert counted.by_module["tied"].macs == 72


def test_frozen_random_matrices_are_counted_apart(shrink):
    model = tiny("randformer_s12", shrink)
    matrices = sum(p.numel() for name, p in model.named_buffers() if name.endswith("random_matrix"))
    counted = complexity(model)
    assert counted.frozen_parameters == matrices > 0
    assert counted.parameters == sum(p.numel() for p in model.parameters()) + matrices


def test_modules_add_up_to_the_model(shrink):
    counted = complexity(tiny("caformer_s18", shrink))
    assert counted.by_module[""] == Counts() or counted.by_module[""].macs == counted.macs
    for field in ("macs", "norm_ops", "other_ops", "activations"):
        children = [c for name, c in counted.by_module.items() if name and "." not in name]
        assert sum(getattr(child, field) for child in children) == getattr(counted, field)
        assert sum(getattr(c, field) for c in counted.by_operator.values()) == getattr(counted, field)
    block = counted.by_module["stages.3.blocks.0"]
    assert block.macs == sum(counted.by_module[f"stages.3.blocks.0.{branch}"].macs for branch in ("token", "channel"))


def test_input_sizes(shrink):
    model = tiny("identityformer_s12", shrink, in_chans=2, img_size=SIZE)
    counted = complexity(model)
    assert counted.input_shapes == ((1, 2, *SIZE),)
    assert complexity(model, SIZE) == complexity(model, (2, *SIZE)) == counted
    assert complexity(model, 48).input_shapes == ((1, 2, 48, 48),)
    assert complexity(model, batch_size=3).macs == 3 * counted.macs
    with torch.device("meta"):
        other = timm.create_model("mobilevitv2_050")
    assert complexity(other).input_shapes == ((1, 3, 256, 256),)
    assert complexity(nn.Conv2d(3, 1, 1)).input_shapes == ((1, 3, 224, 224),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size must be positive integers"),
        ({"input_size": (3, 2.5, 2)}, "input_size must be positive integers"),
        ({"input_size": ()}, "input_size must be positive integers"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"input_size": 8, "inputs": torch.zeros(1)}, "either inputs"),
        ({"batch_size": 2, "inputs": torch.zeros(1)}, "either inputs"),
    ],
)
def test_impossible_inputs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        complexity(nn.Identity(), **arguments)


def test_half_precision_counts_as_single():
    mixer, x = mixzoo.create_mixer("separable_conv", C), torch.zeros(1, 5, 7, C)
    counted = complexity(mixer, inputs=x)
    assert complexity(mixer.bfloat16(), inputs=x.bfloat16()).macs == counted.macs


# published figures


def test_other_rules():
    counts = Counts(macs=100, transform_macs=10, norm_ops=5, other_ops=7)
    assert [counts.macs_by(rule) for rule in ("matmul", "matmul+norm", "matmul+transform+norm")] == [100, 105, 115]
    with pytest.raises(ValueError, match="'matmul\\+bias' has 'bias'"):
        counts.macs_by("matmul+bias")
    assert set(COLUMNS) >= {"matmul", "norm", "transform"}


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_names_a_known_rule(name):
    assert Counts().macs_by(RELEASES[name].macs_rule) == 0


def test_the_sheet_of_poolformer_s12_is_met_to_the_operation():
    with torch.device("meta"):
        counted = complexity(mixzoo.create_model("poolformer_s12"))
    assert counted.parameters == 11_915_176
    assert f"{counted.macs / 1e9:.4f} {counted.macs_by('matmul+norm') / 1e9:.4f}" == "1.8123 1.8227"
    assert str(counted) == (
        "11.92 M parameters, 1.812 GMACs, 28.95 M other operations, 5.533 M activations for 1x3x224x224"
    )
