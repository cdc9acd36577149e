"""Files that need no code of ours: a model with its weights as ONNX, or as torch's pt2, each tried before it stays."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.run_model import difference
from toolkit.errors import blaming
from toolkit.files import replacing

# Largest difference from eager torch, as a part of the largest output: another library sums in another order.
LIMITS = {"onnx": 1e-4, "pt2": 1e-5}
_BATCH = ({0: torch.export.Dim.DYNAMIC},)


def write_format(kind: str, model: nn.Module, images: Tensor, path: Path) -> float:
    """Write a model, in eval mode, for batches of any size; returns how far its output is from torch's.

    Raises ValueError where a library is missing, the model cannot be exported, or the file says something else; then
    what was at `path` before is still there.
    """
    write = {"onnx": _write_onnx, "pt2": _write_pt2}[kind]
    with torch.no_grad(), replacing(path) as temporary:
        wanted, alone = model(images), model(images[:1])
        run = write(model, images, temporary)
        found = max(difference(wanted, run(images)), difference(alone, run(images[:1])))
        if not found <= LIMITS[kind]:
            raise ValueError(
                f"{path.name} is not written: it differs from the model by {found:.1e} of its output; "
                "use --format safetensors"
            )
    return found


def onnx_session(path: Path, threads: int | None = None) -> Any:
    """ONNX Runtime's session of a file on the CPU. Raises ValueError where the library is missing."""
    with _needs_export():
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its threads wait busily after a run, at the cost of whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _needs_export() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f'--format onnx needs {error.name}, which is not installed; pip install "adamwprune-toolkit[export]"'
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell their steps; what goes wrong they raise."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _two(images: Tensor) -> Tensor:
    """An example of a batch, which goes into the file with all of its storage: alone, and not of one image."""
    return images[:2].clone()


def write_onnx_file(model: nn.Module, images: Tensor, path: Path) -> None:
    """A model as ONNX, weights within, for batches of any size."""
    with _needs_export():
        import onnx  # noqa: F401  what torch's exporter needs, named here where it is missing
        import onnxscript  # noqa: F401
    with blaming("--format onnx", "use --format safetensors"), _quiet():
        program = torch.onnx.export(model, (_two(images),), dynamo=True, dynamic_shapes=_BATCH, verbose=False)
    assert program is not None
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> Any:
    write_onnx_file(model, images, path)
    session = onnx_session(path)
    (entry,) = session.get_inputs()
    return lambda batch: torch.from_numpy(session.run(None, {entry.name: batch.numpy()})[0])


def _write_pt2(model: nn.Module, images: Tensor, path: Path) -> Any:
    content = io.BytesIO()
    with blaming("--format pt2", "use --format safetensors"), _quiet():
        torch.export.save(torch.export.export(model, (_two(images),), dynamic_shapes=_BATCH), content)
    path.write_bytes(content.getvalue())
    return torch.export.load(io.BytesIO(path.read_bytes())).module()  # by a path it wants a name in .pt2
