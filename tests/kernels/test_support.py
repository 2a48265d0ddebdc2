"""Where Triton kernels do not run there is one clear warning, and the reason is the right one."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from granet_kernels.triton_backend import support

DEVICE = torch.device("cuda:0")


@pytest.fixture
def device(monkeypatch):
    """A function that pretends there is a CUDA device, of some capability, with some Triton."""

    def pretend(capability=(8, 0), triton="3.6.0", hip=None, broken=None):
        def get_current_target():
            if broken is not None:
                raise broken

        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
        active = types.SimpleNamespace(get_current_target=get_current_target)
        runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
        module = None if triton is None else types.SimpleNamespace(__version__=triton, runtime=runtime)
        monkeypatch.setitem(sys.modules, "triton", module)
        monkeypatch.setenv("GRANET_TRITON", "1")

    support.unavailable.cache_clear()
    support._warn_once.cache_clear()
    yield pretend
    support.unavailable.cache_clear()
    support._warn_once.cache_clear()


@pytest.mark.parametrize("capability", [(7, 0), (8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("triton", ["3.2.0", "3.6.0", "3.10.1+git12", "4.0.0"])
def test_available(capability, triton, device):
    device(capability, triton)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert support.is_available(DEVICE)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"capability": (6, 1)}, "a device has compute capability 6.1, Triton needs 7.0"),
        ({"triton": None}, "Triton cannot be imported"),
        ({"triton": "3.1.0"}, "Triton 3.1.0 is too old, expected 3.2 or newer"),
        ({"triton": "2.9.1"}, "Triton 2.9.1 is too old"),
        ({"hip": "6.2"}, "written for NVIDIA devices"),
        (
            {"broken": RuntimeError("Failed to find C compiler.\nSet CC")},
            r"Triton cannot be set up \(Failed to find C compiler\.\)",
        ),
        ({"broken": OSError()}, r"Triton cannot be set up \(OSError\)"),
    ],
)
def test_unavailable_with_one_warning(settings, reason, device):
    device(**settings)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert not support.is_available(DEVICE)
    assert len(caught) == 1
    assert "granet runs on plain PyTorch there" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not support.is_available(DEVICE)


@pytest.mark.parametrize("wish", [None, "", "0"])
def test_not_wanted(wish, device, monkeypatch):
    device()
    monkeypatch.delenv("GRANET_TRITON")
    if wish is not None:
        monkeypatch.setenv("GRANET_TRITON", wish)
    assert not support.is_available(DEVICE)
    device((6, 1))
    monkeypatch.delenv("GRANET_TRITON")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not support.is_available(DEVICE)


def test_asking_for_the_reason_does_not_warn(device):
    device((6, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert support.unavailable(DEVICE) is not None
