"""What the estimators share: fitting, predicting, pickling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from rewire import budget, methods
from rewire.adapters.sklearn.data import Batches, Rows, rows_of, weights_of
from rewire.adapters.sklearn.network import ACTIVATIONS, budgets, input_connectivity, shapes_of
from rewire.adapters.sklearn.settings import DENSITY, OPTIMIZERS, Settings
from rewire.adapters.sklearn.training import Loss, Training, from_bytes, threads, to_bytes
from rewire.methods.core.runs import Run
from rewire.nn.layers.linear import SparseLinear
from rewire.nn.layers.perceptron import perceptron
from rewire.schedules import Cosine

__all__ = ["SparseMLP"]

#: Targets and their weights -> mean and spread of each column.
Scale = Callable[[np.ndarray, "np.ndarray | None"], tuple[np.ndarray, np.ndarray]]


@dataclass(kw_only=True, eq=False, repr=False)
class SparseMLP(Settings):
    """A multi-layer perceptron with a connection budget; base class of the estimators.

    Subclasses may add parameters as fields.
    """

    network_: nn.Sequential = field(init=False)
    loss_curve_: list[float] = field(init=False)
    validation_scores_: list[float] | None = field(init=False)
    best_validation_score_: float | None = field(init=False)
    _training: Any = field(init=False)

    # --- what subclasses say ----------------------------------------------------------------------

    def _loss(self) -> Loss:
        raise NotImplementedError

    def _outputs(self) -> int:
        raise NotImplementedError

    def _score_of(self, network: nn.Module, x: Rows, y: Tensor, weight: Any) -> float:
        """The score of held-out rows, higher is better."""
        raise NotImplementedError

    # --- fitting ----------------------------------------------------------------------------------

    def _former(self) -> nn.Sequential | None:
        """The network that `fit` goes on with."""
        return getattr(self, "network_", None) if self.warm_start else None

    def _begin(
        self, x: Rows, seed: int, passes: int | None, network: nn.Sequential | None
    ) -> Training:
        """Network, optimizer and method before the first step.

        passes: over the data, in the whole training; None if nobody knows. network: one to go on
        with.
        """
        entry = methods.info(self.method)
        shapes = shapes_of((x.features, *self._sizes(), self._outputs()))
        density = DENSITY if self.density is None and self.connections is None else self.density
        sparse = network is not None and any(isinstance(m, SparseLinear) for m in network)
        self._check_budget(entry, sparse=sparse, ends=passes is not None)
        final = start = None
        if not entry.cls.starts_dense:
            start = final = budgets(shapes, density, self.connections, self.distribution)
            if entry.start_density is not None:
                start = budget.starting(entry.start_density, shapes, final, self.limits)
        if network is None:
            network = perceptron(
                shapes,
                start,
                torch.Generator().manual_seed(seed),
                activation=ACTIVATIONS[self.activation],
                limits=self.limits,
                dtype=x.dtype,
            )
        name, rate = self._solver()
        optimizer = OPTIMIZERS[name](network.parameters(), lr=rate, weight_decay=self.alpha)  # type: ignore[call-arg]
        provided: dict[str, Any] = {"data": Batches(x), "connections": final}
        given = dict(self.method_params or {})
        if passes is not None:
            batch, _, together = self._plan(len(x))
            steps, epochs = passes * -(-len(x) // batch), -(-passes // together)
            provided |= {"total_steps": steps, "total_epochs": epochs}
            given = entry.cls.run_options(Run(epochs, name, steps), given) | given
        settings = {key: value for key, value in provided.items() if key in entry.services}
        if entry.cls.starts_dense and "density" in entry.parameters():
            size = sum(rows * cols for rows, cols in shapes)
            settings["density"] = budget.allowed(size, self.connections, density) / size
        if "evaluate" in entry.services:
            raise ValueError(
                f"method={self.method!r} decides by a validation score while it trains, which an "
                "estimator does not give it: use rewire.methods in a loop of your own"
            )
        method = methods.create(self.method, network, optimizer, seed=seed, **settings, **given)
        return Training(network, optimizer, method, self._loss(), seed)

    def _fit(
        self,
        x: Any,
        y: np.ndarray,
        weight: np.ndarray | None,
        *,
        stratify: Any = None,
        scale: Scale | None = None,
    ) -> None:
        """Train on checked data, a part of which is held out for early stopping.

        stratify: what the held-out part is drawn by, or None. scale: finds the mean and the spread
        of the targets, from those that are trained on.
        """
        kept, held = np.arange(x.shape[0]), None
        if self.early_stopping:
            kept, held = train_test_split(
                kept,
                test_size=self.validation_fraction,
                random_state=self.random_state,
                stratify=stratify,
            )
            if scale is not None and len(held) < 2:
                raise ValueError(
                    f"validation_fraction={self.validation_fraction} of {len(y)} samples holds out "
                    "one, which has no R^2: hold out two or more"
                )
        network = self._former()

        def part(places: np.ndarray) -> tuple[Rows, Tensor, np.ndarray | None]:
            rows, targets = rows_of(x[places], network), torch.as_tensor(y[places])
            if targets.dtype.is_floating_point:
                targets = targets.to(rows.dtype)
            return rows, targets, None if weight is None else weight[places]

        if scale is not None:
            mean, spread = scale(y[kept], None if weight is None else weight[kept])
            y = (y - mean) / spread
        rows, targets, among = part(kept)
        self._train(
            rows, targets, weights_of(among, rows.dtype), None if held is None else part(held)
        )

    def _train(
        self, x: Rows, y: Tensor, weight: Tensor | None, held: tuple[Rows, Tensor, Any] | None
    ) -> None:
        """Train for ``max_epochs``, or until the score of ``held`` rows stops rising."""
        features = x.features
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        network = self._former()
        if network is not None:
            had = _width(network[0], "in_features"), _width(network[-1], "out_features")
            now = features, self._outputs()
            if had != now:
                raise ValueError(
                    f"warm_start=True goes on with a network of {had[0]} inputs and {had[1]} "
                    f"outputs; the data asks for {now[0]} inputs and {now[1]} outputs"
                )
        batch, passes, together = self._plan(len(x))
        training = self._begin(x, seed, passes, network)
        rate = training.optimizer.param_groups[0]["lr"]
        schedule = Cosine(rate, passes)
        best: tuple[float, dict[str, Tensor]] | None = None
        budget_met = methods.info(self.method).start_density is None
        self.loss_curve_ = []
        self.validation_scores_ = [] if held else None
        waited = 0
        products = batch * sum(training.method.count_connections().values())
        with threads(self.n_jobs, products):
            for epoch in range(passes):
                if self.learning_rate == "cosine":
                    for group in training.optimizer.param_groups:
                        group["lr"] = schedule(epoch)
                loss = training.epoch(x, y, weight, batch, self.shuffle)
                if not np.isfinite(loss):
                    raise ValueError(
                        f"training diverged in epoch {epoch + 1}: the loss is {loss}; scale the "
                        f"data, or try a smaller learning_rate_init (it is {rate})"
                    )
                last = epoch + 1 == passes
                if last or (epoch + 1) % together == 0:
                    training.method.end_epoch(last=last)
                self.loss_curve_.append(loss)
                if self.verbose:
                    print(f"epoch {epoch + 1}: loss {loss:.6f}")
                if held is None:
                    continue
                score = self._score_of(training.network.eval(), *held)
                assert self.validation_scores_ is not None
                self.validation_scores_.append(score)
                # A method that comes down to its budget must get there before anything is compared.
                budget_met = budget_met or epoch + 1 > 0.75 * passes
                waited += budget_met
                if budget_met and (best is None or score > best[0] + self.tol):
                    kept = {
                        key: value.clone() for key, value in training.network.state_dict().items()
                    }
                    best, waited = (score, kept), 0
                if waited >= self.n_iter_no_change:
                    break
            if best is not None:
                training.network.load_state_dict(best[1])
            training.method.finalize()  # which changes the network in place
            self.network_ = training.network.eval()
        self._training = None
        self._finish(training.epochs, self.loss_curve_[-1])
        self.best_validation_score_ = None if best is None else best[0]

    def _finish(self, epochs: int, loss: float) -> None:
        self.n_iter_, self.loss_ = epochs, loss
        self.n_layers_ = len(self._sizes()) + 2
        self.n_outputs_ = self._outputs()

    def _continue(self, x: Rows, y: Tensor, weight: Tensor | None) -> None:
        """One epoch more, of a training whose end nobody knows."""
        training = getattr(self, "_training", None)
        if training is None:
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            network = getattr(self, "network_", None)
            training = self._begin(x, seed, None, network)
        elif isinstance(training, Mapping):  # from a pickle
            state = training
            training = self._begin(x, int(state["seed"]), None, self.network_)
            training.load_state(state)
        batch = self._batch(len(x))
        products = batch * sum(training.method.count_connections().values())
        with threads(self.n_jobs, products):
            loss = training.epoch(x, y, weight, batch, self.shuffle)
            training.method.end_epoch()
        self._training, self.network_ = training, training.network
        self.network_.eval()
        self._finish(training.epochs, loss)

    def _forward(self, network: nn.Module, rows: Rows) -> np.ndarray:
        """The outputs of a network, (samples, outputs)."""
        widest = max(rows.features, *self._sizes(), self._outputs())
        with torch.no_grad():
            found: np.ndarray = torch.cat([network(x) for x in rows.pieces(widest)]).numpy()
        return found

    def _rows(self, x: Any) -> Rows:
        """The rows to predict for, checked."""
        check_is_fitted(self, "network_")
        dtype = next(self.network_.parameters()).dtype
        kind = np.float32 if dtype == torch.float32 else np.float64
        x = validate_data(self, x, accept_sparse="csr", dtype=kind, reset=False)
        return Rows(x, dtype)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # --- the evolved connectivity -----------------------------------------------------------------

    @property
    def feature_counts_(self) -> np.ndarray:
        """How many connections leave each input of the network, (features,), int64."""
        check_is_fitted(self, "network_")
        return input_connectivity(self.network_)[0]

    @property
    def feature_importances_(self) -> np.ndarray:
        """The sum of the magnitudes of the connections that leave each input, (features,); the sum
        of all is 1 (0 if every connection is 0).

        Neuron strength as in QuickSelection (Atashgahi et al., Machine Learning 2022). It compares
        features of one scale: standardise them before.
        """
        check_is_fitted(self, "network_")
        strength = input_connectivity(self.network_)[1]
        total = strength.sum()
        found: np.ndarray = strength / total if total else strength
        return found

    # --- pickling ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        if "network_" in state:
            training = state.pop("_training", None)
            going_on = training.state() if isinstance(training, Training) else training
            state["network_"] = to_bytes(state["network_"], going_on)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if isinstance(content := state.get("network_"), bytes):
            state["network_"], state["_training"] = from_bytes(content)
        super().__setstate__(state)


def _width(layer: nn.Module, name: str) -> int:
    return int(getattr(layer, name))
