"""The estimators as scikit-learn's own checks, users and pickles see them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_iris, make_classification, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from rewire import methods
from rewire.nn import SparseLinear, sparse_weights
from rewire.sklearn import ConnectivitySelector, SparseMLPClassifier, SparseMLPRegressor

#: Small enough for some sixty checks each, and large enough for their accuracies.
SMALL = {"hidden_layer_sizes": 50, "density": 0.3, "max_epochs": 200}


@parametrize_with_checks(
    [SparseMLPClassifier(**SMALL), SparseMLPRegressor(**SMALL), ConnectivitySelector(**SMALL)]
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_finds_nothing_to_complain_about(estimator: Any, check: Any) -> None:
    check(estimator)


def blobs(features: int = 20) -> tuple[np.ndarray, np.ndarray]:
    x, y = make_classification(
        300,
        features,
        n_informative=5,
        n_redundant=0,
        n_clusters_per_class=1,
        class_sep=1.5,
        shuffle=False,
        random_state=0,
    )
    return StandardScaler().fit_transform(x), y


def test_the_budget_is_kept() -> None:
    x, y = blobs()
    found = SparseMLPClassifier((50, 30), connections=400, max_epochs=5, random_state=0).fit(x, y)
    assert sum(w.connections for _, w in sparse_weights(found.network_)) == 400
    assert found.feature_counts_.sum() == found.network_[0].weight.connections
    by_share = SparseMLPClassifier((50, 30), density=0.2, max_epochs=2, random_state=0).fit(x, y)
    total = sum(w.connections for _, w in sparse_weights(by_share.network_))
    assert total == round(0.2 * (20 * 50 + 50 * 30 + 30 * 2))


#: "evaluate" asks for a validation score, which estimators have not got.
TRAINED = [n for n in methods.available() if "evaluate" not in methods.info(n).services]


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_and_pickles(method: str) -> None:
    x, y = blobs()
    estimator = SparseMLPClassifier(
        30, method=method, density=0.2, max_epochs=12, batch_size=20, random_state=0
    )
    if methods.info(method).cls.starts_dense and "density" not in methods.info(method).parameters():
        estimator.set_params(density=None)
    estimator.fit(x, y)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(estimator.predict_proba(x), again.predict_proba(x))
    np.testing.assert_array_equal(estimator.feature_counts_, again.feature_counts_)
    assert estimator.score(x, y) > 0.6


def test_a_method_that_needs_scores_is_refused() -> None:
    x, y = blobs()
    with pytest.raises(ValueError, match=r"method='noiseout' decides by a validation score"):
        SparseMLPClassifier(method="noiseout").fit(x, y)


@pytest.mark.parametrize("learns", ["fit", "partial_fit"])
def test_same_seed_same_network(learns: str) -> None:
    x, y = blobs()

    def made(seed: int, threads: int) -> np.ndarray:
        estimator = SparseMLPClassifier(max_epochs=8, random_state=seed, n_jobs=threads)
        if learns == "fit":
            return estimator.fit(x, y).predict_proba(x)
        for _ in range(4):
            estimator.partial_fit(x, y, [0, 1])
        return estimator.predict_proba(x)

    np.testing.assert_array_equal(made(3, 1), made(3, 2))
    assert not np.array_equal(made(3, 1), made(4, 1))


def test_partial_fit_goes_on_after_a_pickle_bit_exactly() -> None:
    x, y = blobs()
    plain = SparseMLPClassifier(30, method="rigl", random_state=1, batch_size=32)
    stored = clone(plain)
    for epoch in range(6):
        plain.partial_fit(x, y, classes=[0, 1])
        stored.partial_fit(x, y, classes=[0, 1])
        if epoch % 2:
            stored = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(stored))))
    np.testing.assert_array_equal(plain.predict_proba(x), stored.predict_proba(x))
    assert plain.n_iter_ == stored.n_iter_ == 6


def test_a_pickle_holds_no_tensor_of_torch() -> None:
    x, y = blobs()
    content = pickle.dumps(SparseMLPClassifier(max_epochs=2).partial_fit(x, y, [0, 1]))
    assert b"torch" not in content.replace(b'"torch', b"").replace(b"rewire", b"")
    assert len(content) < 60_000


def test_a_sparse_matrix_trains_as_its_dense_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs()
    x = np.where(np.abs(x) > 1, x, 0.0)
    settings = {"max_epochs": 5, "random_state": 0, "batch_size": 50}
    dense = SparseMLPClassifier(**settings).fit(x, y)
    most = []
    whole = sparse.csr_array.toarray

    def watched(self: Any, *args: Any, **options: Any) -> np.ndarray:
        most.append(self.shape[0])
        found: np.ndarray = whole(self, *args, **options)
        return found

    monkeypatch.setattr(sparse.csr_array, "toarray", watched)
    thin = SparseMLPClassifier(**settings).fit(sparse.csr_array(x), y)
    assert max(most) == 50
    np.testing.assert_array_equal(dense.predict_proba(x), thin.predict_proba(sparse.csr_array(x)))


def test_wide_data_costs_its_connections() -> None:
    x = sparse.random_array((60, 300_000), density=1e-4, format="csr", rng=0)
    y = np.arange(60) % 2
    found = SparseMLPClassifier(500, connections=5_000, max_epochs=2, random_state=0).fit(x, y)
    assert found.network_[0].weight.connections < 5_000  # of 150 million
    assert found.feature_counts_.shape == (300_000,)
    assert len(pickle.dumps(found)) < 1_000_000


def test_weights_count_as_repetitions_do() -> None:
    x, y = blobs()
    weight = np.arange(300) % 3
    settings = {"random_state": 0, "batch_size": 1_000, "max_epochs": 8, "shuffle": False}
    weighted = SparseMLPClassifier(**settings).fit(x, y, sample_weight=weight)
    repeated = SparseMLPClassifier(**settings).fit(np.repeat(x, weight, 0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.predict_proba(x), repeated.predict_proba(x), atol=1e-8)


def test_class_weights_move_the_decision() -> None:
    x, y = blobs()
    settings = {"max_epochs": 20, "random_state": 0, "density": 0.05}
    shares = [
        SparseMLPClassifier(class_weight={0: 1, 1: w}, **settings).fit(x, y).predict(x).mean()
        for w in (0.01, 1, 100)
    ]
    assert shares[0] < shares[1] < shares[2]


def test_early_stopping_keeps_the_best_network() -> None:
    x, y = blobs()
    settings = {"random_state": 0, "learning_rate": "constant", "early_stopping": True}
    found = SparseMLPClassifier(max_epochs=150, n_iter_no_change=5, **settings).fit(x, y)
    assert found.n_iter_ < 150
    assert found.best_validation_score_ == max(found.validation_scores_)
    # the score of the network that is kept, on the samples that were held out
    held = train_test_split(np.arange(300), test_size=0.1, random_state=0, stratify=y)[1]
    assert found.score(x[held], y[held]) == found.best_validation_score_


def test_early_stopping_waits_for_the_budget() -> None:
    x, y = blobs()
    found = SparseMLPClassifier(
        30,
        method="one-shot",
        density=0.1,
        max_epochs=40,
        early_stopping=True,
        n_iter_no_change=1,
        random_state=0,
    ).fit(x, y)
    total = sum(w.connections for _, w in sparse_weights(found.network_))
    assert total == round(0.1 * (20 * 30 + 30 * 2))


def test_warm_start_goes_on() -> None:
    x, y = blobs()
    found = SparseMLPClassifier(warm_start=True, max_epochs=10, random_state=0).fit(x, y)
    first = found.loss_
    assert found.fit(x, y).loss_ < first
    with pytest.raises(ValueError, match=r"goes on with a network of 20 inputs"):
        found.fit(x[:, :5], y)
    with pytest.raises(ValueError, match=r"goes on with the classes"):
        found.fit(x, y + 1)


@pytest.mark.parametrize("call", ["fit", "partial_fit"])
@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)])
def test_going_on_with_data_of_another_dtype(call: str, dtypes: tuple[type, type]) -> None:
    x, y = blobs()
    for model in (SparseMLPClassifier, SparseMLPRegressor):
        made = model(16, max_epochs=2, warm_start=True, early_stopping=True, random_state=0)
        made.fit(x.astype(dtypes[0]), y)
        getattr(made, call)(x.astype(dtypes[1]), y)
        kind = torch.float32 if dtypes[0] is np.float32 else torch.float64
        assert next(made.network_.parameters()).dtype == kind
        made.predict(x)


def test_scores_of_an_earlier_fit_do_not_stay() -> None:
    x, y = blobs()
    made = SparseMLPClassifier(16, max_epochs=4, early_stopping=True, random_state=0).fit(x, y)
    assert made.best_validation_score_ == max(made.validation_scores_)
    made.set_params(early_stopping=False).fit(x, y)
    assert made.best_validation_score_ is made.validation_scores_ is None


def test_whole_floats_with_many_values_are_no_classes() -> None:
    x, _ = blobs()
    y = np.round(100 * x[:, 0])  # floats, all whole, as the diabetes set has them
    found = ConnectivitySelector(
        1, hidden_layer_sizes=20, max_epochs=2, early_stopping=True, random_state=0
    ).fit(x, y)
    assert found.network_[-1].out_features == 1


@pytest.mark.parametrize("method", TRAINED)
def test_partial_fit_takes_what_needs_no_end_and_pickles_it(method: str) -> None:
    x, y = blobs()
    made = SparseMLPClassifier(16, method=method, random_state=0)
    entry = methods.info(method)
    if entry.cls.starts_dense or entry.start_density is not None:
        with pytest.raises(ValueError, match="and partial_fit has no end: use fit"):
            made.partial_fit(x, y, classes=[0, 1])
        return
    for _ in range(3):
        made.partial_fit(x, y, classes=[0, 1])
    again = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(again.predict_proba(x), made.predict_proba(x))


@pytest.mark.parametrize("method", ["halo", "ternary"])
def test_budgets_of_methods_that_start_dense(method: str) -> None:
    x, y = blobs()
    size = 20 * 50 + 50 * 2
    for given, most in (({"connections": 110}, 110), ({"density": 0.2}, 0.2 * size)):
        settings = {"method": method, "max_epochs": 4, "random_state": 0, **given}
        found = SparseMLPClassifier(50, **settings).fit(x, y)
        assert 0.9 * most <= sum(w.connections for _, w in sparse_weights(found.network_)) <= most
    with pytest.raises(ValueError, match="begins with a dense network, and warm_start=True goes"):
        found.set_params(warm_start=True).fit(x, y)
    with pytest.raises(ValueError, match="finds out how many connections to keep"):
        SparseMLPClassifier(method="differentiable", density=0.1).fit(x, y)


def test_targets_are_scaled_by_what_is_trained_on() -> None:
    x, _ = blobs()
    held = train_test_split(np.arange(300), test_size=0.1, random_state=0)[1]
    y = x[:, 0].copy()
    y[held] = 1e9  # must have no influence on the network
    settings = {"max_epochs": 3, "early_stopping": True, "random_state": 0}
    found = SparseMLPRegressor(20, **settings).fit(x, y)
    assert np.abs(found.predict(x)).max() < 100
    with pytest.raises(ValueError, match=r"holds out one, which has no R\^2"):
        SparseMLPRegressor(20, **settings, validation_fraction=0.1).fit(x[:10], y[:10])


@pytest.mark.parametrize("method", ["one-shot", "set"])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_short_trainings_are_scored(method: str, epochs: int) -> None:
    x, y = blobs()
    settings = {"method": method, "max_epochs": epochs, "early_stopping": True}
    found = SparseMLPClassifier(20, random_state=0, **settings).fit(x, y)
    assert found.best_validation_score_ in found.validation_scores_


def test_targets_of_any_scale_are_learnt() -> None:
    x, y = make_regression(300, 8, n_informative=4, random_state=0)
    for scale, shift in ((1.0, 0.0), (1e6, -1e7), (1e-6, 1e-3)):
        target = scale * y / y.std() + shift
        found = SparseMLPRegressor(max_epochs=100, density=0.3, random_state=0).fit(x, target)
        assert found.score(x, target) > 0.9
    both = np.stack([y, -3 * y], 1)
    found = SparseMLPRegressor(max_epochs=100, density=0.3, random_state=0).fit(x, both)
    assert found.predict(x).shape == (300, 2)
    assert found.score(x, both) > 0.9


def test_the_informative_features_are_selected() -> None:
    x, y = blobs(200)
    selector = ConnectivitySelector(10, hidden_layer_sizes=50, density=0.02, random_state=0)
    kept = selector.fit(x, y).get_support(indices=True)
    assert len(kept) == 10
    assert len({0, 1, 2, 3, 4} & set(kept)) >= 4  # by chance 0.25
    by_counts = ConnectivitySelector(
        0.05, importance="counts", hidden_layer_sizes=50, density=0.02, random_state=0
    ).fit(x, y)
    assert by_counts.get_support().sum() == 10
    values, _ = make_regression(200, 30, n_informative=3, random_state=0)
    target = values[:, 7] * 2
    assert ConnectivitySelector(1, random_state=0).fit(values, target).get_support()[7]


def test_pipelines_grids_and_frames() -> None:
    pandas = pytest.importorskip("pandas")
    x, y = load_iris(return_X_y=True)
    frame = pandas.DataFrame(x, columns=["a", "b", "c", "d"])
    selector = ConnectivitySelector(2, max_epochs=20, random_state=0)
    chosen = selector.set_output(transform="pandas").fit_transform(frame, y)
    assert list(chosen.columns) == list(selector.get_feature_names_out())
    assert set(chosen.columns) < {"a", "b", "c", "d"}
    model = make_pipeline(
        StandardScaler(), SparseMLPClassifier(30, max_epochs=50, batch_size=20, random_state=0)
    )
    assert cross_val_score(model, frame, y, cv=3).mean() > 0.9
    grid = GridSearchCV(model, {"sparsemlpclassifier__density": [0.05, 0.3]}, cv=2, n_jobs=2).fit(
        frame, y
    )
    assert grid.best_score_ > 0.85
    named = np.array(["setosa", "versicolor", "virginica"])[y]
    assert set(model.fit(frame, named).predict(frame)) == set(named)


def test_polars_frames() -> None:
    polars = pytest.importorskip("polars")
    x, y = load_iris(return_X_y=True)
    frame = polars.DataFrame(x, schema=["a", "b", "c", "d"])
    found = ConnectivitySelector(2, max_epochs=5, random_state=0).set_output(transform="polars")
    assert found.fit_transform(frame, y).columns == list(found.get_feature_names_out())


def test_float32_stays_float32() -> None:
    x, y = blobs()
    found = SparseMLPClassifier(max_epochs=2).fit(x.astype(np.float32), y)
    assert isinstance(found.network_[0], SparseLinear)
    assert found.network_[0].weight.dtype == torch.float32
    assert found.predict_proba(x.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.1, "connections": 5}, "give density or connections, not both"),
        ({"density": 1.5}, "density must be above 0 and at most 1"),
        ({"connections": 0}, "connections must be a whole number"),
        ({"method": "sett"}, "did you mean 'set'"),
        ({"method_params": {"fractoin": 0.1}}, "did you mean 'fraction'"),
        ({"activation": "gelu"}, "activation must be one of identity, logistic, relu, tanh"),
        ({"solver": "lbfgs"}, "solver must be one of"),
        ({"distribution": "x"}, "distribution must be one of"),
        ({"learning_rate": "invscaling"}, "learning_rate must be one of constant, cosine"),
        ({"hidden_layer_sizes": (3, 0)}, "hidden_layer_sizes must be positive"),
        ({"batch_size": 0}, "batch_size must be 'auto' or"),
        ({"max_epochs": 0}, "max_epochs must be 'auto' or"),
        ({"n_jobs": 0}, "n_jobs must be None or"),
        ({"early_stopping": True, "validation_fraction": 1.0}, "validation_fraction must lie"),
        ({"method": "deep-r", "alpha": 0.1}, "weight decay"),
    ],
)
def test_bad_parameters_are_named(settings: dict[str, Any], message: str) -> None:
    x, y = blobs()
    with pytest.raises(ValueError, match=message):
        SparseMLPClassifier(**{"max_epochs": 2} | settings).fit(x, y)


def test_bad_data_is_named() -> None:
    x, y = blobs()
    with pytest.raises(NotFittedError):
        SparseMLPClassifier().predict(x)
    with pytest.raises(ValueError, match=r"classes must be given to the first call"):
        SparseMLPClassifier().partial_fit(x, y)
    begun = SparseMLPClassifier().partial_fit(x, y, [0, 1])
    with pytest.raises(ValueError, match=r"y has the classes \[2\]"):
        begun.partial_fit(x, y + 1)
    with pytest.raises(ValueError, match=r"are not those of the first call"):
        begun.partial_fit(x, y, [0, 1, 2])
    with pytest.raises(ValueError, match=r"class_weight='balanced' needs all data"):
        SparseMLPClassifier(class_weight="balanced").partial_fit(x, y, [0, 1])
    with pytest.raises(ValueError, match=r"training diverged in epoch"):
        SparseMLPClassifier(solver="sgd", learning_rate_init=1e30, max_epochs=5).fit(x, y)
    with pytest.raises(ValueError, match=r"n_features_to_select must be None"):
        ConnectivitySelector(21).fit(x, y)
    with pytest.raises(ValueError, match=r"importance must be 'counts' or 'strength'"):
        ConnectivitySelector(importance="gain").fit(x, y)
