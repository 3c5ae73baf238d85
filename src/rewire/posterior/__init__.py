"""Averages over sampled networks: DEEP R samples a posterior, so use more than its last network.

    posterior = rewire.posterior.Posterior(model, burn_in=30_000, every=500) for x, y in loader:
        ...                         # loss, backward, optimizer.step(), method.step()
        posterior.update()
    prediction = posterior.predict(test_x)  # .mean: averaged probabilities; .std, .entropy ...
    scores(prediction.mean, test_y)         # accuracy, likelihood, calibration error, Brier score
    posterior.inputs()                      # share of the samples in which each input is connected

This works with any model with sparse weights and any method that changes them. With a method that
does not sample a posterior, the samples are an ensemble of networks along the training.
"""

from rewire.posterior.samples import Inclusion, Posterior, Prediction
from rewire.posterior.scores import (
    Bins,
    accuracy,
    brier_score,
    entropy,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
    scores,
)

__all__ = [
    "Bins",
    "Inclusion",
    "Posterior",
    "Prediction",
    "accuracy",
    "brier_score",
    "entropy",
    "expected_calibration_error",
    "negative_log_likelihood",
    "reliability",
    "scores",
]
