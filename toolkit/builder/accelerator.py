"""The engine that the launcher's YAML asks for: DDP, FSDP2 or DeepSpeed's ZeRO, all through Accelerate.

Mixed precision, accumulation and clipping are train.py's flags; a YAML that says otherwise is refused, for two places
that both decide are a trap.
"""

import datetime
import os
import sys
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer

from toolkit.builder.model import amp_dtype, compile_model
from toolkit.config import Config
from toolkit.dist import World
from toolkit.engine.engines.ddp import Engine
from toolkit.engine.engines.fsdp2 import Fsdp2Engine
from toolkit.engine.engines.fused import FusedEngine
from toolkit.engine.engines.zero import ZeroEngine, attach, inner_of
from toolkit.errors import refuse
from toolkit.optim.registry import find_spec
from toolkit.process import keep_freed_memory

_TORCH_PAGE = "https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html"
_DEEPSPEED_PAGE = "https://deepspeed.readthedocs.io/en/latest/zero3.html"


def launched_engine() -> str:
    """ddp, fsdp2 or deepspeed, by the launcher's environment."""
    for name, engine in (("DEEPSPEED", "deepspeed"), ("FSDP", "fsdp2")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            return engine
    return "ddp"


def check_engine(config: Config) -> None:
    """Raise ValueError where the YAML says otherwise than the flags, or the engine lacks what a flag asks for."""
    _check_launch_file(config)
    engine = launched_engine()
    one_part = f"it prunes one part of all layers, whose slices are cut as one, {_DEEPSPEED_PAGE}"
    lacking = {  # flag -> why an engine that splits weights cannot; docs/engines.md has the table
        "--fused-backward": (config.fused_backward, "gradients are summed over ranks before the update"),
        "--prune-shrink": (config.prune_shrink, "its shards keep the shapes they were cut with"),
        "--model-dtype bfloat16": (
            engine == "deepspeed" and config.model_dtype == "bfloat16",
            f"it trains float32 copies and rounds those to the nearest, {_DEEPSPEED_PAGE}",
        ),
        "--channels-last": (
            engine == "fsdp2" and config.channels_last,
            f"fully_shard splits contiguous weights only, {_TORCH_PAGE}",
        ),
        f"--prune-pattern {config.prune_pattern}": (
            engine == "deepspeed" and config.prune_pattern != "weight",
            f"its slices cut groups and channels, {_DEEPSPEED_PAGE}",
        ),
        f"--prune-scope {config.prune_scope}": (
            engine == "deepspeed" and config.prune_scope != "global",
            f"its slices hold parts of many layers, {_DEEPSPEED_PAGE}",
        ),
        "--layer-decay with --sparsity": (
            engine == "deepspeed" and config.layer_decay is not None and bool(config.sparsity),
            one_part,
        ),
        "--prune-config with more than skip": (
            engine == "deepspeed" and any(rule != "skip" for rule in (config.prune_config or {}).values()),
            one_part,
        ),
    }
    if engine != "ddp":
        remedy = "leave it out, or launch with accelerate_configs/multi_gpu.yaml (DDP)"
        refuse(
            {
                f"{flag} is not offered with {engine}: {reason}; {remedy}": asked
                for flag, (asked, reason) in lacking.items()
            }
        )


def _check_launch_file(config: Config) -> None:
    """Raise ValueError where the launch file sets what is train.py's flag, and sets it otherwise."""
    said = {
        "mixed_precision": (os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "no", config.mixed_precision, "--amp"),
        "gradient_accumulation_steps": (
            os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
            "1",
            str(config.grad_accum_steps),
            "--grad-accum-steps",
        ),
        "gradient_clipping": (
            os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none"),
            "none",
            str(config.clip_grad),
            "--clip-grad",
        ),
    }
    refuse(
        {
            f"the launch file says {key}: {value}, {name} says {flag}; leave {key} out of the file": (
                value not in (neutral, flag)
            )
            for key, (value, neutral, flag, name) in said.items()
        }
    )


def stay_on_this_host() -> None:
    """Keep gloo's connections off the network where all ranks are on this host; otherwise it asks the host's name."""
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _join_after_restart(backend: str, timeout: datetime.timedelta) -> None:
    """Join the group under a name of its own where --max_restarts has started this rank again.

    Accelerate's launcher keeps one store over all restarts, and torch puts the ranks' addresses into it under the same
    names each time: a rank that reads before the other has written connects to a dead one. (In a first trial a killed
    rank took three restarts, and with them the run.)
    """
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if count and not torch.distributed.is_initialized():
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout)
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore(f"restart_{count}", store),
            timeout=timeout,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def _join(config: Config) -> Accelerator:
    """Join the process group by the engine's way.

    The loop's own autocast makes the mixed precision (weights stay float32): one meaning of --amp for all engines.
    """
    on_cpu, engine = not torch.cuda.is_available(), launched_engine()
    timeout = datetime.timedelta(seconds=config.dist_timeout)
    stay_on_this_host()
    backend = "gloo" if on_cpu else "nccl"
    _join_after_restart(backend, timeout)
    if engine == "ddp":
        return Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            # Without the view DDP keeps a second copy of all gradients.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timeout),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # what its plugins read
    if engine == "fsdp2":
        if on_cpu:  # Accelerate offers FSDP to accelerators only, and would silently shard nothing
            PartialState(backend="gloo", timeout=timeout)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        return Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
    return Accelerator(
        mixed_precision="no",
        deepspeed_plugin=_deepspeed_plugin(config, on_cpu),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
    )


def _deepspeed_plugin(config: Config, on_cpu: bool) -> Any:
    """Accelerate's plugin, which reads the YAML, without its need for transformers."""
    import deepspeed
    from accelerate.utils import DeepSpeedPlugin

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Tells transformers about ZeRO-3; there is none here."""

    if on_cpu:  # two minutes of compiling on first use, for a collective that gloo has
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = Plugin()
    plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=config.batch_size,  # it only counts with it
        gradient_accumulation_steps=1,  # the loop says at which micro-batch the update is
        gradient_clipping=0.0,  # the engine's, in float64
        zero_force_ds_cpu_optimizer=False,  # or offloading would replace our optimizer by DeepSpeed's
        steps_per_print=2**31,
    )
    return plugin


def _check_device(config: Config) -> None:
    """Raise ValueError for what this machine cannot do, whatever the engine."""
    on_cpu, several = not torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    refuse(
        {
            "--amp fp16 needs a GPU; on CPU use --amp bf16": on_cpu and config.mixed_precision == "fp16",
            "--sync-bn needs GPUs, torch's SyncBatchNorm has no CPU kernel; leave it out": (
                on_cpu and several and config.sync_bn
            ),
        }
    )


def create_accelerator(config: Config) -> Accelerator:
    """Join the process group. Raises ValueError where Accelerate did not take all processes the launcher started."""
    check_engine(config)
    _check_device(config)
    accelerator = _join(config)
    if config.mixed_precision == "fp16":  # before the optimizer is wrapped, which steps through it
        kind = GradScaler if launched_engine() == "ddp" else ShardedGradScaler
        accelerator.scaler = kind(accelerator.device.type)
    expected, found = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    refuse(
        {
            # accelerate launch --cpu --num_processes 2, or distributed_type MULTI_CPU
            "was asked for several processes but started one; use --config_file accelerate_configs/cpu.yaml": (
                "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ
            ),
            f"started {expected} processes but Accelerate sees {found}; start with accelerate launch --config_file "
            "accelerate_configs/<machine>.yaml": found != expected,
        },
        "the launcher {}",
    )
    if accelerator.device.type == "cuda":  # as timm's train.py sets them
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def create_engine(
    config: Config,
    opt: str,
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Optimizer,
    world: World,
) -> Engine:
    """The engine around a placed model and its optimizer. Raises ValueError where it cannot train these."""
    if config.channels_last and launched_engine() == "deepspeed":
        # DeepSpeed sends weights round as plain bytes and keeps them in flat buffers: images alone have the layout.
        module.to(memory_format=torch.contiguous_format)
    refuse(
        {
            f"--model-dtype bfloat16 is not offered with fsdp2 for {config.model}: fully_shard takes weights of one "
            f"dtype, {_TORCH_PAGE}, and BatchNorm stays float32; leave it out, or launch with "
            "accelerate_configs/multi_gpu.yaml (DDP)": (
                launched_engine() == "fsdp2" and len({weight.dtype for weight in module.parameters()}) > 1
            )
        }
    )
    model, wrapped = accelerator.prepare(module, optimizer)
    compiled = compile_model(model, config)
    kind: type[Engine] = Engine
    if accelerator.distributed_type == DistributedType.FSDP:
        kind = Fsdp2Engine
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        kind, inner = ZeroEngine, inner_of(wrapped)
        assert inner is optimizer, f"DeepSpeed runs {type(inner).__name__} instead of {type(optimizer).__name__}"
        stage = model.zero_optimization_stage()
        refuse(
            {
                "zero_stage: 0 is plain DDP; launch with accelerate_configs/multi_gpu.yaml": stage == 0,
                # 8 steps of a tiny ViT did not end in 8 minutes.
                "--torchcompile is not offered with ZeRO-3: it gathers weights layer by layer in hooks; what lies "
                f"between them is compiled over and over, {_DEEPSPEED_PAGE}; leave it out, or launch with "
                "accelerate_configs/deepspeed_zero2.yaml": stage == 3 and config.torchcompile,
            }
        )
        attach(model)
    elif config.fused_backward:
        kind = FusedEngine
        _check_fused_backward(config, opt, world)
    return kind(
        accelerator,
        compiled,
        module,
        wrapped,
        optimizer,
        world,
        amp_dtype=amp_dtype(config),
        clip_grad=config.clip_grad,
        clip_mode=config.clip_mode,
    )


def _check_fused_backward(config: Config, opt: str, world: World) -> None:
    """Raise ValueError, with the reason, where --fused-backward cannot be."""
    reasons = {
        f"{world.num_ranks} ranks: gradients are summed over the ranks before the update": world.num_ranks > 1,
        f"--grad-accum-steps {config.grad_accum_steps}: gradients must outlive backward": config.grad_accum_steps > 1,
        f"--clip-grad {config.clip_grad}: clipping needs all gradients before the first update": config.clip_grad,
        "--amp fp16: the scaler looks at all gradients before the first update": config.mixed_precision == "fp16",
        "--torchcompile: it was not tried": config.torchcompile,
        f"--opt {opt}: it may look at all gradients together; see python -m toolkit.optim --list": not find_spec(opt),
    }
    refuse(reasons, "--fused-backward does not go with {}; leave one of them out")
