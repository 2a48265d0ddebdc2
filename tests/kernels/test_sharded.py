"""Selection over scores that four processes hold, against one that holds them all."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scores import KINDS

from granet_kernels import sharded_topk_mask, topk_mask

PROCESSES = 4


def cut(sizes, shares, segments):
    """Where each process's part of each segment begins and ends: uneven shares, of which some are empty."""
    bounds = [[0, *itertools.accumulate(round(size * share) for share in shares)] for size in sizes]
    for ends, size in zip(bounds, sizes, strict=True):
        ends[-1] = size
    return [[bounds[s][rank : rank + 2] for s in range(segments)] for rank in range(PROCESSES)]


def own_part(whole, offsets, places):
    """What one process holds of a buffer, segment by segment."""
    return [whole[offset + begin : offset + end] for offset, (begin, end) in zip(offsets, places, strict=False)]


def check(rank, kind, sizes, shares, eligible_share, absolute):
    torch.manual_seed(sum(sizes))
    scores = KINDS[kind](sum(sizes))
    eligible = None if eligible_share is None else torch.rand(len(scores)) < eligible_share
    offsets = [0, *itertools.accumulate(sizes)]
    available = [b - a if eligible is None else int(eligible[a:b].sum()) for a, b in itertools.pairwise(offsets)]
    places = cut(sizes, shares, len(sizes))[rank]
    parts = own_part(scores, offsets, places)
    flags = None if eligible is None else torch.cat(own_part(eligible, offsets, places))
    own_offsets = torch.tensor([0, *itertools.accumulate(map(len, parts))])
    for numerator in (0, 1, 3, 4):
        counts = [n * numerator // 4 for n in available]
        mask = sharded_topk_mask(parts, counts, own_offsets, flags, absolute=absolute)
        whole = topk_mask(scores, counts, offsets, eligible, absolute=absolute)
        assert torch.equal(mask, torch.cat(own_part(whole, offsets, places))), (kind, sizes, counts)


def raises(message, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        sharded_topk_mask(*args, **kwargs)


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=PROCESSES)
    for kind in KINDS:
        check(rank, kind, [1000], [0.1, 0.5, 0.0, 0.4], None, False)
        check(rank, kind, [300, 0, 1, 77], [0.3, 0.0, 0.7, 0.0], 0.5, True)
    check(rank, "tied", [100], [0.0, 0.0, 0.0, 1.0], 0.9, False)
    scores = torch.arange(10.0)
    raises("expected the same counts on every process, got 0 to 3", scores, rank)
    raises(r"expected 0 <= counts <= 40 \(eligible units\) in segment 0, got 41", scores, 41)
    raises("got 1 to 2 segments", scores, 1, [0, 10] if rank else [0, 5, 10])
    raises("got 1 to 1 segments and 1 to 2 counts", scores, [1] if rank else [1, 2])
    dist.destroy_process_group()


def test_four_uneven_processes_select_as_one(tmp_path):
    mp.spawn(work, (tmp_path / "rendezvous",), nprocs=PROCESSES)
