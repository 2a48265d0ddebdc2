"""DataConfig: what is refused, and what is said."""

from __future__ import annotations

from typing import Any

import pytest

from granet.data import DataConfig

BAD = {
    "unknown-name": ({"name": "cifar"}, r"unknown data set 'cifar'; did you mean cifar10"),
    "far-name": ({"name": "qqq"}, r"unknown data set 'qqq' \(known: digits, "),
    "root-with-digits": ({"root": "x"}, r"digits is part of the package and takes no data.root, got 'x'"),
    "no-root": ({"name": "cifar10"}, r"data.root is not given: expected the path of the folder that holds cifar10"),
    "no-file": ({"name": "npz"}, r"data.root is not given: expected the path of the \.npz file"),
    "download-digits": ({"download": True}, r"data.download applies to .*, got it with 'digits'"),
    "download-imagenet": ({"name": "imagenet", "root": "x", "download": True}, r"data.download applies to cifar10"),
    "workers-in-memory": ({"name": "cifar10", "root": "x", "workers": 2}, r"data.workers applies to imagenet only"),
    "negative-workers": ({"name": "imagenet", "root": "x", "workers": -1}, r"data.workers >= 0, got -1"),
    "image-size": ({"name": "npz", "root": "x", "image_size": 32}, r"data.image_size applies to imagenet only, got 32"),
    "zero-image-size": ({"name": "imagenet", "root": "x", "image_size": 0}, r"data.image_size >= 1, got 0"),
    "negative-validation": ({"validation": -1}, r"data.validation .*got -1"),
    "whole-validation": ({"validation": 1.0}, r"data.validation .*got 1\.0"),
    "bool-validation": ({"validation": True}, r"data.validation .*got True"),
    "nan-validation": ({"validation": float("nan")}, r"data.validation .*got nan"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize("validation", [0, 0.0, 1, 100, 0.5])
def test_numbers_and_fractions_are_taken(validation: float) -> None:
    assert DataConfig(validation=validation).validation == validation
