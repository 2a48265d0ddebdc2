"""A finished run's network in the formats that other programs read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from granet.evaluate import load_run
from granet.files import write_atomically
from granet.run import LAST, RunFolder, write_weights


def export_run(path: Path, format: str, output: Path | None = None, weights: str = LAST) -> Path:
    """Write a run's trained network.

    Args:
        path: the run folder.
        format: "dense": a state_dict for torch.load(weights_only=True); "safetensors": the same tensors; "csr":
            safetensors with KEY.crow_indices, KEY.col_indices and KEY.values of each sparse weight, whose rows are its
            first dimension and whose shape is in the metadata `shapes`, and every other tensor as it is; "onnx".
        output: the file; by default PATH/export.SUFFIX.
        weights: "model" for the last epoch, "best" for the best validation accuracy.
    Returns:
        The file.
    Raises:
        ValueError: unknown format; damaged weights; onnx is not installed.
        FileNotFoundError: there is no finished run, or output's folder is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    RunFolder(path).load_config()
    write, suffix = FORMATS[format]
    target = output or path / f"export{suffix}"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} in")
    write(path, weights, target)
    return target


def _dense(path: Path, weights: str, target: Path) -> None:
    state = RunFolder(path).load_weights(f"{weights}.safetensors")
    write_atomically(target, lambda file: torch.save(state, file))


def _safetensors(path: Path, weights: str, target: Path) -> None:
    write_weights(target, RunFolder(path).load_weights(f"{weights}.safetensors"), {"format": "pt"})


def _csr(path: Path, weights: str, target: Path) -> None:
    folder = RunFolder(path)
    state = folder.load_weights(f"{weights}.safetensors")
    masks = folder.load_masks(f"{weights}-masks.safetensors")
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        if name in masks:
            tensors.update({f"{name}.{part}": value for part, value in csr(tensor, masks[name]).items()})
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor
    write_weights(target, tensors, {"shapes": json.dumps(shapes)})


def csr(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """A weight's kept positions, zeros among them included, in compressed sparse rows.

    Args:
        weight: (rows, ...) any floating dtype; the other dimensions are seen as one of columns.
        mask: of the weight's shape, True = kept.
    Returns:
        crow_indices (rows + 1,) int32, col_indices (nnz,) int32 and values (nnz,), for torch.sparse_csr_tensor.
    """
    kept = mask.flatten(1)
    counts = kept.sum(1)
    return {
        "crow_indices": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        "col_indices": kept.nonzero()[:, 1].int(),
        "values": weight.flatten(1)[kept],
    }


def _onnx(path: Path, weights: str, target: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"format onnx needs {' and '.join(missing)}: pip install 'granet[onnx]'")
    _, data, model = load_run(path, weights, device="cpu")
    example = torch.zeros(1, *data.image_shape)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    assert program is not None
    content = program.model_proto.SerializeToString()
    write_atomically(target, lambda file: file.write(content))


FORMATS: dict[str, tuple[Callable[[Path, str, Path], None], str]] = {
    "dense": (_dense, ".pt"),
    "safetensors": (_safetensors, ".safetensors"),
    "csr": (_csr, ".csr.safetensors"),
    "onnx": (_onnx, ".onnx"),
}
