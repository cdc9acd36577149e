"""A teacher: timm's equation, nothing else of a run touched, its bytes in the ledger, its flags' errors."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.task import LogitDistillationTask

from toolkit import train
from toolkit.builder.distill import Teacher, create_teacher
from toolkit.builder.model import create_model, train_loss
from toolkit.builder.predict import Prediction
from toolkit.cli import parse
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint

CLASSES = 10
RUN = ("--opt", "adamwprune", "--sparsity", "0.7", "--epochs", "2")


@pytest.fixture
def weights(tmp_path):
    """Of a test_vit for ten classes and 32 pixels."""
    torch.manual_seed(5)
    path = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("test_vit", num_classes=CLASSES, img_size=32).state_dict(), path)
    return str(path)


def taught(weights, *more):
    return [
        "--model",
        "test_resnet",
        "--img-size",
        "32",
        "--kd-model-name",
        "test_vit",
        "--kd-checkpoint",
        weights,
        *more,
    ]


@pytest.mark.parametrize(
    ("more", "arguments"),
    [
        ([], {}),
        (["--task-loss-weight", "0.3", "--kd-temperature", "2"], {"task_loss_weight": 0.3, "temperature": 2.0}),
        (["--distill-loss-weight", "0.7"], {"distill_loss_weight": 0.7}),
        (
            ["--distill-loss-weight", "2", "--task-loss-weight", "3", "--smoothing", "0"],
            {"distill_loss_weight": 2.0, "task_loss_weight": 3.0},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_loss_and_gradients_are_timms(weights, more, arguments):
    """With a teacher whose images are normalised otherwise than the model's."""
    config = parse(taught(weights, *more, "--model", "resnet10t", "--model-kwargs", "channels=[8,16,16,16]"))
    student = create_model(config, CLASSES)
    teacher = Teacher(config, CLASSES, student)
    assert student.pretrained_cfg["mean"] != teacher.module.pretrained_cfg["mean"]
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(CLASSES, (4,))
    theirs = LogitDistillationTask(
        student, teacher.module, train_loss(config), verbose=False, **{"temperature": 4.0, **arguments}
    )
    wanted = theirs(images, labels)["loss"]
    wanted.backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    same, targets = teacher.beside(lambda images, labels, *_: (images, labels))(images, labels, 0, 0)
    assert same is images
    loss = teacher.and_labels(train_loss(config))(student(images), targets)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def final_weights(folder):
    return load_checkpoint(newest_checkpoint(folder / "checkpoints"))["model"]


def test_a_teacher_without_weight_changes_no_bit(flags, weights, tmp_path):
    """It draws nothing from the run's generators, and its images are the model's: mixed, erased, in the same order."""
    more = [*flags, *RUN, "--mixup", "0.2", "--reprob", "0.5", "--drop", "0.1"]
    teaching = taught(weights)[4:]
    for name, flag in (("alone", []), ("unheard", [*teaching, "--distill-loss-weight", "0"]), ("taught", teaching)):
        assert train.main([*more, *flag, "--experiment", name]) == 0
    alone, unheard, heard = (final_weights(tmp_path / name) for name in ("alone", "unheard", "taught"))
    assert all(torch.equal(alone[key], unheard[key]) for key in alone)
    assert not all(torch.equal(alone[key], heard[key]) for key in alone)


def test_resumed_it_goes_on_as_if_never_stopped(flags, weights, tmp_path):
    more = [*flags, *RUN, *taught(weights)[4:]]
    assert train.main([*more, "--experiment", "whole"]) == 0
    first = tmp_path / "whole" / "checkpoints"
    assert train.main([*more, "--experiment", "again", "--resume", str(sorted(first.glob("step-*"))[0])]) == 0
    whole, again = final_weights(tmp_path / "whole"), final_weights(tmp_path / "again")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_its_bytes_are_a_row_predicted_to_the_byte(flags, weights, tmp_path):
    assert train.main([*flags, *RUN, *taught(weights)[4:], "--experiment", "r"]) == 0
    memory = json.loads((tmp_path / "r" / "memory.json").read_text())
    (row,) = [row for row in memory["ledger"]["rows"] if row["name"] == "teacher"]
    module = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert row == {"name": "teacher", "measured_bytes": size, "predicted_bytes": size}
    config = parse(taught(weights, *RUN, "-b", "16"))
    alone = Prediction(parse(["--model", "test_resnet", "--img-size", "32", *RUN, "-b", "16"]), CLASSES)
    for phase, rows in Prediction(config, CLASSES).ledgers(16).items():
        assert rows == alone.ledgers(16)[phase] | {"teacher": size}


def test_of_the_models_own_name_it_is_made_as_the_model(tmp_path):
    torch.manual_seed(1)
    kwargs = {"channels": [16, 32, 64, 128]}
    path = tmp_path / "dense.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=CLASSES, **kwargs).state_dict(), path)
    own = ["--kd-model-name", "resnet10t", "--kd-checkpoint", str(path), "--bn-eps", "1e-3", "--drop", "0.5"]
    config = parse(["--model", "resnet10t", "--model-kwargs", "channels=[16,32,64,128]", *own])
    teacher = create_teacher(config, CLASSES)
    assert sum(p.numel() for p in teacher.parameters()) < 400_000
    assert teacher.bn1.eps == 1e-3
    assert teacher.drop_rate == 0
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def error_status(argv):
    """Flags that contradict each other end by argparse's way out."""
    try:
        return train.main(argv)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--kd-model-name", "nosuch"], "--kd-model-name nosuch: --model nosuch is not a timm model"),
        (["--kd-model-name", "test_vit"], "timm's weights are for 1000 classes, the data has 10; give your own with"),
        (["--kd-checkpoint", "x"], "are a teacher's; name one with --kd-model-name"),
        (["--kd-model-name", "test_vit", "--kd-checkpoint", "nosuch"], "it does not exist; check the path"),
        (["--kd-model-name", "test_resnet", "--kd-checkpoint", "{weights}"], "does not fit test_resnet: "),
        (["--kd-model-name", "test_vit", "--kd-checkpoint", "{others}"], "its classifier is of other classes; train"),
        (["--kd-model-name", "test_vit", "--task-loss-weight", "1.5"], "leaves the teacher less than nothing"),
    ],
)
def test_what_cannot_teach_is_one_line(flags, weights, tmp_path, capsys, more, words):
    others = tmp_path / "others.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7, img_size=32).state_dict(), others)
    more = [one.format(weights=weights, others=others) for one in more]
    assert error_status([*flags, *more, "--experiment", "r"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in line
    assert not (tmp_path / "r").exists()
