"""What every registered method owes: run over the registry, so a new method gets these tests by
being registered.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch

from harness import (
    CASES,
    LAYERS,
    OPTIMIZERS,
    SETTINGS,
    SHARING,
    Run,
    assert_identical,
    assert_plain,
    case_id,
    check_resume,
)
from rewire import methods, topology
from rewire.nn import Event, SparseWeight

Case = tuple[str, dict[str, Any]]
all_cases = pytest.mark.parametrize("case", CASES, ids=case_id)
RECURRENT = ["rnn", "lstm", "gru"]


def on_layers(layers: list[list[str]], run: int = 1) -> pytest.MarkDecorator:
    """Each case on one of these lists of layers; the next list after ``run`` cases."""
    return pytest.mark.parametrize(
        ("case", "layer"),
        [
            (case, layer)
            for number, case in enumerate(CASES)
            for layer in layers[number // run % len(layers)]
        ],
        ids=lambda value: value if isinstance(value, str) else case_id(value),
    )


#: Every case on every kind of layer, which differ in one cell for the three recurrent ones: on one
#: of these in turn, for as many cases as there are optimizers, so that each meets each of those.
all_layers = on_layers(
    [[layer for layer in LAYERS if layer == one or layer not in RECURRENT] for one in RECURRENT],
    run=len(OPTIMIZERS),
)
#: For what hardly depends on the layer: every case on two of them, in turn.
two_layers = on_layers([[*LAYERS][k::3] for k in range(3)])

#: When to stop, and whether the model is restored before the method is made. Every second one has
#: all stops and orders.
RESUMES = [(3, True), (3, False), (4, False), (4, True), (6, True), (6, False)]


def optimizer_of(case: Case, layer: str) -> str:
    """The optimizer with which a case is tested on a layer: each case meets all, so does each
    layer.
    """
    turn = CASES.index(case) + list(LAYERS).index(layer) // 2
    return list(OPTIMIZERS)[turn % len(OPTIMIZERS)]


def turn(case: Case, layer: str) -> int:
    """A number that spreads a further choice evenly over (case, layer), instead of testing all of
    it.
    """
    return CASES.index(case) + list(LAYERS).index(layer)


def assert_sound(weight: SparseWeight) -> None:
    """The pool is what it says: counts, empties, no duplicates, an index equal to one built from
    nothing.
    """
    active = weight.rows >= 0
    assert int(active.sum()) == weight.connections
    assert not weight.values[~active].any()
    # raises on duplicates
    fresh = topology.build_index(weight.rows, weight.cols, *weight.matrix_shape)
    for mine, new in zip(weight.index, fresh, strict=True):
        assert torch.equal(mine, new)


def per_slot_state(run: Run, weight: SparseWeight) -> dict[str, torch.Tensor]:
    state = run.optimizer.state[weight.values]
    return {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()}


@all_layers
def test_budget_is_exact_after_every_step(case: Case, layer: str) -> None:
    dtype = (torch.float32, torch.float64)[turn(case, layer) % 2]
    run = Run(case, layer, optimizer_of(case, layer), dtype)
    entry = methods.info(case[0])
    before = {name: w.connections for name, w in run.weights().items()}
    # K of the layers as they were built
    slots = {name: w.capacity for name, w in run.weights().items()}
    fan_in = {name: w.fan_in() for name, w in run.weights().items()}
    for _ in range(3 * run.steps_per_epoch):
        run.step()
        now = {name: w.connections for name, w in run.weights().items()}
        if entry.keeps_budget == "at most":
            assert all(
                w.connections <= w.capacity == slots[name] for name, w in run.weights().items()
            )
        if entry.keeps_budget == "every step" and not case[1].get("soft"):
            assert sum(now.values()) == sum(before.values())
            if case[1].get("scope") != "network" and case[0] not in SHARING:
                assert now == before
        for name, weight in run.weights().items():
            assert_sound(weight)
            if case[1].get("scope") == "neuron":
                assert torch.equal(weight.fan_in(), fan_in[name])


@all_layers
def test_state_starts_afresh_where_grown_and_is_untouched_elsewhere(case: Case, layer: str) -> None:
    run = Run(case, layer, optimizer_of(case, layer))
    for weight in run.weights().values():
        weight.resize(min(weight.connections + 8, weight.size))  # empty slots as well
    for _ in range(2 * run.steps_per_epoch):
        run.backward()
        run.optimizer.step()
        before = {name: per_slot_state(run, w) for name, w in run.weights().items()}
        events: dict[str, list[Event]] = {name: [] for name in before}
        handles = [w.follow(events[name].append) for name, w in run.weights().items()]
        run.method.step()
        run.time += 1
        if run.time % run.steps_per_epoch == 0:
            run.method.end_epoch(run.score)
        for handle in handles:
            handle.remove()
        for name, weight in run.weights().items():
            if any(event.source is not None for event in events[name]):
                continue  # moved as well: resizing has tests of its own
            changed = torch.zeros(weight.capacity, dtype=torch.bool)
            for event in events[name]:
                changed[event.slots] = True
            for key, old in before[name].items():
                new = per_slot_state(run, weight)[key]
                # An empty slot has no age, which is not written as 0.
                fresh = new[changed & (weight.rows >= 0)] if key == "age" else new[changed]
                assert not fresh.any() or case[1].get("moments") == "dense", key
                assert torch.equal(new[~changed], old[~changed]), key
            if weight.values.grad is not None:
                assert not weight.values.grad[changed].any()


@two_layers
def test_same_seed_same_run(case: Case, layer: str) -> None:
    runs = [Run(case, layer, optimizer_of(case, layer)) for _ in range(2)]
    for run in runs:
        torch.manual_seed(torch.seed() % 1000)  # global randomness must not matter
        for _ in range(2 * run.steps_per_epoch + 1):
            run.step()
    assert_identical(runs[0].snapshot(), runs[1].snapshot())
    assert runs[0].method.stats() == runs[1].method.stats()


@all_layers
def test_resume_is_bit_exact(case: Case, layer: str) -> None:
    stop, model_first = RESUMES[turn(case, layer) % 6]
    begin = partial(Run, case, layer, optimizer_of(case, layer))
    # Loaded first, the model has its method made anew, as most people would.
    check_resume(begin, stop, 11, model_first=model_first, remake=True)


@two_layers
def test_frozen_layers_are_left_alone(case: Case, layer: str) -> None:
    run = Run(case, layer)
    name, frozen = next(iter(run.weights().items()))
    frozen.values.requires_grad_(False)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    for _ in range(2 * run.steps_per_epoch):
        run.step()
    assert_identical(before, frozen.state_dict())
    assert run.method.stats()["grown"][name] == 0


@two_layers
def test_copies_are_refused_and_a_second_method_takes_over(case: Case, layer: str) -> None:
    run = Run(case, layer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(run.method)
    first, run.method = run.method, run.make(8)
    for _ in range(run.steps_per_epoch):
        run.step()
    with pytest.raises(RuntimeError, match="another was made"):
        first.step()


@all_cases
def test_an_optimizer_that_does_not_train_the_model_is_noticed(case: Case) -> None:
    run = Run(case)
    with pytest.raises(RuntimeError, match="no step of the method's optimizer"):
        run.method.end_epoch()


@two_layers
def test_state_dict_is_plain(case: Case, layer: str) -> None:
    run = Run(case, layer)
    run.step()
    assert_plain(run.method.state_dict())


@two_layers
def test_a_skipped_optimizer_step_changes_nothing(case: Case, layer: str) -> None:
    run = Run(case, layer)
    run.step()
    before, stats = run.snapshot(), run.method.stats()
    run.backward()
    run.method.step()  # no optimizer.step(), as after a GradScaler that found infinities
    assert_identical(before, run.snapshot())
    assert run.method.stats() == stats


@two_layers
def test_stats_count_what_happened(case: Case, layer: str) -> None:
    run = Run(case, layer)
    changed = dict.fromkeys(run.weights(), 0)
    for _ in range(3 * run.steps_per_epoch):
        handles = []
        for name, weight in run.weights().items():

            def count(event: Event, name: str = name) -> None:
                changed[name] += event.slots.numel()

            handles.append(weight.follow(count))
        run.step()
        for handle in handles:
            handle.remove()
    stats = run.method.stats()
    for name in changed:
        dropped, grown = stats["dropped"][name], stats["grown"][name]
        varies = case[1].get("scope") == "network" or methods.info(case[0]).keeps_budget in (
            "no",
            "at most",
        )
        # what one update drops another may grow
        if varies or case[0] in SHARING or case[1].get("soft"):
            assert (
                max(dropped, grown) <= changed[name] <= dropped + grown
                or methods.info(case[0]).keeps_budget == "no"
            )
        else:
            assert changed[name] == max(dropped, grown)
        assert (
            run.weights()[name].connections
            == Run(case, layer).weights()[name].connections + grown - dropped
        )


@two_layers
def test_finalize_leaves_a_plain_model(case: Case, layer: str) -> None:
    run = Run(case, layer)
    for _ in range(2 * run.steps_per_epoch + 1):  # the cuts of methods that shrink have been made
        run.step()
    x = torch.randn(3, 12)
    before = run.model(x)
    model = run.method.finalize()
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-5)
    for weight in run.weights().values():
        assert not weight.followers
        assert weight.capture is None
    with pytest.raises(RuntimeError, match="finalized"):
        run.method.step()
    with pytest.raises(RuntimeError, match="finalized"):
        run.method.end_epoch()


@pytest.mark.parametrize("name", methods.available())
def test_registry_describes_the_method(name: str) -> None:
    entry = methods.info(name)
    assert entry.paper
    assert entry.guarantees
    assert "\n" not in entry.summary
    assert entry.memory in ("O(K)", "O(M)")
    assert entry.keeps_budget in ("every step", "every update", "at most", "no")
    for parameter in entry.parameters().values():
        assert parameter.help, f"{name}: {parameter.name} is not described in the class docstring"
        assert parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    "name", [n for n in methods.available() if not methods.info(n).cls.starts_dense]
)
def test_state_of_another_method_or_model_is_refused(name: str) -> None:
    run = Run((name, SETTINGS.get(name, [{}])[0]))
    state = run.method.state_dict()
    with pytest.raises(ValueError, match="state of Nothing"):
        run.method.load_state_dict(state | {"method": "Nothing"})
    with pytest.raises(ValueError, match="incomplete or damaged"):
        run.method.load_state_dict({k: v for k, v in state.items() if k != "epochs"})
    with pytest.raises(ValueError, match="model with weights"):
        run.method.load_state_dict(state | {"dropped": {"elsewhere.weight": 0}})


@all_cases
def test_sorting_the_slots_changes_nothing_but_their_order(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are put in order by a count that is saved; a resumed run sorts at the same step, and K
    stays exact.
    """
    monkeypatch.setattr(methods.Method, "sort_from", 1)
    whole, first = Run(case, optimizer="adam"), Run(case, optimizer="adam")
    moves = 0

    def count(event: Event) -> None:
        nonlocal moves
        moves += event.source is not None

    for weight in whole.weights().values():
        weight.follow(count)
    for _ in range(24):
        whole.step()
        for weight in whole.weights().values():
            assert_sound(weight)
    for _ in range(11):
        first.step()
    saved = copy.deepcopy(
        [first.model.state_dict(), first.optimizer.state_dict(), first.method.state_dict()]
    )
    second = Run(case, optimizer="adam", seed=99, method_seed=1234)
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.method.load_state_dict(saved[2])
    second.time = 11
    for _ in range(13):
        second.step()
    assert_identical(whole.snapshot(), second.snapshot())
    stats = whole.method.stats()
    expected = {
        name
        for name, grown in stats["grown"].items()
        if grown >= 2 * whole.weights()[name].connections
    }
    assert moves > 0 or not expected


def test_sorted_slots_compute_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """SET with and without sorting: bit-identical networks, because the kernels read by
    position.
    """
    networks = []
    for sort_from in (1, 1 << 40):
        monkeypatch.setattr(methods.Method, "sort_from", sort_from)
        run = Run(("set", {"every": 1, "fraction": 0.5}), optimizer="adam")
        for _ in range(12):
            run.step()
        networks.append({name: weight.coo() for name, weight in run.weights().items()})
    for name in networks[0]:
        for one, other in zip(networks[0][name], networks[1][name], strict=True):
            assert torch.equal(one, other)
