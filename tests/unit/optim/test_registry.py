import argparse
import copy
from types import SimpleNamespace

import pytest
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.optim._optim_factory import OptimInfo, default_registry
from torch import nn

import toolkit.optim  # noqa: F401
from toolkit.optim.registry import check_optimizer_name, find_spec, register_all, resolve_name, specs

PRUNED = [spec.name for spec in specs() if spec.method != "none"]
OURS = [spec.name for spec in specs()]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)
    )


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step % 4)
        images = torch.randn(16, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 5, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def create(model, name, **options):
    pruning = {"sparsity": 0.7, "begin_step": 2, "end_step": 30, "frequency": 4} if name in PRUNED else {}
    return create_optimizer_v2(model, name, lr=5e-3, weight_decay=1e-3, **(pruning | options))


@pytest.mark.parametrize("name", OURS)
def test_every_name_learns_and_reaches_its_target(name):
    model = small_model()
    losses = train(model, create(model, name), 40)
    assert losses[-1] < losses[0]
    if name in PRUNED:
        weights = [p for p in model.parameters() if p.ndim > 1]
        wanted = int(0.7 * sum(p.numel() for p in weights))
        assert sum(int((p == 0).sum()) for p in weights) == wanted


@pytest.mark.parametrize("name", OURS)
def test_reload_then_step_equals_not_reloading(name):
    straight = small_model()
    train(straight, create(straight, name), 24)
    model = small_model()
    optimizer = create(model, name)
    train(model, optimizer, 13)
    again = create(model, name)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, again, 11, first=13)
    for a, b in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_options_are_visible_in_defaults(name):
    defaults = create(small_model(), name).defaults
    assert (defaults.get("pruning") or defaults)["end_step"] == 30


def test_names_are_in_timms_factory_with_descriptions():
    assert set(OURS) <= set(list_optimizers())
    assert all("_" not in name for name in OURS)
    for name in OURS:
        info = get_optimizer_info(name)
        assert info.description
        assert info.has_betas == ("sgd" not in name and "momentum" not in name)
    assert {"adamw-movement", "adamw-magnitude"} <= set(list_optimizers("adamw-*"))


def test_betas_and_eps_arrive():
    for name in ("adamwprune", "adamwspam", "adamwadv", "adamw-movement"):
        group = create(small_model(), name, betas=(0.7, 0.8), eps=1e-5).param_groups[0]
        assert group["betas"] == (0.7, 0.8)
        assert group["eps"] == 1e-5


def test_the_factory_as_timms_train_py_calls_it():
    args = SimpleNamespace(
        opt="adamwprune",
        lr=1e-2,
        weight_decay=0.05,
        momentum=0.9,
        opt_eps=None,
        opt_betas=[0.9, 0.99],
        opt_kwargs={"sparsity": 0.8, "end_step": 12, "frequency": 3},
    )
    model = small_model()
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]
    train(model, optimizer, 13)
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert sum(int((p == 0).sum()) for p in weights) == int(0.8 * sum(p.numel() for p in weights))


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamw-movement"])
def test_timms_scaler_ema_and_saver_as_its_train_py_uses_them(name, tmp_path):
    from timm.models import load_checkpoint, resume_checkpoint
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    def start():
        args = argparse.Namespace(
            model="small",
            opt=name,
            lr=1e-2,
            weight_decay=0.05,
            momentum=0.9,
            opt_eps=None,
            opt_betas=None,
            opt_kwargs={"sparsity": 0.8, "end_step": 12, "frequency": 3},
        )
        model = small_model()
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        return args, model, optimizer, NativeScaler(device="cpu"), ModelEmaV3(model, decay=0.5)

    def steps(model, optimizer, scaler, average, numbers):
        for number in numbers:
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            scaler(model(images).square().mean(), optimizer, clip_grad=1.0, parameters=model.parameters())
            average.update(model, step=number)

    args, model, optimizer, scaler, average = start()
    steps(model, optimizer, scaler, average, range(8))
    saver = CheckpointSaver(
        model, optimizer, args=args, model_ema=average, amp_scaler=scaler, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, 50.0)
    steps(model, optimizer, scaler, average, range(8, 14))
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert sum(int((p == 0).sum()) for p in weights) == int(0.8 * sum(p.numel() for p in weights))

    args, again, optimizer, scaler, average_again = start()
    resume_checkpoint(again, str(tmp_path / "last.pth.tar"), optimizer, scaler, log_info=False)
    load_checkpoint(average_again.module, str(tmp_path / "last.pth.tar"), use_ema=True)
    steps(again, optimizer, scaler, average_again, range(8, 14))
    for mine, wanted in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, wanted)
    for mine, wanted in zip(average_again.parameters(), average.parameters(), strict=True):
        assert torch.equal(mine, wanted)


def test_adam_and_adamwadv_variants_are_what_they_say():
    assert create(small_model(), "adam-state").defaults["decoupled_weight_decay"] is False
    assert create(small_model(), "adamwadv-state").defaults["amsgrad"] is True
    assert create(small_model(), "adamwadv").param_groups[0]["amsgrad"] is True
    assert find_spec("adamw-state").opt_class is find_spec("adamwprune").opt_class
    assert find_spec("adamwadv").recipe == {"clip_grad": 1.0, "sched": "cosine"}


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError):
        create(small_model(), "adamwprune", sparsness=0.5)
    with pytest.raises(TypeError):
        create(small_model(), "adamw-movement", sparsness=0.5)


def test_score_of_another_method_is_refused():
    with pytest.raises(ValueError, match="movement, displacement"):
        create(small_model(), "adamw-movement", score="magnitude")
    assert create(small_model(), "sgd-movement", score="displacement").defaults["pruning"]["score"] == "displacement"


def test_registering_twice_is_fine_and_foreign_names_stay():
    register_all()
    before = default_registry._optimizers["adamwspam"]
    default_registry._optimizers["adamwspam"] = OptimInfo("adamwspam", torch.optim.SGD, "somebody else's")
    try:
        with pytest.raises(ValueError, match="'adamwspam' is taken"):
            register_all()
    finally:
        default_registry._optimizers["adamwspam"] = before


@pytest.mark.parametrize(
    ("opt", "pruning", "wanted"),
    [
        ("adamw", None, ("adamw", "none")),
        ("adamw", "movement", ("adamw-movement", "movement")),
        ("adamw-movement", None, ("adamw-movement", "movement")),
        ("adamw-movement", "movement", ("adamw-movement", "movement")),
        ("adamw", "state", ("adamw-state", "state")),
        ("adamwprune", None, ("adamwprune", "state")),
        ("adamwprune", "state", ("adamwprune", "state")),
        ("adamwprune", "none", ("adamwprune", "none")),
        ("lion", None, ("lion", "none")),
        ("lookahead_adamw", "none", ("lookahead_adamw", "none")),
    ],
)
def test_opt_and_pruning_make_one_name(opt, pruning, wanted):
    assert resolve_name(opt, pruning) == wanted


@pytest.mark.parametrize(
    ("opt", "pruning", "words"),
    [
        ("adamwprune", "movement", "prunes by state"),
        ("adamw-movement", "magnitude", "prunes by movement"),
        ("sgd", "state", "choose one of adam, adamw, adamwadv, adamwspam"),
        ("lion", "movement", "not offered for --opt lion"),
    ],
)
def test_clashes_are_errors(opt, pruning, words):
    with pytest.raises(ValueError, match=words):
        resolve_name(opt, pruning)


@pytest.mark.parametrize("name", ["adamw_movement", "movement_adamw", "adamvv", "foo_adamw-movement", ""])
def test_names_that_timm_would_misread_are_refused(name):
    with pytest.raises(ValueError, match="is not known"):
        check_optimizer_name(name)


@pytest.mark.parametrize("name", ["adamw", "adamw-movement", "lookahead_adam", "lamb"])
def test_good_names_pass(name):
    check_optimizer_name(name)


def test_families_and_our_own_two():
    assert [spec.name for spec in specs() if spec.is_ours] == ["adamwprune", "sgdprune"]
    sgd = {spec.name for spec in specs() if spec.family == "SGD"}
    hooked = {f"{base}-{method}" for base in ("sgd", "momentum") for method in ("magnitude", "movement")}
    assert sgd == {"sgd", "momentum", "sgdprune"} | hooked
    assert all(spec.family == "Adam" and "adam" in spec.name for spec in specs() if spec.name not in sgd)
