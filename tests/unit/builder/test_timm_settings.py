"""What timm's flags do to model, batches, loss and schedule: the same as timm's train.py makes of them."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_model import refused
from timm.loss import BinaryCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from toolkit.builder.data import input_settings, to_inputs, train_transform
from toolkit.builder.model import compile_model, create_model, train_loss
from toolkit.builder.optimizer import create_optimizer, create_schedule, pruning_schedule, total_epochs
from toolkit.cli import parse
from toolkit.data.decode import TrainTransform, sample_generator
from toolkit.data.loader import Batch
from toolkit.prune.groups import prunable_names
from toolkit.prune.schedule import Schedule


def model_of(*argv, model="test_resnet"):
    return create_model(parse(["--model", model, *argv]), 10)


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(mine == its and torch.equal(a, b) for (mine, a), (its, b) in pairs)


def test_batchnorm_and_arguments_are_timms():
    torch.manual_seed(0)
    flags = ["--bn-eps", "1e-3", "--bn-momentum", "0.02", "--gp", "max", "--drop-path", "0.1"]
    ours = model_of(*flags, model="test_efficientnet")
    torch.manual_seed(0)
    options = {"bn_eps": 1e-3, "bn_momentum": 0.02, "global_pool": "max", "drop_path_rate": 0.1, "drop_rate": 0.0}
    theirs = timm.create_model("test_efficientnet", num_classes=10, **options)
    assert same_weights(ours, theirs)
    norms = [[m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (ours, theirs)]
    assert [(m.eps, m.momentum) for m in norms[0]] == [(m.eps, m.momentum) for m in norms[1]]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("flags", [[], ["--fast-norm"]], ids=" ".join)
def test_norms_are_fast_where_it_is_asked_for(flags):
    norms = [
        module._fast_norm for module in model_of(*flags, model="test_vit").modules() if hasattr(module, "_fast_norm")
    ]
    assert norms
    assert set(norms) == {bool(flags)}


def test_the_classifiers_start():
    torch.manual_seed(0)
    plain = model_of()
    torch.manual_seed(0)
    started = model_of("--head-init-scale", "0.5", "--head-init-bias", "-2")
    assert torch.equal(started.fc.weight, 0.5 * plain.fc.weight)
    assert started.fc.bias.tolist() == [-2.0] * 10


@pytest.mark.parametrize(
    ("model", "argv", "words"),
    [
        ("test_vit", ["--bn-eps", "1e-3"], "--bn-momentum and --bn-eps: test_vit has no BatchNorm"),
        ("deit_tiny_distilled_patch16_224", ["--head-init-bias", "0"], "has no single linear classifier"),
        ("test_resnet", ["--gp", "nosuch"], "--model test_resnet --gp nosuch: "),
        ("test_vit", ["--drop-block", "0.1"], "--model test_vit --drop-block 0.1: "),
        ("test_vit", ["--input-size", "3", "3", "3"], "--input-size [3, 3, 3] does not suit test_vit"),
    ],
)
def test_what_a_model_does_not_take(model, argv, words):
    assert words in refused(lambda: model_of(*argv, model=model))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_grey_images_of_any_shape(name):
    config = parse(["--model", name, "--input-size", "1", "32", "48"])
    model = create_model(config, 10)
    inputs = input_settings(config, model)
    assert inputs["input_size"] == (1, 32, 48)
    assert inputs["mean"] == (sum(model.pretrained_cfg["mean"]) / 3,)
    colours = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8))
    grey = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in colours.numpy()])
    batch = Batch(colours.permute(0, 3, 1, 2), torch.zeros(4), torch.ones(4), torch.zeros(4), 0)
    images, _ = to_inputs(inputs, model, channels_last=True)(batch)
    wanted = (torch.from_numpy(grey).unsqueeze(1) / 255 - inputs["mean"][0]) / inputs["std"][0]
    assert (images - wanted).abs().max() <= 0.51 / 255 / inputs["std"][0]  # PIL rounds
    assert model(images).shape == (4, 10)


def test_one_number_is_the_mean_of_all_channels():
    config = parse(["--model", "test_resnet", "--mean", "0.4", "--std", "0.2"])
    inputs = input_settings(config, create_model(config, 10))
    assert (inputs["mean"], inputs["std"]) == ((0.4,) * 3, (0.2,) * 3)


INPUTS = {"input_size": (3, 24, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    "argv",
    [
        ["--grayscale-prob", "1"],
        ["--gaussian-blur-prob", "1"],
        ["--train-crop-mode", "rkrc"],
        ["--color-jitter-prob", "1"],
    ],
    ids=" ".join,
)
def test_timms_transforms_are_taken_where_they_are_asked_for(argv):
    plain = ["--color-jitter", "0", "--hflip", "0", "--scale", "1", "1"]
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    fast = train_transform(parse(plain), INPUTS)
    assert isinstance(fast, TrainTransform)
    made = train_transform(parse([*plain, *argv]), INPUTS)(image, sample_generator(0, 0, 0))
    assert made.shape == (3, 24, 16)
    if argv[0] == "--grayscale-prob":
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2])


def test_bce_is_timms():
    scores, labels = torch.randn(4, 10), torch.arange(4)
    loss = train_loss(parse(["--bce-loss", "--bce-sum", "--bce-pos-weight", "3", "--smoothing", "0.2"]))
    wanted = BinaryCrossEntropy(smoothing=0.2, sum_classes=True, pos_weight=3.0)
    assert torch.equal(loss(scores, labels), wanted(scores, labels))


def test_a_compilers_mode(monkeypatch):
    with pytest.raises(SystemExit):
        parse(["--torchcompile", "eager", "--torchcompile-mode", "max-autotune"])
    config = parse(["--torchcompile", "--torchcompile-mode", "reduce-overhead"])
    assert isinstance(compile_model(nn.Linear(1, 1), config), torch._dynamo.OptimizedModule)
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options))
    compile_model(nn.Linear(1, 1), config)
    assert asked == [{"backend": "inductor", "mode": "reduce-overhead"}]


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--sched", "wsd", "--decay-epochs", "0.5"], {"sched": "wsd", "decay_epochs": 0.5}),
        (
            ["--sched", "rsqrt", "--decay-epochs", "3", "--lr-decay-fn", "cosine", "--lr-stable-timescale", "2"],
            {"sched": "rsqrt", "decay_epochs": 3.0, "decay_fn": "cosine", "stable_timescale": 2.0},
        ),
        (["--sched", "constant"], {"sched": "constant"}),
        (
            ["--lr-cycle-limit", "2", "--lr-cycle-mul", "1.5", "--lr-cycle-decay", "0.7", "--lr-k-decay", "0.8"],
            {"cycle_limit": 2, "cycle_mul": 1.5, "cycle_decay": 0.7, "k_decay": 0.8},
        ),
        (
            ["--lr-noise", "0.4", "0.9", "--lr-noise-pct", "0.3", "--lr-noise-std", "0.5"],
            {"noise": [0.4, 0.9], "noise_pct": 0.3, "noise_std": 0.5},
        ),
        (["--sched", "poly", "--dr", "2"], {"sched": "poly", "decay_rate": 2.0}),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, list) else "",
)
def test_schedules_are_timms(argv, options):
    config = parse(["--epochs", "8", "--warmup-epochs", "2", *argv])
    ours, theirs = (torch.optim.SGD([torch.zeros(1)], lr=1.0) for _ in range(2))
    schedule, epochs = create_schedule(config, ours, 5)
    wanted, count = create_scheduler_v2(theirs, num_epochs=8, warmup_epochs=2, updates_per_epoch=5, **options)
    assert total_epochs(config, 5) == epochs == count
    for epoch in range(1, epochs):
        schedule.step(epoch)
        wanted.step(epoch)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_a_schedule_that_does_not_fit_is_one_line():
    config = parse(["--sched", "wsd", "--epochs", "8", "--warmup-epochs", "2"])
    assert refused(lambda: total_epochs(config, 5)).startswith("--sched wsd: wsd schedule requires 0 < decay_epochs")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_layer_decay_is_timms_and_keeps_the_marks(name):
    flags = ["--layer-decay", "0.5", "--layer-decay-min-scale", "0.1", "--layer-decay-no-opt-scale", "0.2"]
    config = parse(["--model", name, "--opt", "adamwprune", "--sparsity", "0.7", "--weight-decay", "0.3", *flags])
    model = create_model(config, 10)
    optimizer = create_optimizer(config, model, "adamwprune", 0.1, Schedule(0.7, 0, 3, 1))
    twin = create_model(parse(["--model", name]), 10)
    exempt = twin.no_weight_decay() if hasattr(twin, "no_weight_decay") else ()
    theirs = param_groups_layer_decay(
        twin, 0.3, no_weight_decay_list=exempt, layer_decay=0.5, min_scale=0.1, no_opt_scale=0.2
    )
    names = {parameter: key for key, parameter in twin.named_parameters()}
    wanted = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    got = {key: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for key in g["param_names"]}
    assert got == wanted
    assert len({scale for scale, _ in got.values()}) > 1
    assert set(got) < {key for key, _ in model.named_parameters()}  # some layers are frozen
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(got)
    marked = {key for group in optimizer.param_groups if group["prunable"] for key in group["param_names"]}
    assert marked == prunable_names(model) & set(got)
    images = torch.randn(2, *input_settings(config, model)["input_size"])
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    weights = sum(p.numel() for key, p in model.named_parameters() if key in marked)
    assert optimizer.pruning.sparsity() == (int(0.7 * weights), weights)


def test_layer_decay_needs_a_schedule():
    with pytest.raises(SystemExit):
        parse(["--layer-decay", "0.5", "--sched", "none"])


def test_foreach_goes_to_torch():
    config = parse(["--opt", "adamw", "--no-opt-foreach"])
    assert create_optimizer(config, nn.Linear(2, 2), "adamw", 0.1, Schedule()).defaults["foreach"] is False
    config = parse(["--opt", "adamwprune", "--opt-foreach", "--sparsity", "0"])
    message = refused(lambda: create_optimizer(config, nn.Linear(2, 2), "adamwprune", 0.1, Schedule()))
    assert "'foreach' is no option" in message


@pytest.mark.parametrize(
    ("flags", "told"), [([], True), (["--warmup-epochs", "2"], False), (["--warmup-prefix"], False)]
)
def test_a_warm_up_that_is_as_long_as_the_run_is_told(flags, told, caplog):
    with caplog.at_level("INFO", logger="toolkit"):
        total_epochs(parse(["--opt", "adamw", "--epochs", "5", *flags]), 10)
    assert ("does not get to --lr" in caplog.text) is told


@pytest.mark.parametrize(("steps", "told"), [(60, True), (120, False)])
def test_a_ramp_of_one_update_is_told(steps, told, caplog):
    """The ramp is from 5 to 60 % of the run, with an update every 50 steps."""
    config = parse(["--opt", "adamwprune", "--sparsity", "0.7"])
    with caplog.at_level("INFO", logger="toolkit"):
        schedule = pruning_schedule(config, "state", steps)
    later = range(schedule.begin_step + 1, steps + 1)  # the first update takes none
    assert sum(map(schedule.is_update_step, later)) == (1 if told else 2)
    assert ("the masks change once" in caplog.text) is told
