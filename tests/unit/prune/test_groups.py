"""What is prunable, by layers in a model and by marks in an optimizer."""

import logging

import pytest
import torch
from ranks import run_ranks
from torch import nn

from toolkit.prune.groups import announce_unmarked, prunable_names, prunable_parameters, tied_names


class Conv1D(nn.Module):
    """As transformers' own: a linear layer with its weight transposed."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Language(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.bags = nn.EmbeddingBag(7, 4)
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.table = nn.Parameter(torch.randn(6, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.unequal = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.memory = nn.LSTM(4, 4)
        self.project = Conv1D(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)
        if tie:
            self.head.weight = self.tokens.weight


ATTENTION = {
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    *(f"unequal.{name}_proj_weight" for name in "qkv"),
    "unequal.out_proj.weight",
}


@pytest.fixture
def said(caplog):
    """Warnings of the toolkit's logger."""
    with caplog.at_level("WARNING", logger="toolkit"):
        yield caplog


def test_layers_decide_and_all_else_is_left_alone():
    assert prunable_names(Language(tie=False)) == ATTENTION | {"head.weight"}
    every = nn.Sequential(nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.BatchNorm2d(2), nn.Bilinear(2, 2, 2))
    assert prunable_names(every) == {"0.weight", "1.weight"}
    assert prunable_names(nn.Linear(2, 2)) == {"weight"}


def test_transformers_conv1d_is_known_by_its_name_and_module(monkeypatch):
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")

    class Derived(Conv1D):
        pass

    model = Language(tie=False)
    assert prunable_names(model) == ATTENTION | {"head.weight", "project.weight"}
    assert prunable_names(Derived(2, 2)) == {"weight"}


def test_gpt2s_layers_are_prunable_and_its_tables_are_not():
    transformers = pytest.importorskip("transformers", reason="not installed; requirements-dev.txt has it")
    config = transformers.GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert prunable_names(model) == {f"transformer.h.0.{layer}.weight" for layer in layers}
    assert tied_names(model) == {"lm_head.weight": "transformer.wte.weight"}


def test_a_head_tied_to_an_embedding_is_not_prunable():
    model = Language(tie=True)
    assert prunable_names(model) == ATTENTION
    assert tied_names(model) == {"head.weight": "tokens.weight"}
    assert tied_names(Language(tie=False)) == {}


def test_a_shared_weight_has_one_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert prunable_names(model) == {"0.weight"}


def test_marks_decide_where_there_are_any():
    first, second, bias = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4, 2), (3,)))
    marked = [{"params": [first, bias]}, {"params": [second], "prunable": True, "param_names": ["b"]}]
    assert [(name, id(p)) for name, p in prunable_parameters(marked)] == [("b", id(second))]
    plain = [{"params": [bias, first]}, {"params": [second]}]
    assert [name for name, _ in prunable_parameters(plain)] == [
        "parameter 1 of shape (2, 3)",
        "parameter 2 of shape (4, 2)",
    ]


def groups_of(named=True):
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    parameters = model.named_parameters() if named else model.parameters()
    return torch.optim.AdamW(parameters).param_groups


def test_unmarked_groups_are_announced_by_name_and_number(said):
    announce_unmarked(groups_of())
    announce_unmarked(groups_of(named=False))
    named, unnamed = said.messages
    assert "144 weights in 0.weight, 1.weight; toolkit.optim.param_groups(model)" in named
    assert "144 weights in parameter 0 of shape (10, 8), parameter 1 of shape (8, 8);" in unnamed


def test_many_are_announced_in_one_short_line(said):
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(30)]
    announce_unmarked([{"params": weights, "param_names": [f"w{i}" for i in range(30)]}])
    (line,) = said.messages
    assert "120 weights in w0, w1, w2, w3, w4, w5, w6, w7 and 22 more;" in line


def test_marked_groups_are_not_announced(said):
    announce_unmarked([{**group, "prunable": True} for group in groups_of()])
    assert said.messages == []


def _warnings(rank):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("toolkit").addHandler(handler)
    announce_unmarked(groups_of())
    return lines


def test_one_rank_announces():
    assert [len(lines) for lines in run_ranks(_warnings, 2)] == [1, 0]
