"""The network of a finished run in other formats."""

from __future__ import annotations

import json

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_support import small_config

from granet.evaluate import load_run
from granet.export import csr, export_run
from granet.models import create_model
from granet.run import RunFolder
from granet.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    return folder, train(small_config(), folder)


@pytest.mark.parametrize("weights", ["model", "best"])
@pytest.mark.parametrize("format", ["dense", "safetensors"])
def test_dense_formats_load_into_the_dense_model(run, tmp_path, format, weights):
    path = export_run(run[0], format, tmp_path / "out", weights)
    if format == "dense":
        state = torch.load(path, weights_only=True)
    else:
        state = safetensors.torch.load_file(path)
    create_model("mlp", num_classes=10, in_channels=1, image_size=8).load_state_dict(state)


def test_csr_holds_exactly_the_kept_weights(run):
    folder, summary = run
    path = export_run(folder, "csr")
    assert path == folder / "export.csr.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    dense = RunFolder(folder).load_weights("model.safetensors")
    assert sum(tensors[f"{name}.values"].numel() for name in shapes) == summary["nnz"]
    for name, shape in shapes.items():
        parts = [tensors[f"{name}.{part}"] for part in ("crow_indices", "col_indices", "values")]
        assert torch.equal(torch.sparse_csr_tensor(*parts, size=shape).to_dense(), dense[name])
    assert tensors.keys() - {f"{n}.{p}" for n in shapes for p in ("crow_indices", "col_indices", "values")} == (
        dense.keys() - shapes.keys()
    )


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99))
def test_csr_of_any_mask(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, 2, generator=generator) < density
    weight = torch.randn(rows, columns, 2, generator=generator) * mask
    parts = csr(weight, mask)
    assert parts["values"].numel() == int(mask.sum())
    again = torch.sparse_csr_tensor(*parts.values(), size=(rows, columns * 2)).to_dense()
    assert torch.equal(again.view_as(weight), weight)


def test_onnx_computes_the_same(run, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnx.reference")
    _, data, model = load_run(run[0])
    path = export_run(run[0], "onnx", tmp_path / "model.onnx")
    images, _ = next(data.test.batches(5))
    (outputs,) = runtime.ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(outputs), model(images), atol=1e-4)


def test_onnx_missing_is_said(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript: pip install 'granet\[onnx\]'"):
        export_run(run[0], "onnx")


def test_wrong_request_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="expected one of dense, safetensors, csr, onnx, got 'csv'"):
        export_run(run[0], "csv")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_run(run[0], "csr", tmp_path / "missing" / "x")
    with pytest.raises(FileNotFoundError, match="no run in"):
        export_run(tmp_path, "csr")
