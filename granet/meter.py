"""FLOPs of a run while it trains: counted in stretches of steps that share their masks."""

from __future__ import annotations

import copy
from typing import Any

from granet.flops import TrainingFlops, test_flops_ratio
from granet.methods import Method
from granet.sparsifier import Sparsifier


class FlopsMeter:
    """Counts the FLOPs of every optimizer step against those of the dense network.

    Args:
        macs: of each layer, from layer_macs.
        sparsifier: whose masks count.
        method: the Sparsifier's, with all times resolved.
    """

    def __init__(self, macs: dict[str, int], sparsifier: Sparsifier, method: Method) -> None:
        self.macs = macs
        self.sparsifier = sparsifier
        self.method = method
        self.counted = TrainingFlops(macs)
        self.pending = {"sparse": 0, "dense": 0}  # steps with the present masks, by whether the gradient was dense

    def before_step(self) -> None:
        """Count the optimizer step that comes next."""
        step = self.sparsifier.step + 1
        self.pending["dense" if self.method.needs_gradient(step) else "sparse"] += 1
        if self.method.is_update(step):
            self._add_pending(self.counted)
            self.pending = {"sparse": 0, "dense": 0}

    @property
    def test_ratio(self) -> float:
        """FLOPs of a forward pass with the present masks, dense = 1."""
        return test_flops_ratio(self.macs, self.sparsifier.densities)

    @property
    def train_ratio(self) -> float:
        """FLOPs of all steps so far, dense = 1."""
        counted = copy.deepcopy(self.counted)
        self._add_pending(counted)
        return counted.ratio

    def _add_pending(self, counted: TrainingFlops) -> None:
        densities = self.sparsifier.densities
        for kind, steps in self.pending.items():
            if steps:
                counted.add(densities, dense_gradient=kind == "dense", steps=steps)

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict needs to go on counting to the same bits."""
        return {"counted": self.counted.state_dict(), "pending": dict(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was called. The Sparsifier is in the state of then."""
        self.counted.load_state_dict(state["counted"])
        self.pending = dict(state["pending"])
