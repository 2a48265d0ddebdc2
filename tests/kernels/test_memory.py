"""Large results lie in memory that is used again, and is nobody else's while a tensor holds it."""

import ctypes
import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granet_kernels.cpu_backend import library, memory

LARGE = (memory.LEAST_BYTES // 4 + 5,)


@pytest.fixture(autouse=True)
def _with_library():
    if library.load() is None:
        pytest.skip(str(library.unavailable()))
    gc.collect()
    memory.release()


def test_used_again_after_the_last_tensor_on_it():
    first = memory.empty(LARGE)
    address, view = first.data_ptr(), first[3:]
    del first
    assert memory.empty(LARGE).data_ptr() != address  # the view still holds it
    del view
    gc.collect()
    assert address in {memory.empty(LARGE).data_ptr() for _ in range(2)}


def test_tensors_alive_do_not_overlap():
    tensors = [memory.empty(LARGE).fill_(i) for i in range(5)]
    assert all((t == i).all() for i, t in enumerate(tensors))


def test_release_gives_back_what_is_idle():
    kept, freed = memory.empty(LARGE), memory.empty(LARGE)
    kept.fill_(1)
    del freed
    assert memory.release() >= memory.LEAST_BYTES
    assert memory.release() == 0
    assert (kept == 1).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)], ids=str)
def test_neighbours_are_joined(order):
    tensors = [memory.empty(LARGE) for _ in range(4)]
    first, second, third, _ = (tensor.data_ptr() for tensor in tensors)
    assert second - first == third - second  # in the order in which they were asked for
    for i in order:
        tensors[i] = None
    assert memory.empty((3 * LARGE[0],)).data_ptr() == first


@settings(deadline=None)  # the first requests of a size map memory
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 6)), max_size=40), st.booleans())
def test_any_order_of_requests(steps, release):
    tensors = {}
    for number, (place, size) in enumerate(steps):
        tensors.pop(place, None)
        tensors[place] = memory.empty((size * memory.LEAST_BYTES // 4 + number,)).fill_(number), number
        if release:
            memory.release()
        assert all((t[::1000] == n).all() and t[-1] == n for t, n in tensors.values())


def test_gradients_are_summed_in_place():
    """As of tensors of torch's own: a sum in new memory at every residual is a peak nobody expects."""
    made, arrived = [], []

    class Passed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            result = memory.empty(grad.shape).copy_(grad)
            made.append(result.data_ptr())
            return result

    y = torch.zeros(LARGE, requires_grad=True) * 1
    y.register_hook(lambda grad: arrived.append(grad.data_ptr()))
    (Passed.apply(y) + Passed.apply(y)).sum().backward()
    assert arrived == made[:1]


def test_more_than_there_is():
    with pytest.raises(MemoryError, match="no memory for a result of shape"):
        memory.empty((1 << 50,))
    with pytest.raises(MemoryError, match="no memory for a result of shape"):
        memory.empty_strided((1 << 31, 1 << 31), (1 << 31, 1))  # more bytes than a size can name
    assert (memory.empty(LARGE).fill_(1) == 1).all()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="not Linux")
def test_most_of_a_limit_on_addresses_is_left():
    script = (
        "import pathlib, resource, torch\n"
        "from granet_kernels.cpu_backend import library, memory\n"
        "library.load()\n"
        "used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)\n"
        "small = memory.empty((1 << 19,)).fill_(1)\n"
        "torch.empty(3 << 29, dtype=torch.uint8)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_others_may_declare_the_capsule_s_function(monkeypatch):
    """ctypes keeps one object for everybody who asks for it by attribute."""
    monkeypatch.setattr(ctypes.pythonapi.PyCapsule_New, "argtypes", [ctypes.c_int])
    assert (memory.empty(LARGE).fill_(1) == 1).all()


@pytest.mark.parametrize("shape", [(3, 5), (700, 700), (2, 3, 400, 300), (0, 4)], ids=str)
def test_like_torch(shape):
    expected = torch.empty(shape)
    for tensor in (memory.empty(shape), memory.empty_like(expected)):
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (expected.shape, expected.stride(), torch.float32)
        assert not tensor._is_view()


def test_strides_are_kept():
    like = torch.zeros(2, 3, 400, 300, dtype=torch.bool).contiguous(memory_format=torch.channels_last)
    assert memory.empty_like(like).stride() == like.stride()
    assert memory.empty_like(like[:, :, ::2]).stride() == torch.empty_like(like[:, :, ::2]).stride()


def test_many_threads():
    wrong = []

    def work(number):
        for _ in range(50):
            tensor = memory.empty(LARGE).fill_(number)
            if not (tensor == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_fork():
    tensor = memory.empty(LARGE).fill_(1)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's other threads have not come along
        fine = bool((memory.empty(LARGE).fill_(2) == 2).all()) and bool((tensor == 1).all())
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (tensor == 1).all()


def test_pickled_and_copied():
    tensor = torch.nn.Parameter(memory.empty(LARGE).fill_(3))
    assert torch.equal(tensor.clone(), tensor.detach())
    tensor.data = tensor.data.clone()
    assert (tensor == 3).all()


def test_a_tensor_may_outlive_the_names_of_the_module():
    script = (
        "from granet_kernels.cpu_backend import memory\n"
        "tensor = memory.empty((1 << 20,))\n"
        "vars(memory).clear()\n"  # as the interpreter does when it ends
        "del tensor\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
