"""Text encoders beyond the fixtures: PoNet against its equations, FNet against `transformers` where it is installed,
padding, segments, heads, lengths, and files of every layout.
"""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixzoo
from mixzoo import weights
from mixzoo.mixers import TOKEN_MIXERS
from mixzoo.models._text import MeanPool
from mixzoo.models.text_encoder import HEADS, segments_between

SEQUENCE_MIXERS = [name for name, info in TOKEN_MIXERS.infos().items() if 1 in info.ranks]
HONOUR_MASKS = [name for name in SEQUENCE_MIXERS if TOKEN_MIXERS[name].honours_mask]
SMALL = {"dim": 32, "depth": 2, "vocab_size": 130, "max_length": 40}


def ids_of(batch: int, length: int, vocab_size: int = 130, seed: int = 0) -> Tensor:
    """Words but 0 to 3."""
    return torch.randint(4, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def near(ours: Tensor, theirs: Tensor, rtol: float = 2e-5) -> bool:
    return (ours - theirs).abs().max().item() <= rtol * theirs.abs().max().item()


# PoNet


def naive_ponet(mixer: nn.Module, x: Tensor, mask: Tensor, segments: Tensor, special: Tensor) -> Tensor:
    """The equations as they stand, with five projections, token by token."""
    q, k, o, s, m = (layer(x) for layer in (mixer.q, mixer.k, mixer.o, mixer.segment, mixer.local))
    B, N, C = x.shape
    G, y = mixer.num_heads, torch.zeros_like(x)
    for b in range(B):
        valid = [n for n in range(N) if mask[b, n]]
        if not valid:
            continue
        g = q[b, valid].mean(0).view(G, 1, -1)
        keys = k[b, valid].view(-1, G, C // G).transpose(0, 1)  # (G, valid, D)
        a = (g * keys).sum(-1).div(math.sqrt(C // G)).softmax(-1)
        v = (a.unsqueeze(-1) * keys).sum(1).flatten()
        for n in valid:
            y[b, n] = v * o[b, n]
            if special[b, n] and mixer.special_pooling:
                continue
            mates = [j for j in valid if segments[b, j] == segments[b, n]]
            seen = [j for j in (n - 1, n, n + 1) if j in valid and not (mixer.special_pooling and special[b, j])]
            y[b, n] = (v + s[b, mates].amax(0)) * o[b, n] + m[b, seen].amax(0)
    return mixer.proj(y)


@pytest.mark.parametrize("special_pooling", [True, False])
@pytest.mark.parametrize("length", [1, 2, 13, 30])
def test_ponet_is_what_its_equations_say(length, special_pooling):
    torch.manual_seed(length)
    mixer = mixzoo.create_mixer("ponet", 12, rank=1, head_dim=4, special_pooling=special_pooling).double()
    x = torch.randn(3, length, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, length) > 0.3
    mask[2] = False
    segments, special = torch.randint(0, max(length // 3, 1), (3, length)), torch.rand(3, length) > 0.7
    results = [run(x, mask, segments, special) for run in (mixer, lambda *args: naive_ponet(mixer, *args))]
    weight = torch.randn_like(x)
    leaves = [x, *mixer.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in results)
    assert torch.allclose(*results, rtol=0, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("length", "number", "block"), [(50, 4, 13), (50, 1, 51), (7, 64, 1), (8, 2, 5)])
def test_segments_of_ponet_are_blocks_where_none_are_given(length, number, block):
    torch.manual_seed(0)
    mixer = mixzoo.create_mixer("ponet", 16, rank=1, head_dim=8, num_segments=number)
    x, mask = torch.randn(2, length, 16), torch.arange(length).expand(2, -1) < length - 3
    given = (torch.arange(length) // block).expand(2, -1)
    for valid in (None, mask):
        assert torch.allclose(mixer(x, valid), mixer(x, valid, given), atol=1e-6)


# padding


@pytest.fixture
def encoder(randomise):
    def build(name: str = "seqformer_s", **options) -> nn.Module:
        return randomise(mixzoo.create_model(name, **SMALL | options)).eval()

    return build


@pytest.mark.parametrize("name", HONOUR_MASKS)
def test_padding_is_kept_out_of_valid_tokens(name, encoder):
    """What stands at padded places does not matter, and beside the longest of a batch a text is what it is alone."""
    options = {"head_dim": 8} if "head_dim" in TOKEN_MIXERS[name].options else {}
    model = encoder(token_mixer=(name, options), num_classes=3)
    ids, mask = ids_of(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    other = ids.masked_fill(mask == 0, 9)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y, features = model(ids, mask), model.forward_features(ids, mask)
        assert near(model(other, mask), y)
        assert near(model(ids[:1]), y[:1])
        if name != "ponet":  # whose blocks of tokens depend on the length
            assert near(model(ids[1:, :13]), y[1:])
            assert near(model.forward_features(ids[1:, :13])[0], features[1, :13])


@pytest.mark.parametrize("side", ["left", "right"])
def test_ponet_takes_padding_on_either_side(side, encoder):
    model = encoder("ponet_base_uncased", token_mixer=("ponet", {"head_dim": 8}), num_classes=3)
    # positions count padding too, so they are taken out of the comparison
    with torch.no_grad():
        model.embed.position.weight.zero_()
    ids = ids_of(2, 16, 100)
    ids[:, 0], ids[:, [5, 15]] = 101, 102
    padding = torch.zeros(2, 9, dtype=torch.long)
    parts, valid = [ids, padding], [torch.ones_like(ids), padding]
    order = slice(None, None, -1 if side == "left" else 1)
    padded, mask = torch.cat(parts[order], 1), torch.cat(valid[order], 1)
    start = 9 if side == "left" else 0
    with torch.no_grad():
        assert near(model.forward_features(padded, mask)[:, start : start + 16], model.forward_features(ids))
        # padding passes the blocks as well, without what the mixers give
        assert model.forward_features(padded, mask).isfinite().all()


@pytest.mark.parametrize("name", HONOUR_MASKS)
def test_a_text_of_padding_alone_leaves_gradients_finite(name, encoder):
    options = {"head_dim": 8} if "head_dim" in TOKEN_MIXERS[name].options else {}
    model = encoder(token_mixer=(name, options), num_classes=3).train()
    mask = torch.ones(2, 12)
    mask[1] = 0
    y = model(ids_of(2, 12), mask)
    assert y.isfinite().all()
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_means_of_long_texts_fit_half_precision():
    x, mask = torch.full((1, 4000, 8), 30, dtype=torch.float16), torch.ones(1, 4000, dtype=torch.bool)
    mask[:, 3900:] = False
    assert near(MeanPool(valid=True)(x, mask), x[:, 0], 1e-2)
    mixer = mixzoo.create_mixer("ponet", 8, rank=1, head_dim=4, dtype=torch.float16)
    assert mixer(x, mask).isfinite().all()


def test_mixers_deaf_to_padding_are_told_of_once(encoder):
    model, ids, mask = encoder("fnet_base", num_classes=2), ids_of(2, 10), torch.ones(2, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        model(ids, mask)
    mask[0, 7:] = 0
    with pytest.warns(UserWarning, match=r"padded.*fourier.*padded length"):
        y = model(ids, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(ids, mask), y)
    assert torch.equal(model(ids), y)


@pytest.mark.parametrize("name", SEQUENCE_MIXERS)
@pytest.mark.filterwarnings("ignore:a token MLP was resampled")
def test_encoders_take_any_mixer_of_sequences(name, encoder):
    options = {"head_dim": 8} if "head_dim" in TOKEN_MIXERS[name].options else {}
    model = encoder("lra_softmax_image", token_mixer=(name, options))
    x = ids_of(2, 40)
    assert model(x).shape == (2, 10)
    model.set_input_size(60)
    assert model(ids_of(2, 60)).isfinite().all()


# segments and embeddings


def test_segments_lie_between_separators():
    def of(*ids: int) -> list[int]:
        row = torch.tensor([ids])
        return segments_between((row == 101) | (row == 102))[0].tolist()

    assert of(101, 7, 7, 102, 8, 8, 102, 0, 0) == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    # without [CLS] in front the numbers begin at 0 too
    assert of(7, 7, 102, 8) == [0, 0, 1, 2]
    assert of(101, 102, 102, 5) == [0, 1, 2, 3]


def test_segments_are_derived_given_or_of_any_numbers(encoder):
    model = encoder("ponet_base_uncased", token_mixer=("ponet", {"head_dim": 8}), num_classes=3)
    ids = ids_of(2, 20, 100)
    ids[:, 0], ids[:, [8, 19]] = 101, 102
    special = (ids == 101) | (ids == 102)
    derived = segments_between(special)
    with torch.no_grad():
        y = model(ids)
        assert torch.equal(model(ids, segment_ids=derived), y)
        # numbers beyond the length and out of order
        assert near(model(ids, segment_ids=1000 - 7 * derived), y)
        assert not near(model(ids, segment_ids=torch.zeros_like(ids)), y, 1e-3)
        vectors = model.embed.word(ids)
        assert near(model(inputs_embeds=vectors, special_mask=special), y)
        assert near(model(inputs_embeds=vectors, special_mask=special, segment_ids=derived), y)
        # without ids nothing tells the separators
        assert not near(model(inputs_embeds=vectors), y, 1e-3)


def test_inputs_that_cannot_be_are_named(encoder):
    model, ids = encoder("lra_softmax_text", max_length=40), ids_of(2, 10)
    for inputs, message in (
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 10, 32)}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids[0]}, r"input_ids \(B, N\), got a tensor of shape \(10,\)"),
        ({"inputs_embeds": torch.zeros(2, 10, 31)}, r"inputs_embeds \(B, N, 32\)"),
        ({"input_ids": ids_of(1, 41)}, r"41 tokens, the model takes at most 40.*set_input_size\(41\)"),
        ({"input_ids": ids, "token_type_ids": ids}, "no token types"),
        ({"input_ids": ids, "segment_ids": ids}, "segment_ids was given, but no mixer of the model uses it: attention"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    ponet = encoder("lra_ponet_text", token_mixer=("ponet", {"head_dim": 8}))
    with pytest.raises(ValueError, match="segment_ids must not be negative; the smallest is -1"):
        ponet(ids, segment_ids=torch.full_like(ids, -1))
    bound = encoder(token_mixer="spatial_fc")
    with pytest.raises(ValueError, match="10 tokens, the model takes exactly 40"):
        bound(ids)


# heads


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, encoder):
    classes = {} if head in ("mlm", "pretraining") else {"num_classes": 5}
    model = encoder("fnet_base", head=head, **classes)
    ids = ids_of(6, 10).view(3, 2, 10) if head == "pairs" else ids_of(3, 10)
    y = model(ids)
    expected = {"tokens": (3, 10, 5), "mlm": (3, 10, 130)}.get(head, (3, 5))
    if head == "pretraining":
        assert y.relation_logits.shape == (3, 2)
        y, expected = y.logits, (3, 10, 130)
    assert y.shape == expected
    # other heads later, with the encoder as it was
    before = model.forward_features(ids_of(3, 10))
    model.reset_classifier(4, "tokens")
    assert model.eval()(ids_of(3, 10)).shape == (3, 10, 4)
    assert torch.equal(model.forward_features(ids_of(3, 10)), before)


def test_words_are_scored_by_their_embeddings(encoder):
    model, ids = encoder("fnet_base", head="mlm"), ids_of(2, 9)
    head, x = model.mlm, model.forward_features(ids)
    expected = head.norm(F.gelu(head.fc(x), approximate="tanh")) @ model.embed.word.weight.T + head.bias
    assert near(model(ids), expected)
    model(ids).sum().backward()
    # words that do not occur have a gradient as outputs
    assert (model.embed.word.weight.grad.abs().sum(1) > 0).all()


def test_pairs_are_compared_and_swap(encoder):
    model = encoder("lra_softmax_retrieval", token_mixer=("attention", {"head_dim": 8}))
    ids = ids_of(6, 12).view(3, 2, 12)
    with torch.no_grad():
        a, b = (model.pooler(model.forward_features(ids[:, i])) for i in (0, 1))
        assert near(model(ids), model.head(torch.cat([a, b, a * b, a - b], 1)))
    with pytest.raises(ValueError, match=r"two sequences, \(B, 2, N\)"):
        model(ids[:, 0])


# lengths


def test_positions_are_repeated_whole_or_cut(encoder):
    model = encoder("ponet_base_uncased", token_mixer=("ponet", {"head_dim": 8}), num_classes=3)
    table = model.embed.position.weight.detach().clone()
    for length in (80, 100, 17):
        longer = encoder("ponet_base_uncased", token_mixer=("ponet", {"head_dim": 8}), num_classes=3, max_length=length)
        report = mixzoo.load_checkpoint(longer, model.state_dict())
        assert set(report.adapted) == {"embed.position"}
        for n in range(length):
            assert torch.equal(longer.embed.position.weight[n], table[n % 40])
        assert longer(ids_of(1, length)).isfinite().all()
    model.set_input_size(80)
    assert torch.equal(model.embed.position.weight, table.repeat(2, 1))


# files


# layout, what its keys begin with, and heads
BERTS = ("pretraining", "mlm", "tokens", "classification")
LAYOUTS = {
    "fnet_base": ("huggingface", "fnet.", BERTS),
    "ponet_base_uncased": ("ponet", "ponet.", BERTS),
    "lra_ponet_image": ("lra", "model.", ("classification",)),
    "lra_softmax_text": ("lra", "model.", ("classification",)),
    "lra_softmax_retrieval": ("lra", "model.", ("pairs",)),
}


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, (*_, heads) in LAYOUTS.items() for head in heads])
def test_layouts_are_read_and_written(name, head, encoder):
    layout, prefix, _ = LAYOUTS[name]
    options = {"head": head}
    mixer = mixzoo.create_model(name, device="meta").blocks[0].token.op
    options |= {"token_mixer": ("ponet", {"head_dim": 8})} if type(mixer).__name__ == "PoNet" else {}
    model = encoder(name, **options)
    theirs = weights.export(model.state_dict(), layout)
    assert all(key.startswith((prefix, "cls.", "classifier.", "seq_classifer.")) for key in theirs)
    again = mixzoo.create_model(name, **SMALL | options)
    report = mixzoo.load_checkpoint(again, {"model_state_dict": theirs, "epoch": 3})
    assert (report.layout, report.fresh, report.adapted) == (layout, {}, {})
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in again.state_dict().items())
    assert theirs.keys() == weights.export(again.state_dict(), layout).keys()


@pytest.mark.parametrize("name", ["fnet_base", "ponet_base_uncased"])
def test_tied_and_untied_decoders(name, encoder, tmp_path):
    options = {"token_mixer": ("ponet", {"head_dim": 8})} if name.startswith("ponet") else {}
    model = encoder(name, **options)
    layout = LAYOUTS[name][0]
    theirs = weights.export(model.state_dict(), layout)
    word = next(key for key in theirs if key.endswith("word_embeddings.weight"))
    decoder = {
        "cls.predictions.decoder.weight": theirs[word],
        "cls.predictions.decoder.bias": theirs["cls.predictions.bias"],
    }
    ids = ids_of(2, 9)
    # said twice, once, and once in part: one model
    for state in (theirs | decoder, theirs, theirs | {k: t for k, t in decoder.items() if k.endswith("bias")}):
        path = tmp_path / "pytorch_model.bin"
        torch.save(state | {word.replace("word_embeddings.weight", "position_ids"): torch.arange(40)[None]}, path)
        again = mixzoo.create_model(name, checkpoint=tmp_path, **SMALL | options).eval()
        assert again.mlm.decoder is None
        assert torch.equal(again(ids).logits, model(ids).logits)
    # a matrix of its own, as on the Hub
    other = torch.randn_like(theirs[word])
    again = mixzoo.create_model(
        name, checkpoint=theirs | decoder | {"cls.predictions.decoder.weight": other}, **SMALL | options
    )
    assert torch.equal(again.mlm.decoder.weight, other)
    assert not torch.equal(again.eval()(ids).logits, model(ids).logits)
    mixzoo.save(again, tmp_path / "own.safetensors")
    assert torch.equal(mixzoo.load(tmp_path / "own.safetensors").eval()(ids).logits, again(ids).logits)
    back = weights.export(again.state_dict(), layout)
    assert torch.equal(back["cls.predictions.decoder.weight"], other)


# against transformers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 130}
KINDS = {
    "PreTraining": {},
    "MaskedLM": {"head": "mlm"},
    "SequenceClassification": {"num_classes": 5},
    "TokenClassification": {"head": "tokens", "num_classes": 5},
}


@pytest.fixture
def theirs(randomise):
    transformers = pytest.importorskip("transformers")

    def build(kind: str) -> nn.Module:
        config = transformers.FNetConfig(**SIZES, max_position_embeddings=40, num_labels=5)
        return randomise(getattr(transformers, f"FNet{kind}")(config)).eval()

    return build


@pytest.mark.parametrize("length", [1, 17, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_fnet_gives_what_that_of_transformers_gives(kind, length, theirs):
    reference = theirs(f"For{kind}")
    ours = mixzoo.create_model("fnet_base", **SMALL, **KINDS[kind]).eval()
    report = mixzoo.load_checkpoint(ours, reference.state_dict())
    assert not report.fresh
    assert set(report.loaded) == set(ours.state_dict())
    ids, types = ids_of(3, length), torch.randint(0, 4, (3, length))
    expected = reference(ids, token_type_ids=types, output_hidden_states=True)
    y = ours(ids, token_type_ids=types)
    if kind == "PreTraining":
        assert near(y.relation_logits, expected.seq_relationship_logits)
        assert near(y.logits, expected.prediction_logits)
    else:
        assert near(y, expected.logits)
    assert near(ours.forward_features(ids, token_type_ids=types), expected.hidden_states[-1])

    gradients = []
    for model in (reference, ours):
        vectors = reference.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=vectors, token_type_ids=types)
        output = output if isinstance(output, Tensor) else output[0]
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        gradients.append(torch.autograd.grad((output * weight).sum(), vectors)[0])
    assert near(gradients[1], gradients[0], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_describe_their_models(kind, theirs, tmp_path):
    reference, ids = theirs(f"For{kind}"), ids_of(2, 11)
    reference.save_pretrained(tmp_path)
    model = mixzoo.load(tmp_path).eval()
    # of their models without a vector of the text, a pooler is left that nothing reads
    unread = 33 * 32 if kind in ("MaskedLM", "TokenClassification") else 0
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters()) - unread
    y = model(ids)
    assert near(y if isinstance(y, Tensor) else y.logits, reference(ids)[0])


@pytest.mark.parametrize("bare", [False, True])
def test_folders_of_transformers_are_read(bare, theirs, tmp_path):
    reference = theirs("Model" if bare else "ForPreTraining")
    reference.save_pretrained(tmp_path)
    ours = mixzoo.create_model("fnet_base", checkpoint=tmp_path, **SMALL).eval()
    ids = ids_of(2, 11)
    expected = reference(ids, output_hidden_states=True).hidden_states[-1]
    assert near(ours.forward_features(ids), expected)
    if not bare:
        assert ours.mlm.decoder is None
        assert near(ours(ids).logits, reference(ids).prediction_logits)
    rebuilt = mixzoo.load(tmp_path).eval()
    assert near(rebuilt.forward_features(ids), expected)
    assert rebuilt.head_kind == ("classification" if bare else "pretraining")
    # and into a classifier, whose head is fresh
    model = mixzoo.create_model("fnet_base", checkpoint=tmp_path, num_classes=3, **SMALL).eval()
    assert near(model.forward_features(ids), expected)


def test_folders_of_ponet_describe_their_models(encoder, tmp_path):
    ponet = {
        "token_mixer": ("ponet", {"head_dim": 8, "special_pooling": False}),
        "channel_mixer": ("mlp", {"ratio": 2}),
    }
    model = encoder("ponet_base_uncased", head="tokens", num_classes=4, **ponet)
    torch.save(weights.export(model.state_dict(), "ponet"), tmp_path / "pytorch_model.bin")
    config = {
        "model_type": "ponet",
        "architectures": ["PoNetForTokenClassification"],
        "id2label": dict.fromkeys("0123", "a label"),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_act": "gelu",
        "vocab_size": 130,
        "type_vocab_size": 2,
        "max_position_embeddings": 40,
        "clsgsepg": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = ids_of(2, 11)
    assert torch.equal(mixzoo.load(tmp_path).eval()(ids), model(ids))
    for key, value in (("architectures", ["PoNetForPoetry"]), ("hidden_act", "sine")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(weights.CheckpointError, match=rf"{key}=.*expected one of"):
            mixzoo.load(tmp_path)
