"""Runs a function on several forked gloo ranks: 0.4 s, where spawning takes 20 s."""

import io
import multiprocessing
import os
import socket
import sys
import time
import traceback

import torch
import torch.distributed as dist


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def reset_accelerate():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def _import_once():
    """What every rank would import for itself when it builds its run: half a second, with DeepSpeed three."""
    import torch.utils.tensorboard

    if "deepspeed" in sys.modules:  # its engine imports an optimizer whose functions are compiled when called
        torch.compile(torch.neg)  # compiles nothing yet, but loads the compiler


def _context():
    """How ranks are begun: forked, or where there is a GPU spawned, for its driver does not outlive a fork."""
    return multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def _become(rank, num_ranks, port):
    """Make this forked process a rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",  # Accelerate would set the number of threads again
    }
    torch.set_num_threads(1)  # a forked process must not use its parent's thread pool
    reset_accelerate()


def _child(function, rank, num_ranks, port, arguments, join_group, results):
    _become(rank, num_ranks, port)
    try:
        if join_group:
            dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
        # As bytes: a tensor in a queue is a file descriptor of a process that is about to end.
        buffer = io.BytesIO()
        torch.save(function(rank, *arguments), buffer)
        results.put((rank, "ok", buffer.getvalue()))
    except BaseException:
        results.put((rank, "error", traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)


def run_ranks(function, num_ranks, *arguments, join_group=True, timeout_s=120):
    """`function(rank, *arguments)` on each rank; returns the results by rank, raises what a rank raised."""
    _import_once()
    context = _context()
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_child, args=(function, rank, num_ranks, port, arguments, join_group, results))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in processes:
            rank, outcome, value = results.get(timeout=timeout_s)
            if outcome == "error":
                raise AssertionError(f"rank {rank}:\n{value}")
            found[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(5 if len(found) == num_ranks else 0)
            process.kill()
    return [found[rank] for rank in range(num_ranks)]


def _mortal(function, rank, num_ranks, port, arguments):
    _become(rank, num_ranks, port)
    status = 1
    try:
        function(rank, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def exit_codes(function, num_ranks, *arguments, timeout_s=90, hanging=()):
    """`function(rank, *arguments)` on ranks that may die: each one's exit code, 0 where the function returned.

    The ranks of `hanging` are killed as soon as the others have ended.
    """
    _import_once()
    context, port = _context(), free_port()
    processes = [
        context.Process(target=_mortal, args=(function, rank, num_ranks, port, arguments)) for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    for rank in sorted(range(num_ranks), key=lambda rank: rank in hanging):
        processes[rank].join(0.0 if rank in hanging else max(0.0, deadline - time.monotonic()))
        processes[rank].kill()
        processes[rank].join()
    return [process.exitcode for process in processes]
