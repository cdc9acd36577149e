"""One real run to be disturbed: its command, what it was doing when the blow fell, and what it has kept."""

import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from launch.start import ROOT, accelerate_launch, environment, installed
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint

PARTS = ("loading", "step", "mask update", "evaluation", "checkpoint")
# 20 s on two CPU ranks.
_FLAGS = shlex.split(
    "--model test_resnet --img-size 32 --global-batch-size 64 --epochs 4 --lr 3e-3 --warmup-epochs 0 "
    "--sched-on-updates --color-jitter 0 -j 1 --opt adamwprune --sparsity 0.7 --prune-frequency 3 "
    "--checkpoint-interval 5 --dist-timeout 120 --log-interval 5 --resume auto"
)
WAIT_S = 600

State = Mapping[str, torch.Tensor]


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers, moments and masks of the newest checkpoint, on CPU."""
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None, f"{folder} has no checkpoint"
    state = load_checkpoint(newest)
    return {
        **state["model"],
        **{f"{name}.{key}": value for name, kept in state["optimizer"]["state"].items() for key, value in kept.items()},
    }


class Trial:
    """A run named `name` below `out` on the shards in `data`, with its log beside it; `wanted` is how it must end."""

    def __init__(self, data: Path, out: Path, name: str, wanted: State | None = None) -> None:
        self.data, self.out, self.name, self.wanted = data, out, name, wanted or {}
        self.folder, self.log = out / name, out / f"{name}.log"
        self._parts = f"{name}.part"
        out.mkdir(parents=True, exist_ok=True)

    def command(self, *more: str, output: Path | None = None, restarts: int = 0) -> list[str]:
        """The run under `accelerate launch`; `more` flags of train.py override its own."""
        launcher = ("--max_restarts", str(restarts), "--monitor_interval", "1", "-m", "launch.chaos.traced_train")
        place = ("--data-dir", str(self.data), "--output", str(output or self.out), "--experiment", self.name)
        return installed(accelerate_launch(ROOT / "accelerate_configs" / "cpu.yaml", *launcher, *_FLAGS, *place, *more))

    @contextmanager
    def running(
        self, command: list[str], preexec_fn: Callable[[], object] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process of the trial; it ends with the block."""
        # One thread a rank, gloo on the loopback, and where the ranks say what they are doing.
        variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "VICTIM_PARTS": str(self.out / self._parts)}
        with open(self.log, "a") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(**variables),
                preexec_fn=preexec_fn,
            )
            try:
                yield process
            finally:
                process.kill()

    def run(self, command: list[str], preexec_fn: Callable[[], object] | None = None) -> int:
        """The exit status of a process of the trial."""
        with self.running(command, preexec_fn) as process:
            return process.wait(WAIT_S)

    def said(self, words: str) -> bool:
        """Whether the log has these words."""
        return words in self.log.read_text()

    def equal(self) -> bool:
        """Whether it ended with the tensors wanted, bit for bit."""
        mine = final_state(self.folder)
        return mine.keys() == self.wanted.keys() and all(torch.equal(mine[key], self.wanted[key]) for key in mine)

    def resumes(self) -> bool:
        """Whether the same command goes on to the end that is wanted."""
        return self.run(self.command()) == 0 and self.equal()

    def part_of(self, rank: int) -> str:
        """What a rank was doing last; loading where it has not said."""
        try:
            return (self.out / f"{self._parts}.{rank}").read_text() or "loading"
        except FileNotFoundError:
            return "loading"

    def await_ranks(self, process: subprocess.Popen[bytes]) -> dict[int, int]:
        """Wait until both ranks are there; rank -> process number."""
        ranks: dict[int, int] = {}
        while len(ranks) < 2 and process.poll() is None:
            time.sleep(0.05)
            ranks = _ranks_of(process.pid)
        return ranks

    def await_step(self, process: subprocess.Popen[bytes]) -> dict[int, int]:
        """Wait until both ranks train; rank -> process number."""
        while process.poll() is None and {self.part_of(rank) for rank in (0, 1)} == {"loading"}:
            time.sleep(0.05)
        time.sleep(1.0)
        return _ranks_of(process.pid)


def _ranks_of(launcher: int) -> dict[int, int]:
    """rank -> process number of the training processes below a launcher."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                facts = dict(part.split("=", 1) for part in (entry / "environ").read_text().split("\0") if "=" in part)
                if "RANK" in facts:
                    found[int(facts["RANK"])] = int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    return found
