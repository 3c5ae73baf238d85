"""NoiseOut: noise outputs make units correlate, and correlated units are merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewire.methods.core.base import Data, Evaluate, Method, Pool, Purpose
from rewire.methods.core.parameters import (
    Count,
    NonNegative,
    Patterns,
    Share,
    Steps,
    data_field,
    parameter,
    service,
    setting,
)
from rewire.methods.core.refusals import needs_data
from rewire.methods.core.registry import register
from rewire.methods.core.runs import Run
from rewire.methods.noiseout.choice import Inputs, choose, first_inputs, next_merge
from rewire.methods.noiseout.correlation import Merge, UnitMoments, measure
from rewire.methods.noiseout.noise_outputs import NoiseOutputs, Targets
from rewire.methods.noiseout.snapshot import Snapshot
from rewire.nn.forward.modes import evaluating
from rewire.nn.forward.tensors import head
from rewire.nn.surgery import UnitGraph, fit_shapes
from rewire.schedules import within

__all__ = ["NoiseOut"]


@register(
    name="noiseout",
    paper="Babaeizadeh, Smaragdis, Campbell, 2016 (arXiv 1611.06211)",
    summary="merge correlated neurons, channels or states of a dense network, helped by outputs "
    "that predict noise",
    keeps_budget="no",
    guarantees=(
        "units that are affinely dependent merge without a trace",
        "the network returned is the last one that met the threshold",
        "every parameter stays in its optimizer, with its state cut along",
    ),
    memory="O(M)",
    needs="activations",
)
class NoiseOut(Method):
    """At every check, while the task's score meets the threshold::

        remove  units that are constant: their outputs go into the biases of what reads them
        merge   the pair of one layer with the largest |rho|: w_v += alpha w_u, b += beta w_u,
                unit u removed
        score   the network again, and remember it if it meets the threshold

    A merge that breaks the threshold stays, unless ``overshoot`` says otherwise: training has to
    bring the score back before the next one. `finalize` returns the last network that met it,
    whatever became of later ones. rho is the correlation of post-activation outputs where they are
    read (behind BatchNorm, activation and pooling), alpha and beta the least-squares fit, and u the
    member of the pair whose loss hurts less, |w_u|^2 Var(h_u). In between, `penalty` trains noise
    outputs, extra outputs of the last layer with random targets: where these can only be met by a
    constant, units become dependent.

    Layers: nn.Linear, convolutions, and nn.LSTM, nn.GRU, nn.RNN of one layer and direction. A
    convolution that pads with zeros, a layer without bias (or BatchNorm behind it) and a recurrent
    layer's first state take no constant, so there the fit is through the origin and exact for
    proportional units. Layers that cannot be cut are left alone (``stats()["refused"]`` says why);
    named without wildcards they are an error.

    One noise output is too weak: on a toy of two hidden units mean |rho| is 0.8 with one, as with
    none, and 1.00 with eight, each of which asks for another direction to be constant.

    With ``overshoot="train"`` training brings the score back or not: the way to few units, each of
    which is missed at first. With "undo" half as many merges are tried for the rest of the check,
    and at last pairs of the other layers, until each layer's next merge would break the threshold
    (or ``at_once`` are done). Training after a check may still lose the threshold: then nothing is
    merged before it is met again.

    ``data`` is what correlations are taken over; it must give the same batches each time.
    ``evaluate`` (model -> score) is asked at checks between epochs, and at the end of epochs where
    `end_epoch` is not given one.

    Cost: a check passes over the samples once, O(units^2) per position, and one evaluation and a
    copy of the model and its optimizer state per merge; for each that is undone, at every check
    anew, another evaluation and pass. Between checks nothing costs beyond the noise outputs.
    """

    data: Data | None = data_field()
    evaluate: Evaluate | None = service(
        default=None, help="model -> score, for checks where `end_epoch` is not given one"
    )
    targets: Targets = setting(
        default="gaussian", help='of the noise outputs; "none": no noise outputs'
    )
    noise_outputs: Count = setting(default=8, help="number of noise outputs")
    strength: NonNegative = setting(
        default=1.0, help="factor of the noise loss (summed over outputs, mean over the batch)"
    )
    mean: float = setting(
        default=0.1,
        low=-1e6,
        high=1e6,
        help="of the targets: of the normal distribution, probability of a one, or the constant",
    )
    deviation: NonNegative = setting(default=0.4, help="standard deviation of the gaussian targets")
    required_score: float | None = parameter(
        default=None,
        help="score that a network must meet; by default that of the first check, less ``slack``",
    )
    slack: NonNegative = setting(
        default=0.0,
        help="how much worse than at the first check the score may be, where ``required_score`` is "
        "not given",
    )
    larger_is_better: bool = setting(
        default=True, help="whether scores grow (accuracy) or fall (a cost)"
    )
    only: Patterns | None = setting(
        default=None, help="names of the layers to merge units of; None: all that can be"
    )
    criterion: Literal["correlation", "damage"] = setting(
        default="correlation",
        help="the paper's, or the pair whose merge changes its readers least in mean square, "
        "|w_u|^2 Var(h_u) (1 - rho^2), for each parameter that goes with the unit",
    )
    every: Steps | None = setting(
        default=None,
        help="optimizer steps between checks (needs ``evaluate=``); None: at the end of each epoch",
    )
    warmup: int = setting(
        default=0,
        low=0,
        unit="checks",
        help="first checks that only train; `rewire train` takes half of its epochs where neither "
        "this nor ``required_score`` or ``every`` is given",
    )
    pace: Share = setting(
        default=0.0,
        help="share of the remaining units that is merged between two scores; 0 scores after every "
        "merge",
    )
    at_once: Count | None = setting(
        default=None, help="merges per check at most; None: as many as the threshold allows"
    )
    overshoot: Literal["train", "undo"] = setting(
        default="train",
        help="what becomes of merges that break the threshold: they stay, or go back at once",
    )
    samples: Count | None = setting(
        default=2000,
        help="inputs of ``data`` over which correlations are taken, the first so many, kept; None: "
        "all",
    )

    acts_in_ranks = False
    starts_dense = True
    # the noise outputs' loss makes training at a large rate diverge
    run_lr = 0.002
    saves = ("_merged", "_checks", "_score", "_beside")

    @classmethod
    def run_options(cls, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """Half of the run trains only: what it then reaches is the score to keep."""
        timed = {"required_score", "every", "warmup"} & given.keys()
        return {} if timed else {"warmup": run.epochs // 2}

    def _check(self) -> None:
        if self.targets == "binomial":
            within("mean", self.mean, 0.0, 1.0)
        if self.data is None:
            raise needs_data(self)
        if self.every is not None and self.evaluate is None:
            raise ValueError(
                f"every={self.every} checks between epochs: give evaluate=, a function "
                "from model to score"
            )
        self._kept = first_inputs(self.data, self.samples) if self.samples is not None else None
        example = next(iter(self._batches()), None)
        if example is None:
            raise ValueError("data has no batch: give at least one, of training inputs")
        self._example = head(example, 2)
        self._graph = UnitGraph(self.model, self._example)
        self._names, self._refused = choose(self._graph, self.only)

    def _setup(self) -> None:
        #: The score that a network must meet, once it is known.
        self.bound = self.required_score
        self._merged = dict.fromkeys(self._names, 0)
        self._checks = 0
        self._score: float | None = None
        self._best: Snapshot | None = None
        self._beside: dict[str, Any] = {}  # what belongs to the best
        self._outputs = None if self.targets == "none" else self._noise_outputs()
        if self._outputs is not None:
            self._attachment.hold(self._outputs.handle)

    def _noise_outputs(self) -> NoiseOutputs:
        last = self.model.get_submodule(self._graph.last) if self._graph.last is not None else None
        if not isinstance(last, nn.Linear):
            raise ValueError(
                "noise outputs stand beside the outputs of a last nn.Linear, and this network ends "
                f"with {self._graph.last} ({type(last).__name__}): use targets='none'"
            )
        of = self._attachment.parameters
        owners = [o for o in self.optimizers if any(p is last.weight for p in of(o))]
        trains = (owners or self.optimizers)[0]
        return NoiseOutputs(
            self.model,
            last,
            trains,
            kind=self.targets,
            outputs=self.noise_outputs,
            mean=self.mean,
            deviation=self.deviation,
            seed=self.seed,
            stream=Purpose.NOISE,
        )

    # --- the protocol -----------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """``strength`` times the noise outputs' loss, for the passes since the last call."""
        if self._outputs is None:
            return super().penalty()
        return self.strength * self._outputs.loss(self.seed, self.steps + 1)

    def _release(self, pools: Iterable[Pool]) -> None:
        """A step is over, made or skipped: what was seen of its forward passes is of no use to the
        next.
        """
        super()._release(pools)
        if self._outputs is not None:
            self._outputs.forget()

    def _after_step(self, pools: list[Pool]) -> None:
        if self._outputs is not None:
            self._outputs.update(self.strength)
            self._outputs.forget()
        if self.every is not None and self.steps % self.every == 0:
            self._try_merges(self.evaluate)

    def _after_epoch(self, evaluate: Evaluate | None, last: bool) -> None:
        if self.every is None or last:
            self._try_merges(evaluate if evaluate is not None else self.evaluate)
        if last and self._best is not None:  # what is scored now is what `finalize` gives
            self._go_back()

    def finalize(self) -> nn.Module:
        """Return the last network that met the threshold, if one did, without noise outputs."""
        if self._attachment.attached and self._best is not None:
            self._go_back()
        return super().finalize()

    def stats(self) -> dict[str, Any]:
        """Also: units left and merged per layer, parameters, last score, the threshold, layers
        refused and why.
        """
        best = None if self._best is None else self._best.parameters
        return super().stats() | {
            "units": {name: self._graph.count(name) for name in self._names},
            "merged": dict(self._merged),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "parameters_met": best,
            "score": self._score,
            "required_score": self.bound,
            "refused": dict(self._refused),
        }

    def _schedule(self) -> str | None:
        if self._checks > self.warmup:  # there were trials, and none met the threshold
            return None
        when = "epoch" if self.every is None else f"{self.every} steps"
        return f"a check every {when}, the first warmup={self.warmup} of which only train"

    # --- checks and merges ------------------------------------------------------------------------

    def _meets(self, score: float) -> bool:
        assert self.bound is not None
        return score >= self.bound if self.larger_is_better else score <= self.bound

    def _scored(self, evaluate: Evaluate) -> float:
        with evaluating(self.model):
            self._score = float(evaluate(self.model))
        return self._score

    def _try_merges(self, evaluate: Evaluate | None) -> None:
        """Algorithm 1's inner loop: while the score meets the threshold, merge."""
        if evaluate is None:
            raise RuntimeError(
                "NoiseOut decides by the task's score: give end_epoch(evaluate) a function from "
                "model to score (rewire train needs --validation for it)"
            )
        if self._outputs is not None:  # a graph from before a merge cannot be gone through after it
            self._outputs.forget()
        self._checks += 1
        if self._checks <= self.warmup:
            return
        score = self._scored(evaluate)
        if self.bound is None:
            self.bound = score - self.slack if self.larger_is_better else score + self.slack
        if not self._meets(score):
            return
        self._keep(score)
        moments = self._measure(self._names)
        left = sum(len(m.units) for m in moments.values()) if self.at_once is None else self.at_once
        limit = left
        while left > 0:
            wanted = min(
                left, limit, max(1, int(self.pace * sum(len(m.units) for m in moments.values())))
            )
            done: list[str] = []
            while len(done) < wanted and (name := self._merge(moments)):
                done.append(name)
            if not done:
                return
            reached = self._scored(evaluate)
            if self._meets(reached):
                self._keep(reached)
                left -= len(done)
            elif self.overshoot == "train":
                return
            else:
                self._go_back()
                limit = max(1, len(done) // 2)
                names = moments.keys() - (set(done) if len(done) == 1 else set())
                if not names:
                    return
                moments = self._measure(names)

    def _keep(self, score: float) -> None:
        """Remember the network, which meets the threshold, its noise outputs, and what is counted
        of it.
        """
        self._best = Snapshot.of(self.model, self.optimizers)
        outputs = None if self._outputs is None else self._outputs.state()
        self._beside = {
            "score": score,
            "merged": dict(self._merged),
            "updates": self.updates,
            "outputs": outputs,
        }

    def _go_back(self) -> None:
        """Take the last network that met the threshold."""
        assert self._best is not None
        self._best.restore(self.model, self.optimizers)
        # first, because what they hold of forward passes cannot be copied with the model
        if self._outputs is not None:
            self._outputs.load(self._beside["outputs"])
        self._graph = UnitGraph(self.model, self._example, self._graph.tried)
        self._score, self.updates = self._beside["score"], self._beside["updates"]
        self._merged = dict(self._beside["merged"])

    def _measure(self, names: Iterable[str]) -> dict[str, UnitMoments]:
        wanted = [name for name in self._names if name in names]
        found = measure(self._graph, wanted, self._batches())
        for name in wanted:
            if name not in found:
                self._refused[name] = (
                    f"the units of {name} are not merged: a layer that reads them was not called"
                )
        return found

    def _merge(self, moments: Mapping[str, UnitMoments]) -> str | None:
        """Carry out the next merge over all layers and name its layer; None if no pair is left."""
        best = next_merge(self._graph, moments, self.criterion)
        if best is None:
            return None
        self._carry_out(moments[best.name], best)
        return best.name

    def _carry_out(self, moments: UnitMoments, merge: Merge) -> None:
        graph, group = self._graph, moments.group
        moments.fold(merge)
        if self._outputs is not None:
            for site, (alpha, beta) in zip(
                moments.readers, moments.coefficients(merge), strict=True
            ):
                if site.module is self._outputs.head:
                    at = graph.positions(site, torch.tensor([merge.unit]))[0]
                    into = (
                        None
                        if merge.into is None
                        else graph.positions(site, torch.tensor([merge.into]))[0]
                    )
                    self._outputs.merge(at, into, alpha, beta)
        graph.remove(
            {merge.name: [int(torch.searchsorted(group.alive, merge.unit))]}, self.optimizers
        )
        moments.forget(merge.unit)
        self._merged[merge.name] += 1
        self.updates += 1

    def _batches(self) -> Iterable[Any]:
        return self._kept if self._kept is not None else Inputs(self.data or ())

    # --- saving -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        tensors: dict[str, Tensor] = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
        }
        return super()._state() | {
            "shapes": {name: list(t.shape) for name, t in tensors.items()},
            "outputs": None if self._outputs is None else self._outputs.state(),
            "bound": self.bound,
            "best": None if self._best is None else self._best.state(),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `_state`'s result; a model that was not cut gets the shapes, for its own state to
        be loaded.
        """
        shapes, outputs, bound = dict(state["shapes"]), state["outputs"], state["bound"]
        best = None if state["best"] is None else Snapshot.from_state(state["best"])
        super()._load_state(state)
        for resized in fit_shapes(self.model, shapes):
            for optimizer in self.optimizers:
                kept = optimizer.state.get(resized, {}).values()
                tensors = [value for value in kept if isinstance(value, Tensor)]
                if any(t.dim() and t.shape != resized.shape for t in tensors):
                    del optimizer.state[resized]
        self._graph = UnitGraph(self.model, self._example, self._graph.tried)
        if self._outputs is not None:
            self._outputs.load(outputs)
        self._best, self.bound = best, bound
