"""Private names of other libraries: each is looked for, the code uses no other, and docs/upstream.md lists them all."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from docs_text import table_after

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "upstream.md"
FOLDERS = ("toolkit", "launch", "shards", "examples")

_ZERO = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer."
_ZERO3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3."
_FSDP = "torch.distributed.fsdp._fully_shard."

NAMES = (
    "torch._fused_adamw_",
    "torch._fused_adam_",
    "torch._fused_sgd_",
    "torch._foreach_mul_",
    "torch._foreach_norm",
    "torch._foreach_copy_",
    "torch._C._cuda_clearCublasWorkspaces",
    "torch._C._current_graph_task_id",
    "torch.UntypedStorage._new_shared",
    "torch.UntypedStorage._cdata",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
    "torch.nn.Module._parameters",
    "torch.nn.Module._buffers",
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    "torch.autograd.graph.Node._input_metadata",
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch._dynamo.OptimizedModule._orig_mod",
    "torch.utils.data.DataLoader._iterator",
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._workers",
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state",
    f"{_FSDP}_fsdp_state.FSDPState._fsdp_param_group",
    f"{_FSDP}_fsdp_state.FSDPState._auto_reshard_after_forward",
    f"{_FSDP}_fsdp_param_group.FSDPParamGroup._reshard_after_forward",
    f"{_FSDP}_fsdp_param.FSDPParam._orig_size",
    "timm.optim._optim_factory.OptimInfo",
    "timm.optim._optim_factory.default_registry",
    "timm.optim.lookahead.Lookahead._base_optimizer",
    "accelerate.PartialState._shared_state",
    "accelerate.utils.DeepSpeedPlugin.set_deepspeed_weakref",
    "deepspeed.ops.__compatible_ops__",
    f"{_ZERO}single_partition_of_fp32_groups",
    f"{_ZERO}round_robin_bit16_groups",
    f"{_ZERO}bit16_groups_flat",
    f"{_ZERO}refresh_fp32_params",
    f"{_ZERO}averaged_gradients",
    f"{_ZERO3}fp32_partitioned_groups_flat",
    f"{_ZERO3}fp16_groups",
    f"{_ZERO3}refresh_fp32_params",
    f"{_ZERO3}averaged_gradients",
    "deepspeed.runtime.zero.partition_parameters.ds_numel",
    "deepspeed.runtime.zero.partition_parameters.ds_shape",
    "deepspeed.runtime.zero.partition_parameters.partition_numel",
    "deepspeed.utils.mixed_precision_linkage._hp_mapping",
    "deepspeed.utils.tensor_fragment.tensor_fragment.optim_fragment",
)


def _is_there(name):
    """Whether a module, class or object has the name, or gives it to what it makes."""
    module, rest = name, []
    while True:
        try:
            owner = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    *between, last = rest
    for part in between:
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    if hasattr(owner, last) or last in getattr(owner, "__annotations__", {}):
        return True
    if not (inspect.isclass(owner) or inspect.ismodule(owner)):
        return False
    return re.search(rf"\.{last}\s*(:[^=\n]*)?=[^=]", inspect.getsource(owner)) is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there(name):
    if name.startswith("deepspeed."):
        pytest.importorskip("deepspeed")
    if name.startswith("torch._C._cuda_") and not torch.backends.cuda.is_built():
        pytest.skip("torch is built without CUDA or ROCm")
    assert _is_there(name), f"{name} is gone; docs/upstream.md says where it is used, and for what"


@pytest.mark.parametrize(
    "name",
    [
        "torch._no_such_update_",
        "torch.nn.Module._no_such",
        "torch.nn.modules.no_such._ConvNd",
        "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._no_such",
        "timm.optim._no_such.OptimInfo",
    ],
)
def test_a_name_that_is_gone_is_noticed(name):
    assert not _is_there(name)


def _sources():
    return [ROOT / "train.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def _defined(tree):
    """Names that a file gives: functions, classes, variables, attributes of its own objects, arguments, modules."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _used(tree):
    """Private names that a file takes: attributes, imports, and strings given to getattr and hasattr."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found += [part for alias in node.names for part in (*(node.module or "").split("."), alias.name)]
        elif isinstance(node, ast.Import):
            found += [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            found += [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_the_code_uses_no_other():
    trees = {path: ast.parse(path.read_text()) for path in _sources()}
    own = {name for tree in trees.values() for name in _defined(tree)}
    known = {part for name in NAMES for part in name.split(".")}
    for path, tree in trees.items():
        strange = sorted(_used(tree) - own - known)
        assert not strange, f"{path.relative_to(ROOT)} uses {strange}; add it to NAMES here and to docs/upstream.md"


def test_the_page_lists_exactly_these():
    rows = table_after(PAGE.read_text(), "names")
    assert [row[0].strip("`") for row in rows] == list(NAMES)


def test_the_page_says_where_each_is_used():
    for name, places, purpose, tests in table_after(PAGE.read_text(), "names"):
        last = name.strip("`").rpartition(".")[2]
        for place in re.findall(r"`([^`]+)`", places):
            path = ROOT / place
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
            assert any(re.search(rf"\b{last}\b", file.read_text()) for file in files), f"{place} does not use {last}"
        assert purpose
        assert all((ROOT / test).is_file() for test in re.findall(r"`([^`]+)`", tests)), tests
