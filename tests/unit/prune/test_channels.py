"""What goes with a channel: groups that share nothing, streams that stay whole, a model left as it was."""

import logging
import sys
import threading

import pytest
import timm
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from toolkit.prune.channels import channel_groups

# Model, its arguments, input size, groups, channels.
MODELS = [
    ("resnet10t", {"channels": (16, 32, 64, 128)}, 64, 7, 360),
    ("resnet18", {}, 64, 8, 1920),
    ("resnet50", {}, 64, 33, 7616),
    ("vit_tiny_patch16_224", {}, 224, 24, 12 * (3 + 768)),
    ("mobilenetv3_small_100", {}, 64, 23, 4664),
    ("convnext_atto", {}, 64, 12, 7360),
    ("inception_v3", {}, 299, 94, 15168 + 2048),  # concatenated branches
    ("vgg11_bn", {"num_classes": 10}, 224, 10, 6848 + 4096),  # a pool of 7 x 7 places read by one convolution
]
IDS = [name for name, *_ in MODELS]


def made(name, size, **options):
    return timm.create_model(name, **options).eval(), torch.zeros(1, 3, size, size)


def owned(groups):
    return [
        (one.name, one.axis, place)
        for group in groups
        for one in group.slices
        for place in one.places.view(-1).tolist()
    ]


@pytest.mark.parametrize(("name", "options", "size", "groups", "channels"), MODELS, ids=IDS)
def test_groups_share_no_place_and_come_out_the_same_twice(name, options, size, groups, channels):
    model, image = made(name, size, **options)
    found, again = channel_groups(model, image), channel_groups(model, image)
    assert (len(found), sum(group.count for group in found)) == (groups, channels)
    places = owned(found)
    assert len(places) == len(set(places))
    assert owned(again) == places
    assert [(group.name, group.count) for group in again] == [(group.name, group.count) for group in found]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in found:
        makes = [one for one in group.slices if one.name == f"{group.name}.weight" and one.axis == 0]
        assert makes[0].places.numel() == model.get_submodule(group.name).weight.shape[0]
        assert any(one.axis == 1 for one in group.slices)  # somebody reads it
        for one in group.slices:
            assert one.places.shape[0] == group.count
            assert one.places.dtype is torch.int64
            assert 0 <= int(one.places.min()) <= int(one.places.max()) < tensors[one.name].shape[one.axis]


def test_a_block_by_name():
    model, image = made("resnet18", 64)
    group = channel_groups(model, image)[2]
    assert {(one.name, one.axis, tuple(one.places.shape)) for one in group.slices} == {
        ("layer2.0.conv1.weight", 0, (128, 1)),
        ("layer2.0.bn1.weight", 0, (128, 1)),
        ("layer2.0.bn1.bias", 0, (128, 1)),
        ("layer2.0.bn1.running_mean", 0, (128, 1)),
        ("layer2.0.bn1.running_var", 0, (128, 1)),
        ("layer2.0.conv2.weight", 1, (128, 1)),
    }


def test_a_head_is_a_channel():
    model, image = made("vit_tiny_patch16_224", 224)
    heads = channel_groups(model, image)[0]
    places = {(one.name, one.axis): one.places for one in heads.slices}
    assert (heads.name, heads.count) == ("blocks.0.attn.qkv", 3)
    rows = torch.arange(64)
    for head in range(3):
        of_head = torch.cat([rows + head * 64 + part * 192 for part in range(3)])
        assert torch.equal(places["blocks.0.attn.qkv.weight", 0][head], of_head)
        assert torch.equal(places["blocks.0.attn.qkv.bias", 0][head], of_head)
        assert torch.equal(places["blocks.0.attn.proj.weight", 1][head], rows + head * 64)


def test_streams_classifier_and_input_stay():
    for name, stays in {
        "resnet18": ("conv1", "layer1.0.conv2", "layer2.0.downsample.0", "fc"),
        "vit_tiny_patch16_224": ("patch_embed.proj", "blocks.3.attn.proj", "blocks.3.mlp.fc2", "head"),
        "convnext_atto": ("stem.0", "stages.0.blocks.0.conv_dw", "stages.0.blocks.0.mlp.fc2", "head.fc"),
    }.items():
        model, image = made(name, 224 if "vit" in name else 64)
        ends = {(one.name, one.axis) for group in channel_groups(model, image) for one in group.slices}
        assert not {(f"{layer}.{kind}", 0) for layer in stays for kind in ("weight", "bias")} & ends
        first = next(layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d))
        assert (f"{first}.weight", 1) not in ends


class _Odd(nn.Module):
    """Layers that look as if their channels could go one by one."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Conv2d(8, 4, 1, groups=2 if kind == "grouped" else 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.norm = nn.GroupNorm(2, 8)
        if kind == "computed":
            nn.utils.parametrizations.weight_norm(self.a)

    def forward(self, x):
        x = self.a(x)
        if self.kind == "shuffled":
            x = x.view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        if self.kind == "over channels":
            x = x / x.mean(1, keepdim=True)
        if self.kind == "softmax":
            x = x.softmax(1)
        if self.kind == "normed":
            x = self.norm(x)
        if self.kind == "bare":
            x = x * self.scale
        if self.kind == "halves":
            left, right = x.chunk(2, 1)
            x = torch.cat([right, left], 1)
        if self.kind == "twice":
            return self.b(x) + self.b(2 * x)
        if self.kind == "gate of one":
            x = x * self.b(x)[:, :1]
        return self.b(x).mean((2, 3))


ODD = {
    "grouped": "in groups",
    "shuffled": "may mix",
    "over channels": "may mix",
    "softmax": "may mix",
    "normed": "may mix",
    "bare": "bare parameter",
    "halves": "may mix",
    "twice": "",
    "gate of one": "",
    "computed": "computed from others",
}


@pytest.mark.parametrize(("kind", "reason"), ODD.items())
def test_what_may_mix_channels_stays_whole_and_is_named(kind, reason, caplog):
    with caplog.at_level(logging.INFO, "toolkit"):
        assert channel_groups(_Odd(kind), torch.zeros(1, 3, 8, 8)) == []
    assert any("(a" in line and reason in line for line in caplog.messages)


class _Shared(nn.Module):
    """Layers one behind the other, of which two may share a tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8 if n else 3, 8, 3, padding=1) for n in range(4))
        self.a_norm, self.d_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.kept = nn.Identity()

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a_norm(self.a(x)))))
        return self.d_norm(self.d(torch.relu(self.c(x)))).mean((2, 3))


# Where a tensor is, where it is once more, and the groups that are left of a, b and c.
SHARED = [
    ("d.bias", "a_norm.num_batches", ["b"]),  # d reads c; a_norm is a's
    ("b.weight", "c.weight", []),
    ("c.bias", "a.bias", []),  # b reads a
    ("a_norm.weight", "d_norm.weight", ["b", "c"]),
    ("a_norm.running_mean", "d_norm.running_mean", ["b", "c"]),
    ("d.weight", "kept.weight", ["a", "b"]),
    ("a.weight", "a.another", ["b", "c"]),
]


@pytest.mark.parametrize(("place", "other", "left"), SHARED)
def test_a_shared_tensor_keeps_its_channels(place, other, left, caplog):
    model, image = _Shared(), torch.zeros(1, 3, 8, 8)
    assert [group.name for group in channel_groups(model, image)] == ["a", "b", "c"]
    (layer, name), (second, attribute) = place.split("."), other.split(".")
    setattr(model.get_submodule(second), attribute, getattr(model.get_submodule(layer), name))
    with caplog.at_level(logging.INFO, "toolkit"):
        groups = channel_groups(model, image)
    assert [group.name for group in groups] == left
    assert any("a weight among them is shared" in line for line in caplog.messages)
    shared = {place, other}
    assert not shared & {one.name for group in groups for one in group.slices}


def test_a_module_of_two_names_that_is_used_once_is_not_shared():
    model, image = _Shared(), torch.zeros(1, 3, 8, 8)
    model.kept = model.b
    assert [group.name for group in channel_groups(model, image)] == ["a", "b", "c"]


def test_a_model_that_cannot_be_copied_is_one_line():
    model, image = _Shared(), torch.zeros(1, 3, 8, 8)
    for what in (threading.Lock(), torch.ones(1, requires_grad=True) * 2, (number for number in ())):
        model.odd = what
        with pytest.raises(ValueError, match=r"_Shared cannot be copied to see which .*; prune it by weight") as error:
            channel_groups(model, image)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["", "b"])
def test_a_sharded_model_is_told_to_come_earlier(part):
    def work(rank):
        model = _Shared()
        fully_shard(model.get_submodule(part), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"seen before fully_shard; make the groups first$"):
            channel_groups(model, torch.zeros(1, 3, 8, 8))

    run_ranks(work, 1)


def test_the_plain_one_has_a_group():
    assert [(group.name, group.count) for group in channel_groups(_Odd("plain"), torch.zeros(1, 3, 8, 8))] == [("a", 8)]


def test_the_model_stays_as_it_was():
    model = timm.create_model("test_resnet").train()
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    facts = [
        (module, module.training, dict(module.__dict__), list(module._forward_hooks.items()))
        for module in model.modules()
    ]
    random = torch.get_rng_state()
    with torch.no_grad():
        groups = channel_groups(model, torch.zeros(1, 3, 64, 64))
    assert groups
    assert not calls
    assert torch.equal(torch.get_rng_state(), random)
    for module, training, attributes, hooks in facts:
        assert module.training is training
        assert module.__dict__ == attributes
        assert list(module._forward_hooks.items()) == hooks
    assert not model.fc.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_missing_library_and_a_wrong_input_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="cannot be traced for its channels") as error:
        channel_groups(_Odd("plain"), torch.zeros(1, 4, 8, 8))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=r'pip install "adamwprune-toolkit\[export\]"'):
        channel_groups(_Odd("plain"), torch.zeros(1, 3, 8, 8))
