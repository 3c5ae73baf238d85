"""What every registered method that starts dense owes; a new one gets these tests by being
registered.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import parametrize

from dense_harness import CASES, MODELS, OPTIMIZERS, DenseRun, case_id, cuts_at_the_end
from harness import assert_identical, assert_plain, check_resume
from rewire import methods
from rewire.nn import SparseWeight
from rewire.nn.surgery import load_resized

pytest.importorskip("torch_pruning")

Case = tuple[str, dict[str, Any]]
PLAIN = ("torch.nn.", "rewire.nn.")
all_cases = pytest.mark.parametrize("case", CASES, ids=case_id)
all_models = pytest.mark.parametrize("model", MODELS)


def turn(case: Case, model: str) -> int:
    """A number that spreads a further choice evenly over (case, model), instead of testing all of
    it.
    """
    return CASES.index(case) + list(MODELS).index(model)


def optimizer_of(case: Case, model: str) -> str:
    """The optimizer with which a case is tested on a model: each case meets both, so does each
    model.
    """
    return list(OPTIMIZERS)[turn(case, model) % len(OPTIMIZERS)]


@all_cases
@all_models
def test_same_seed_same_run(case: Case, model: str) -> None:
    runs = [DenseRun(case, model, optimizer_of(case, model)) for _ in range(2)]
    for run in runs:
        torch.manual_seed(torch.seed() % 1000)  # global randomness must not matter
        for _ in range(2 * run.steps_per_epoch + 1):
            run.step()
    assert_identical(runs[0].snapshot(), runs[1].snapshot())
    assert runs[0].method.stats() == runs[1].method.stats()


@all_cases
@all_models
@pytest.mark.parametrize("model_first", [True, False], ids=["model-first", "method-first"])
def test_resume_is_bit_exact(case: Case, model: str, model_first: bool) -> None:
    optimizers = list(OPTIMIZERS)
    begin = partial(DenseRun, case, model, optimizers[(turn(case, model) + model_first) % 2])
    stop = (4, 9)[(CASES.index(case) + model_first) % 2]
    whole, second = check_resume(begin, stop, 13, model_first=model_first, load=load_resized)
    x = whole.batch()[0]
    assert torch.equal(whole.method.finalize().eval()(x), second.method.finalize().eval()(x))
    assert_identical(whole.snapshot(), second.snapshot())


@all_cases
@all_models
@pytest.mark.filterwarnings(
    "ignore:The tensor attributes self.body._flat_weights"
)  # torch's own, of any nn.LSTM
def test_the_final_model_is_plain_and_trains_on(case: Case, model: str) -> None:
    run = DenseRun(case, model, optimizer_of(case, model))
    for _ in range(3 * run.steps_per_epoch):
        run.step()
    x, y = run.batch()
    before = run.model.eval()(x).detach()
    final = run.method.finalize()
    assert final is run.model
    after = final(x).detach()
    if not cuts_at_the_end(*case):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    for name, module in final.named_modules():
        assert type(module).__module__.startswith(PLAIN) or name == "", name
        assert not parametrize.is_parametrized(module), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    live = list(final.parameters())
    assert sorted(id(p) for g in run.optimizer.param_groups for p in g["params"]) == sorted(
        map(id, live)
    )
    exported = torch.export.export(final, (x,)).module()
    torch.testing.assert_close(exported(x), after, rtol=1e-5, atol=1e-5)
    old = [p.detach().clone() for p in live]
    final.train()
    for _ in range(2):
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(final(x), y).backward()
        run.optimizer.step()
    assert all(p.grad is not None for p in live)
    for p in live:
        assert p.grad is not None
        assert all(v.shape == p.shape for v in run.optimizer.state[p].values() if v.dim()), (
            "state was cut along"
        )
    assert any(not torch.equal(a, b) for a, b in zip(old, live, strict=True))


@all_cases
@all_models
def test_the_file_is_smaller_in_proportion(case: Case, model: str) -> None:
    """4 bytes for each number that is trained, 8 for where a connection is, and a name for each
    tensor.
    """
    run = DenseRun(case, model)
    for _ in range(3 * run.steps_per_epoch):
        run.step()
    final = run.method.finalize()
    pools = [module for module in final.modules() if isinstance(module, SparseWeight)]
    assert all(weight.capacity == weight.connections for weight in pools), (
        "nothing is stored of what is gone"
    )
    size = 4 * sum(p.numel() for p in final.parameters())
    size += sum(8 * weight.connections + 8 * len(weight.shape) for weight in pools)
    norms = (module for module in final.modules() if isinstance(module, nn.BatchNorm2d))
    size += sum(
        buffer.numel() * buffer.element_size() for norm in norms for buffer in norm.buffers()
    )
    tensors = final.state_dict()
    assert size < len(save(tensors)) < size + 8 + 120 * len(tensors)


@all_cases
@all_models
def test_copies_are_refused_and_a_second_method_takes_over(case: Case, model: str) -> None:
    run = DenseRun(case, model)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(run.method)
    copy.deepcopy(run.model)  # the model can be copied: it is the user's
    first, run.method = run.method, run.make(8)
    for _ in range(run.steps_per_epoch):
        run.step()
    with pytest.raises(RuntimeError, match="another was made"):
        first.step()


@all_cases
def test_an_optimizer_that_does_not_train_the_model_is_noticed(case: Case) -> None:
    with pytest.raises(RuntimeError, match="no step of the method's optimizer"):
        DenseRun(case).method.end_epoch()


@all_cases
@all_models
def test_a_skipped_optimizer_step_changes_nothing(case: Case, model: str) -> None:
    run = DenseRun(case, model)
    for _ in range(5):
        run.step()
    before, stats = run.snapshot(), run.method.stats()
    run.method.step()  # no optimizer.step(), as after a GradScaler that found infinities
    assert_identical(before, run.snapshot())
    assert run.method.stats() == stats


@all_cases
@all_models
def test_state_dict_is_plain(case: Case, model: str) -> None:
    run = DenseRun(case, model)
    for _ in range(5):
        run.step()
    assert_plain(run.method.state_dict())


@all_cases
def test_state_of_another_method_is_refused(case: Case) -> None:
    run = DenseRun(case)
    run.step()
    state = run.method.state_dict()
    with pytest.raises(ValueError, match="state of Nothing"):
        run.method.load_state_dict(state | {"method": "Nothing"})
    with pytest.raises(ValueError, match="incomplete or damaged"):
        run.method.load_state_dict({k: v for k, v in state.items() if k != "epochs"})
    assert methods.info(case[0]).takes_data or run.method.stats()["steps"] == 1
