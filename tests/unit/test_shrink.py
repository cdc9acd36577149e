"""Without the channels that were zeroed a model says the same; what is dead is found, folded and removed."""

import copy
import json

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shrinking import difference, random_keep, randomise, zeroed
from torch import nn
from torch.nn.modules import module
from torch.nn.modules.module import register_module_module_registration_hook

import toolkit
from toolkit.prune.channels import channel_groups
from toolkit.prune.dead import dead_channels
from toolkit.shrink import Plan, read_plan, refuse_shrunk, remove_dead_channels, save_shrunk, shrink

SMALL = {"channels": (16, 32, 64, 128)}


def made(name, size, **options):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **options))
    images = torch.randn(2, 3, size, size)
    return model, images, channel_groups(model, images)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet10t", 64, SMALL),
        ("resnet18", 64, {}),
        ("resnet50", 64, {}),
        ("vit_tiny_patch16_224", 224, {}),
        ("mobilenetv3_small_100", 64, {}),
        ("convnext_atto", 64, {}),
        pytest.param("inception_v3", 139, {}, marks=pytest.mark.long),
        pytest.param("vgg11_bn", 224, {"num_classes": 10, "mlp_ratio": 0.1}, marks=pytest.mark.long),
    ],
)
def test_removed_is_zeroed(name, size, options):
    model, images, groups = made(name, size, **options)
    before = copy.deepcopy(model.state_dict())
    keep = random_keep(groups, 0.5)
    smaller, plan = shrink(model, groups, keep)
    zeros = zeroed(model, groups, keep)
    assert difference(zeros, smaller, images) < 1e-5
    assert difference(zeros, model, images) > 1e-3  # the test would notice
    assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for layer, ends in plan.layers.items():
        module = smaller.get_submodule(layer)
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == module.weight.shape[:2]
            assert ends["out"] is None or len(ends["out"]) == module.out_channels
        else:
            assert module.num_features == len(module.running_mean)


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_removed_is_zeroed_at_any_share(share, seed):
    model, images, groups = made("test_resnet", 32)
    keep = random_keep(groups, share, seed)
    smaller, _ = shrink(model, groups, keep)
    assert difference(zeroed(model, groups, keep), smaller, images) < 1e-5


@pytest.mark.parametrize(("name", "size", "options"), [("resnet10t", 32, SMALL), ("test_vit", 160, {})])
def test_a_folder_gives_the_model_back(tmp_path, name, size, options):
    model, images, groups = made(name, size, num_classes=10, **options)
    smaller, plan = shrink(model, groups, random_keep(groups, 0.5))
    plan = Plan(plan.layers, name, options, 10, None, (3, size, size))
    save_shrunk(tmp_path, smaller, plan)
    random = torch.get_rng_state()
    again = toolkit.load_shrunk(tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(again(images), smaller(images))
    assert read_plan(tmp_path / "channels.json").layers == plan.layers
    again.train()(images).sum().backward()  # it can be trained on


class _Net(nn.Module):
    """Two layers with what may stand between them."""

    def __init__(self, norm, bias, padding, behind):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.second = nn.Conv2d(6, 5, 3, padding=padding, bias=behind == "bias")
        self.norm2 = nn.BatchNorm2d(5) if behind in ("norm", "norm and more") else nn.Identity()
        self.more = behind == "norm and more"
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.second(nn.functional.gelu(self.norm(self.first(x))))
        x = torch.relu(self.norm2(x) * x.sigmoid() if self.more else self.norm2(x))
        return self.head(x.mean((2, 3)))


@settings(max_examples=60, deadline=None)
@given(
    norm=st.booleans(),
    bias=st.booleans(),
    padding=st.sampled_from([0, 1]),
    behind=st.sampled_from(["bias", "norm", "norm and more", "nothing"]),
    rows=st.sets(st.integers(0, 5)),
    columns=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 100),
)
def test_what_is_dead_goes_and_nobody_notices(norm, bias, padding, behind, rows, columns, seed):
    torch.manual_seed(seed)
    model = randomise(_Net(norm, bias, padding, behind), seed)
    with torch.no_grad():
        model.first.weight[list(rows)] = 0.0
        model.second.weight[:, list(columns)] = 0.0
    images = torch.randn(2, 3, 9, 9)
    groups = channel_groups(model, images)
    found = dead_channels(model, groups, images).get("first", torch.tensor([])).tolist()
    sends = norm or bias  # else what a zero row sends on is zero itself
    absorbed = not sends or (padding == 0 and behind in ("bias", "norm"))
    wanted = columns | (rows if absorbed else set())
    assert found == sorted(wanted - ({0} if len(wanted) == 6 else set()))
    smaller, plan, dead = remove_dead_channels(model, groups, images)
    assert smaller.first.out_channels == 6 - len(found)
    assert difference(model, smaller, images) < 1e-5
    assert difference(model, smaller, torch.randn(3, 3, 12, 12)) < 1e-5  # whatever the constants were measured on
    assert dead.get("first", torch.tensor([])).tolist() == found
    assert ("first" in plan.layers) == bool(found)


def test_what_dies_because_its_reader_died_goes_too():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    with torch.no_grad():
        model[6].weight[:, 2] = 0.0  # nobody reads channel 2 of layer 4
        model[4].weight[:, 1] = 0.0
        model[4].weight[2, 1] = 1.0  # which alone reads channel 1 of layer 2
    images = torch.randn(5, 8)
    groups = channel_groups(model, images)
    assert {name: gone.tolist() for name, gone in dead_channels(model, groups, images).items()} == {"4": [2]}
    smaller, _, dead = remove_dead_channels(model, groups, images)
    assert {name: gone.tolist() for name, gone in dead.items()} == {"2": [1], "4": [2]}
    assert difference(model, smaller, images) < 1e-5


@pytest.mark.parametrize(("name", "size"), [("mobilenetv3_small_100", 64), ("test_vit", 160), ("resnet18", 64)])
def test_dead_rows_of_real_models(name, size):
    """Depthwise convolutions, gates, heads: whole groups' rows, of which one must stay."""
    model, images, groups = made(name, size)
    with torch.no_grad():
        for group in groups[::2]:
            for one in group.slices:
                layer = model.get_submodule(one.name.rpartition(".")[0])
                if one.axis == 0 and isinstance(layer, (nn.Conv2d, nn.Linear)) and one.name.endswith("weight"):
                    layer.weight[one.places[: group.count // 2].view(-1)] = 0.0
    smaller, _, dead = remove_dead_channels(model, groups, images)
    assert dead
    assert difference(model, smaller, torch.randn(2, 3, size, size)) < 1e-5


def test_a_pruned_layer_keeps_its_last_channel():
    model, images, groups = made("test_resnet", 32)
    with torch.no_grad():
        model.layer1[0].conv1.weight.zero_()
        model.layer1[0].conv2.weight.zero_()
    smaller, _, _ = remove_dead_channels(model, groups, images)
    assert smaller.layer1[0].conv1.out_channels == 1
    assert difference(model, smaller, images) < 1e-5


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"layer1.0.conv1": [3, 2]}, "must ascend"),
        ({"layer1.0.conv1": [0, 0]}, "must ascend"),
        ({"layer1.0.conv1": []}, "at least one"),
        ({"layer1.0.conv1": [0, 999]}, "must ascend from 0 to at most"),
        ({"layer1.0.conv1": [-1]}, "must ascend from 0"),
        ({"layer1.0.conv9": [0]}, "is no group of channels"),
    ],
)
def test_what_is_kept_is_checked(keep, said):
    model, _, groups = made("test_resnet", 32)
    with pytest.raises(ValueError, match=said):
        shrink(model, groups, keep)


@pytest.fixture
def folder(tmp_path):
    model, _, groups = made("resnet10t", 32, num_classes=10, **SMALL)
    smaller, plan = shrink(model, groups, random_keep(groups, 0.5))
    save_shrunk(tmp_path, smaller, Plan(plan.layers, "resnet10t", SMALL, 10, None, (3, 32, 32)))
    return tmp_path


def layers_with(**ends):
    return lambda plan: plan["layers"].update({"layer1.0.conv1": {"out": None, "in": None} | ends})


HOSTILE = {
    "another model": (lambda plan: plan.update(model="resnet18", model_kwargs={}), "not of the model in"),
    "wider": (lambda plan: plan["model_kwargs"].update(channels=[16, 32, 64, 256]), "not of the model in"),
    "not whole": (lambda plan: plan["layers"].pop("layer1.0.conv1"), "layer1.0.conv1.weight has shape"),
    "no layer": (lambda plan: plan["layers"].update(nowhere={"out": [0], "in": None}), "has no layer nowhere"),
    "of maxpool": (lambda plan: plan["layers"].update(maxpool={"out": [0], "in": None}), "has no layer maxpool"),
    "booleans": (layers_with(out=[False, True]), "must be a list of places"),
    "floats": (layers_with(out=[0.0, 1.0]), "must be a list of places"),
    "texts": (layers_with(out="01"), "must be a list of places"),
    "twice": (layers_with(out=[0, 1, 1]), "must ascend"),
    "out of range": (layers_with(out=[0, 16]), "must ascend from 0 to at most 15"),
    "huge": (layers_with(out=[10**30]), "must ascend from 0"),
    "no ends": (lambda plan: plan["layers"].update(fc=[1]), "must have out and in"),
    "a format": (lambda plan: plan.update(format="shrunk/9"), "of format shrunk/1"),
    "a key": (lambda plan: plan.update(code="x"), "it must hold"),
    "a file": (lambda plan: plan["model_kwargs"].update(checkpoint_path="/etc/passwd"), "is not taken"),
    "a download": (lambda plan: plan["model_kwargs"].update(pretrained=True), "is not taken"),
    "a hub": (lambda plan: plan.update(model="hf-hub:who/what"), "not one of timm's"),
    "classes": (lambda plan: plan.update(num_classes=10**9), "not counts"),
    "an image": (lambda plan: plan.update(input_size=[3, -1, 32]), "not counts"),
    "a long image": (lambda plan: plan.update(img_size=[32] * 3), "not counts"),
    "an epsilon": (lambda plan: plan.update(bn_eps=-1.0), "bn_eps -1.0 is not in"),
    "an argument": (lambda plan: plan["model_kwargs"].update(channels=[10**9] * 4), "is not taken"),
    "a large model": (lambda plan: plan["model_kwargs"].update(channels=[4096] * 4), "a file of it at most"),
    "unknown argument": (lambda plan: plan["model_kwargs"].update(nonsense=1), "nonsense"),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_plan_is_an_error_of_one_line(folder, change, said):
    plan = json.loads((folder / "channels.json").read_text())
    change(plan)
    (folder / "channels.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=said) as error:
        toolkit.load_shrunk(folder)
    assert "\n" not in str(error.value)
    assert "export" in str(error.value)


DEEP = [
    ("vit_tiny_patch16_224", {"depth": 16000}),
    ("resnet18", {"layers": [16000] * 4, "channels": [1] * 4}),
    ("convnext_atto", {"depths": [16000] * 4, "dims": [1] * 4}),
    ("repvit_m0_9", {"depth": [16000] * 4, "embed_dim": [8] * 4}),
    ("xcit_nano_12_p16_224", {"depth": 16000}),
    ("swin_tiny_patch4_window7_224", {"depths": [16000] * 4, "embed_dim": 24}),
    ("densenet121", {"block_config": [16000] * 4, "growth_rate": 1}),
]


@pytest.mark.parametrize(("name", "arguments"), DEEP, ids=[name for name, _ in DEEP])
def test_a_plan_deeper_than_its_file_costs_no_time(folder, name, arguments):
    """Whatever the argument is called, the model is not made further than the file's tensors allow."""
    plan = json.loads((folder / "channels.json").read_text())
    plan.update(model=name, model_kwargs=arguments, layers={}, input_size=[3, 224, 224])
    (folder / "channels.json").write_text(json.dumps(plan))
    tensors = len(load_file(folder / "model.safetensors"))
    made = []
    count = register_module_module_registration_hook(lambda module, name, part: made.append(name))
    try:
        with pytest.raises(ValueError, match=f"has more than {8 * tensors} parts, too many for the file's tensors"):
            toolkit.load_shrunk(folder)
    finally:
        count.remove()
    assert len(made) <= 8 * tensors + 1
    hooks = (module._global_module_registration_hooks, module._global_parameter_registration_hooks)
    assert not any((*hooks, module._global_buffer_registration_hooks))


def test_a_file_of_too_many_tensors_is_refused(folder):
    weights = {f"{number}": torch.zeros(1) for number in range(2**13 + 1)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="it has 8,193 tensors, at most 8,192 are taken"):
        toolkit.load_shrunk(folder)


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.booleans(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
@settings(max_examples=50, deadline=None)
def test_any_plan(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("plan") / "channels.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no plan of a shrunk model"):
        read_plan(path)


def test_a_plan_that_cuts_a_layer_and_not_its_reader_does_not_load(folder):
    plan, weights = json.loads((folder / "channels.json").read_text()), load_file(folder / "model.safetensors")
    plan["layers"]["layer1.0.conv1"]["out"].pop()
    weights["layer1.0.conv1.weight"] = weights["layer1.0.conv1.weight"][:-1].contiguous()
    (folder / "channels.json").write_text(json.dumps(plan))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not of the model in") as error:
        toolkit.load_shrunk(folder)
    assert "\n" not in str(error.value)


def test_weights_that_are_none_or_missing(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="it cannot be read"):
        toolkit.load_shrunk(folder)
    with pytest.raises(ValueError, match=r"has no channels.json"):
        toolkit.load_shrunk(tmp_path / "nowhere")


def test_a_shrunk_model_is_no_whole_one(folder):
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match=r"is a shrunk model, not a whole one; load it with toolkit\.load_shrunk"):
            refuse_shrunk(path, "--initial-checkpoint")
    (folder / "channels.json").unlink()
    with pytest.raises(ValueError, match="is a shrunk model"):
        refuse_shrunk(folder / "model.safetensors", "--initial-checkpoint")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    refuse_shrunk(folder / "model.safetensors", "--initial-checkpoint")
    refuse_shrunk(folder, "--resume")


def test_on_a_cpu_no_weight_is_semi_structured():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    before = model[0].weight
    turned, left = toolkit.to_semi_structured(model)
    assert turned == []
    assert left == dict.fromkeys(("0.weight", "2.weight"), "it is on cpu; the kernels are for CUDA")
    assert model[0].weight is before


def test_the_package_offers_only_what_it_has():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        toolkit.nonsense  # noqa: B018
