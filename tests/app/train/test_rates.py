import pytest
import torch

from rewire.app.errors import TrainError
from rewire.app.train.config import make_config
from rewire.app.train.rates import rate_at


def rates(**options: object) -> list[float]:
    config = make_config({"epochs": 8, "lr": 1.0, **options})
    return [rate_at(config, 10, step) for step in range(80)]


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    expected = []
    for _ in range(80):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates() == pytest.approx(expected)


def test_steps_and_exponentials() -> None:
    found = rates(schedule="step")
    assert found[::10] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    assert rates(milestones=[2], lr_decay=0.5)[::10] == [1, 1] + [0.5] * 6
    assert rates(lr_decay=0.5)[::10] == [0.5**n for n in range(8)]
    assert set(rates(schedule="constant")) == {1.0}


def test_warm_up_rises_in_a_line_to_the_full_rate() -> None:
    found = rates(warmup=2, schedule="constant")
    assert found[:20] == pytest.approx([(n + 1) / 20 for n in range(20)])
    assert set(found[20:]) == {1.0}
    assert rates(warmup=2)[20] == 1.0
    assert rates(warmup=2)[79] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine", "lr_decay": 0.5}, "--lr-decay: --schedule is cosine"),
        ({"schedule": "exponential"}, "needs --lr-decay"),
        ({"schedule": "constant", "milestones": [3]}, "--milestones: --schedule is constant"),
        ({"epochs": 3, "warmup": 3}, "--warmup: given 3 epochs of 3"),
        ({"clip": 0}, "--clip: given 0, allowed is a number greater than 0"),
        ({"precision": "int8"}, "--precision: given int8"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        make_config(options)
