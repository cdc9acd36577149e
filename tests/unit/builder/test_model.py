"""What a model cannot be made of, or started from, is one line that names the flag."""

from contextlib import nullcontext

import pytest
import timm
import torch
from safetensors.torch import save_file

from toolkit.builder.data import train_transform
from toolkit.builder.model import compile_model, create_model
from toolkit.builder.optimizer import create_optimizer, resolve_optimizer
from toolkit.cli import parse
from toolkit.prune.schedule import Schedule

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
VIT = "test_vit"


def refused(build):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the callers look at the text
        build()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model-kwargs", "in_chans=1"], "--model-kwargs in_chans=1: images are read with 3 channels"),
        (["--model-kwargs", "colour=1"], "--model-kwargs colour=1: "),
        (["--model-kwargs", "act_layer=nosuch"], "--model-kwargs act_layer=nosuch: "),
        (["--model-kwargs", "num_classes=3"], "--model-kwargs num_classes=3: "),
        (["--model-kwargs", "features_only=True"], "is no classifier of 10 classes"),
        (["--model-kwargs", "drop_rate=abc"], "--model-kwargs drop_rate=abc: could not convert string to float"),
        (["--model-kwargs", "drop_rate=2"], "--model-kwargs drop_rate=2: dropout probability has to be"),
        (["--model-kwargs", "drop_path_rate=abc"], "--model-kwargs drop_path_rate=abc: "),
        (["--model", VIT, "--model-kwargs", "global_pool="], "it gives no score a class (10) and image; see --model"),
        (["--model", VIT, "--model-kwargs", "attn_drop_rate=abc"], "--model-kwargs attn_drop_rate=abc: "),
        (["--model", VIT, "--model-kwargs", "num_heads=7"], "--model-kwargs num_heads=7: "),
        (["--model", VIT, "--img-size", "3"], "--img-size 3 does not suit test_vit: "),
        (["--model", "test_resnet.foo", "--pretrained"], "--model test_resnet.foo --pretrained: "),
        (["--model", "vgg11.foo", "--pretrained"], "--model vgg11.foo --pretrained: "),
    ],
)
def test_models_that_cannot_be_made(argv, words):
    config = parse(["--model", "test_resnet", *argv])
    assert words in refused(lambda: create_model(config, 10))


def test_arguments_that_hold_leave_the_model_as_it_was_made():
    """The trial forward pass draws no random number and moves no statistic of BatchNorm."""
    torch.manual_seed(0)
    model = create_model(parse(["--model", "test_resnet", "--model-kwargs", "drop_rate=0.5"]), 10)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    wanted = timm.create_model("test_resnet", num_classes=10, drop_rate=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    tensors = zip(model.state_dict().items(), wanted.state_dict().items(), strict=True)
    assert all(mine == its and torch.equal(one, other) for (mine, one), (its, other) in tensors)


@pytest.mark.parametrize("policy", ["foo", "rand-x1", "rand-m9-x1", "original-x1", "1"])
def test_unknown_augmentation(policy):
    inputs = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    message = refused(lambda: train_transform(parse(["--aa", policy]), inputs))
    assert message.startswith(f"--aa {policy}: ")


@pytest.mark.parametrize("backend", ["nosuch", "Inductor", "1"])
def test_unknown_compiler(backend):
    message = refused(lambda: compile_model(torch.nn.Linear(1, 1), parse(["--torchcompile", backend])))
    assert message.startswith(f"--torchcompile {backend} is not a backend here; choose one of ")
    assert "inductor" in message


@pytest.mark.parametrize(
    ("opt", "argv", "words"),
    [
        ("sgd", ["--momentum", "0"], "Nesterov momentum"),
        ("adamw", ["--opt-kwargs", "colour=1"], "--opt-kwargs"),
    ],
)
def test_arguments_that_an_optimizer_does_not_take(opt, argv, words):
    config = parse(["--opt", opt, *argv])
    message = refused(lambda: create_optimizer(config, torch.nn.Linear(2, 2), opt, 0.1, Schedule()))
    assert message.startswith(f"--opt {opt} does not take one of its arguments: ")
    assert words in message


@pytest.mark.parametrize(
    ("opt", "betas", "takes"), [("adamw", 3, "2"), ("adan", 2, "3"), ("lookahead_adamw", 3, "2"), ("sgd", 2, "none")]
)
def test_betas_are_as_many_as_the_optimizer_takes(opt, betas, takes):
    config = parse(["--opt", opt, "--opt-betas", *["0.9"] * betas])
    assert refused(lambda: resolve_optimizer(config)).startswith(f"--opt-betas: --opt {opt} takes {takes};")


def start(path, *argv, model="test_resnet"):
    return create_model(parse(["--model", model, "--initial-checkpoint", str(path), *argv]), 10)


def truncated(path):
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])


def cut_zip(path):
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("w.safetensors", lambda path: path.write_bytes(LFS), "git lfs pull"),
        ("w.pth", lambda path: path.write_bytes(LFS), "git lfs pull"),
        ("w.pth", lambda path: path.write_bytes(b""), "it is empty"),
        ("w.safetensors", lambda path: path.write_bytes(b""), "it is empty"),
        ("w.safetensors", truncated, "damaged or cut short"),
        ("w.pth", cut_zip, "central directory"),
        ("w.pth", lambda path: path.write_bytes(b"<!doctype html>"), "torch.save did not write it"),
        ("w.safetensors", lambda path: path.write_bytes(b"<!doctype html>"), "damaged or cut short"),
        ("w.pth", lambda path: path.write_bytes(b"\x80"), "damaged or cut short"),
        ("w.pth", lambda path: torch.save([1], path), "no dict of weights"),
        ("w.pth", lambda path: torch.save(torch.zeros(3), path), "no dict of weights"),
        ("w.pth", lambda path: torch.save({"epoch": 1}, path), "other things than weights (epoch)"),
        ("w.pth", lambda path: torch.save({"state_dict": {}}, path), "other things than weights (nothing)"),
        ("w.pth", lambda path: torch.save({"state_dict": [1]}, path), "no dict of weights"),
        ("w.pth", lambda path: torch.save({"nose": torch.zeros(1)}, path), '"conv1.0.weight"'),
    ],
)
def test_files_that_hold_no_weights_for_the_model(tmp_path, name, make, reason):
    make(tmp_path / name)
    message = refused(lambda: start(tmp_path / name))
    assert message.startswith(f"--initial-checkpoint {tmp_path / name} does not fit test_resnet: ")
    assert reason in message
    assert len(message) < 1000


def test_what_does_not_fit_is_named(tmp_path):
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    weights["stray"] = weights.pop("fc.bias")
    weights["conv1.0.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "w.pth")
    message = refused(lambda: start(tmp_path / "w.pth"))
    assert 'Missing key(s) in state_dict: "fc.bias"' in message
    assert 'Unexpected key(s) in state_dict: "stray"' in message
    assert "size mismatch for conv1.0.weight" in message


@pytest.mark.parametrize("name", [VIT, "deit_tiny_distilled_patch16_224"])
def test_position_embeddings_are_resized_as_timm_does(tmp_path, name):
    from timm.layers import resample_abs_pos_embed

    saved = timm.create_model(name, num_classes=10, img_size=64)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = start(tmp_path / "w.pth", "--img-size", "96", model=name)
    assert model.pos_embed.shape[1] == 36 + model.num_prefix_tokens
    expected = resample_abs_pos_embed(
        saved.pos_embed, model.patch_embed.grid_size, saved.patch_embed.grid_size, model.num_prefix_tokens
    )
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=0)
    others = {key: value for key, value in saved.state_dict().items() if key != "pos_embed"}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items())


def test_both_classifiers_of_a_distilled_model_start_anew(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    saved = timm.create_model(name, num_classes=7, img_size=32)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    model = start(tmp_path / "w.pth", "--img-size", "32", model=name)
    assert model.head.weight.shape[0] == model.head_dist.weight.shape[0] == 10
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in saved.state_dict().items() if "head" not in key)


@pytest.mark.parametrize(("engine", "refuses"), [("FSDP", True), ("DEEPSPEED", False), (None, False)])
def test_channels_last_is_refused_where_weights_must_be_contiguous(monkeypatch, engine, refuses):
    from toolkit.builder.accelerator import check_engine

    for name in ("FSDP", "DEEPSPEED"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", str(name == engine).lower())
    with pytest.raises(ValueError, match="--channels-last is not offered with fsdp2") if refuses else nullcontext():
        check_engine(parse(["--data-dir", "x", "--channels-last"]))
