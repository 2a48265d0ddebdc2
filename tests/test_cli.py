"""The `granet` command: what it prints, and its exit status."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from training_support import small_config

import granet
from granet.cli import main
from granet.config import config_yaml
from granet.methods import all_methods
from granet.recipes import DEFAULT, recipe_names, recipe_path
from granet.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(small_config(), folder)
    return folder


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(config_yaml(small_config()))
    return str(path)


def test_module_and_version():
    result = subprocess.run([sys.executable, "-m", "granet", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"granet {granet.__version__}\n"


def test_help_lists_the_commands(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("train", "recipes", "methods", "evaluate", "export", "doctor"))


def test_train_help_lists_fields(capsys):
    assert main(["train", "--help"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("--recipe", "--run-dir", "--resume", "--epochs", "--data.root", "--method"))


def test_train_prints_its_results(capsys, tmp_path, small):
    assert main(["train", "--config", small, "--run-dir", str(tmp_path / "run"), "--epochs", "1"]) == 0
    output = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == 1
    for text in (
        "epoch 1/1",
        f"{summary['test_accuracy']:.2%}",
        f"exactly {summary['nnz']:,} of {summary['numel']:,} weights",
        f"inference {summary['test_flops_ratio']:.1%}, training {summary['train_flops_ratio']:.1%}",
        f"{summary['checkpoint_bytes']:,} bytes",
    ):
        assert text in output


def test_train_makes_a_folder_of_its_own(monkeypatch, tmp_path, small):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--config", small, "--epochs", "1"]) == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all("mlp-digits-granet" in folder.name for folder in folders)


def test_resume_of_a_finished_run(capsys, run):
    assert main(["train", "--resume", "--run-dir", str(run)]) == 0
    assert "has finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("trian", 2, "unknown command 'trian'; did you mean train?"),
        ("train --recipe vgg19-cifar10-granet-0.5-to-0.91", 2, "did you mean vgg19-cifar10-granet-0.5-to-0.9?"),
        ("train --recipe vgg19-cifar10-granet-0.5-to-0.9", 2, "data.root is not given"),
        ("train --epohcs 3", 2, "unknown option --epohcs; did you mean epochs?"),
        ("train --method Riggl", 2, "unknown method 'Riggl'; did you mean RigL?"),
        ("train --method.sparsity 1", 2, "expected a number in [0, 1), got 1"),
        ("train --model vgg-19", 1, "did you mean vgg19"),
        ("train --granularity block:7x7", 1, "divisible into 7 x 7 blocks"),
        ("train --exclude *", 1, "no layer to sparsify"),
        ("train --resume", 2, "--resume needs --run-dir"),
        ("train --resume --run-dir nowhere", 1, "no run in nowhere"),
        ("train --data.name npz --data.root nowhere.npz", 1, "nowhere.npz"),
        ("recipes --show vgg19", 2, "unknown recipe 'vgg19'"),
        ("train --model vgg19", 1, "model 'vgg19' cannot take images of 1x8x8: "),
        ("doctor vgg19 --input 3x8x8", 1, "model 'vgg19' cannot take images of 3x8x8: "),
        ("recipes --shwo vgg19", 2, "unknown option --shwo; did you mean --show?"),
        ("evaluate nowhere", 1, "no run in nowhere"),
        ("export nowhere --format csr", 1, "no run in nowhere"),
        ("export nowhere --format cs", 2, "invalid choice: 'cs'"),
        ("doctor resnt50", 1, "did you mean resnet50"),
        ("doctor resnet50 --input 3x32", 2, "expected CHANNELSxHEIGHTxWIDTH"),
        ("doctor digits-cnn --sparsity 1", 1, "sparsity"),
    ],
)
def test_error_is_one_line_with_its_status(capsys, monkeypatch, tmp_path, words, status, message):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("granet: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_taken_folder(capsys, run, small):
    assert main(["train", "--config", small, "--run-dir", str(run)]) == 1
    assert "already holds a run; add --resume" in capsys.readouterr().err


def test_resume_with_another_setting(capsys, run):
    assert main(["train", "--resume", "--run-dir", str(run), "--epochs", "9", "--method", "RigL"]) == 1
    error = capsys.readouterr().err
    assert "epochs: 2 -> 9" in error
    assert "method: 'GraNet' -> 'RigL'" in error


def test_full_disk_is_one_line(capfd, tmp_path, small):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        status = main(["train", "--config", small, "--run-dir", str(tmp_path / "run")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "File too large" in error
    assert "checkpoints written before are intact" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_recipes_lists_and_shows(capsys):
    assert main(["recipes"]) == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines()] == recipe_names()
    assert main(["recipes", "--show", DEFAULT]) == 0
    assert capsys.readouterr().out == recipe_path(DEFAULT).read_text()


def test_methods_lists_each(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(all_methods())
    for cls, line in zip(all_methods().values(), lines[1:], strict=True):
        assert line.startswith(cls.__name__)
        assert cls.family in line
        assert cls.source in line
        assert cls.summary in line


def test_evaluate_finds_the_accuracy_of_the_summary(capsys, run):
    summary = json.loads((run / "summary.json").read_text())
    assert main(["evaluate", str(run)]) == 0
    assert f"test accuracy {summary['test_accuracy']:.2%}" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--weights", "best", "--batch-size", "100"]) == 0
    assert f"test accuracy {summary['best_test_accuracy']:.2%}" in capsys.readouterr().out


def test_export_says_where(capsys, run, tmp_path):
    assert main(["export", str(run), "--format", "csr", "--output", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x'}: {Path(tmp_path / 'x').stat().st_size:,} bytes\n"


def test_doctor_shows_layers(capsys):
    assert main(["doctor", "digits-cnn", "--granularity", "block:64x64"]) == 0
    output = capsys.readouterr().out
    assert "MACs" in output
    assert "does not fit, exclude it: " in output
    assert main(["doctor", "resnet20", "--input", "3x32x32", "--num-classes", "100", "--no-measure"]) == 0
    assert "3x32x32" in capsys.readouterr().out
