"""What a method learns about gradients is what is in ``.grad`` when the optimizer steps, whatever
the loop does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rewire
from harness import LAYERS
from rewire import methods
from rewire.methods.core.recording import Status
from rewire.methods.criteria import drop, gradients, grow
from rewire.methods.criteria.topk import Gradients, recorded
from rewire.nn import SparseLinear, sparse_weights

DOUBLE = torch.float64


class Watch(methods.Static):
    """Asks for the gradients of every step, and shows them as dense matrices in the optimizer's
    scale.
    """

    candidates: int | None = None

    def _wants_capture(self, step: int) -> bool:
        return True

    def _prepare(self, pool: methods.Pool) -> None:
        gradients.request(pool, self.candidates, self.seed, self.steps + 1)

    def _after_step(self, pools: list[methods.Pool]) -> None:
        self.found: dict[str, Tensor] = {}
        self.status = {pool.name: gradients.status(pool) for pool in pools}
        for pool in pools:
            weight, scale = pool.weight, recorded(pool).scale()
            if weight.candidates is None:
                dense = Gradients(pool).block(0, weight.matrix_shape[0])
            else:
                own, new = gradients.probed(pool)
                dense = torch.zeros(weight.matrix_shape, dtype=DOUBLE)
                active = weight.active()
                dense[weight.rows[active].long(), weight.cols[active].long()] = own[active].double()
                dense[weight.candidates.rows, weight.candidates.cols] = new.double()
            self.found[pool.name] = dense * scale


class Sampled(Watch):
    candidates = 10**6  # all dormant positions


def twin_of(model: nn.Module) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """A dense copy, and its gradients as the matrices of the sparse weights."""
    dense = rewire.densify(copy.deepcopy(model))

    def found() -> dict[str, Tensor]:
        result = {}
        stacked = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}
        for name, weight in sparse_weights(model):
            module, _, leaf = name.rpartition(".")
            owner = dense.get_submodule(module)
            gradient = (
                owner.in_proj_weight.grad.chunk(3)[stacked[leaf]]
                if leaf in stacked and owner.in_proj_weight is not None
                else owner.get_parameter(leaf).grad
            )
            result[name] = (
                torch.zeros(weight.matrix_shape)
                if gradient is None
                else gradient.reshape(weight.matrix_shape)
            )
        return result

    return dense, found


def stepped(kind: type[Watch], model: nn.Module) -> tuple[torch.optim.Optimizer, Watch]:
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    return optimizer, kind(model, optimizer, seed=0)


both = pytest.mark.parametrize("kind", [Watch, Sampled])


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in b:
        torch.testing.assert_close(
            a[name].double(), b[name].double(), rtol=1e-6, atol=1e-9, msg=name
        )


def penalised(net: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    y = net(x)
    (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (((g.norm(dim=1) - 1) ** 2).mean() + y.square().mean()).backward()


def third_order(net: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    h.square().sum().backward()


@both
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("loss", [penalised, third_order])
def test_gradients_of_higher_order_are_complete(kind: type[Watch], layer: str, loss: Any) -> None:
    """A gradient penalty's gradients at all positions are those of the dense twin."""
    torch.manual_seed(0)
    model = LAYERS[layer](DOUBLE, 5)
    dense, truth = twin_of(model)
    optimizer, method = stepped(kind, model)
    x = torch.randn(4, 12, dtype=DOUBLE)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for net in (model, dense):
            loss(net, x)
    optimizer.step()
    method.step()
    close(method.found, truth())


def test_an_inner_step_of_gradient_descent_is_differentiated() -> None:
    """As in MAML, where connections that exist take part in the inner step."""
    torch.manual_seed(0)
    model = LAYERS["linear"](DOUBLE, 5)
    found = []
    for kind in (Watch, Sampled):
        net = copy.deepcopy(model)
        optimizer, method = stepped(kind, net)
        names, x = dict(net.named_parameters()), torch.linspace(-1, 1, 48, dtype=DOUBLE).view(4, 12)
        inner = torch.autograd.grad(net(x).square().sum(), list(names.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(names.items(), inner, strict=True)}
        torch.func.functional_call(net, fast, (x.flip(0),)).square().sum().backward()
        optimizer.step()
        method.step()
        found.append(method.found)
    close(found[0], found[1])


def test_a_dense_matrix_made_of_the_weight_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(6, 5, density=0.3, dtype=DOUBLE))
    dense, truth = twin_of(model)
    optimizer, method = stepped(Watch, model)
    x = torch.randn(4, 6, dtype=DOUBLE)
    for net, w in ((model, model[0].weight.to_dense()), (dense, dense[0].weight)):
        (net(x).square().sum() + (w @ w.T).square().sum()).backward()
    optimizer.step()
    method.step()
    close(method.found, truth())


# --- loops ----------------------------------------------------------------------------------------


def usual(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    net(x).square().sum().backward()


def broken_batch(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    net(x * float("nan")).square().sum().backward()
    o.zero_grad()
    usual(net, o, x)


def broken_batch_kept_tensors(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    net(x + 1).square().sum().backward()
    o.zero_grad(set_to_none=False)
    usual(net, o, x)


def thrown_away_by_hand(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    net(x + 1).square().sum().backward()
    for p in net.parameters():
        p.grad = None
    usual(net, o, x)


def micro_batches(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    for part in x.split(2):
        usual(net, o, part)


def one_forward_zeroed_before_backward(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    usual(net, o, x - 1)
    loss = net(x).square().sum()
    o.zero_grad()
    loss.backward()


def attack_by_grad(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    """PGD: gradients of the input only."""
    attacked = x.clone().requires_grad_()
    for _ in range(2):
        (g,) = torch.autograd.grad(net(attacked).square().sum(), attacked)
        attacked = (attacked + 0.1 * g.sign()).detach().requires_grad_()
    usual(net, o, attacked.detach())


def attack_by_backward(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    attacked = x.clone().requires_grad_()
    net(attacked).square().sum().backward()
    o.zero_grad()
    usual(net, o, (x + 0.1 * attacked.grad.sign()).detach())  # type: ignore[union-attr]


def attack_by_inputs(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    attacked = x.clone().requires_grad_()
    net(attacked).square().sum().backward(inputs=[attacked])
    usual(net, o, (x + 0.1 * attacked.grad.sign()).detach())  # type: ignore[union-attr]


def gradients_looked_at(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    torch.autograd.grad(net(x).exp().sum(), list(net.parameters()))
    usual(net, o, x)


def two_backwards_of_one_graph(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    y = net(x)
    y.square().sum().backward(retain_graph=True)
    y.sin().sum().backward()


def sharpness_aware(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    """SAM: the gradient at a point nearby, with the first one thrown away."""
    usual(net, o, x)
    with torch.no_grad():
        moves = [0.05 * p.grad.sign() for p in net.parameters()]
        for p, move in zip(net.parameters(), moves, strict=True):
            p.add_(move)
    o.zero_grad()
    usual(net, o, x)
    with torch.no_grad():
        for p, move in zip(net.parameters(), moves, strict=True):
            p.sub_(move)


def clipped(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    usual(net, o, x)
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)


def scaled_by_hand(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    (net(x).square().sum() * 1024).backward()
    for p in net.parameters():
        p.grad = p.grad / 1024  # type: ignore[operator]


def after_an_error(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
    """Out of memory in backward, say, and the batch is tried again."""
    y = net(x)
    z = x.clone().requires_grad_()

    def broken(g: Tensor) -> None:
        raise MemoryError

    z.register_hook(broken)
    with pytest.raises(MemoryError):
        (net(z).square().sum() + y.square().sum()).backward()
    o.zero_grad()
    usual(net, o, x)


def checkpointed(reentrant: bool) -> Any:
    def run(net: nn.Module, o: torch.optim.Optimizer, x: Tensor) -> None:
        x = x.clone().requires_grad_()
        for thrown in (True, False):
            y = net[0](x)
            for part in list(net)[1:]:
                y = checkpoint(part, y, use_reentrant=reentrant)
            y.square().sum().backward()
            if thrown:
                o.zero_grad()

    run.__name__ = f"checkpointed_{reentrant}"
    return run


LOOPS = [
    usual,
    broken_batch,
    broken_batch_kept_tensors,
    thrown_away_by_hand,
    micro_batches,
    one_forward_zeroed_before_backward,
    attack_by_grad,
    attack_by_backward,
    attack_by_inputs,
    gradients_looked_at,
    two_backwards_of_one_graph,
    sharpness_aware,
    clipped,
    scaled_by_hand,
    after_an_error,
    checkpointed(True),
    checkpointed(False),
]


@both
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("after", [None, "zero_grad", "backward"])
def test_gradients_are_those_that_the_optimizer_uses(
    kind: type[Watch], loop: Any, after: str | None
) -> None:
    """At active positions ``.grad`` itself, at the others that of the dense twin; whatever comes
    after the step.
    """
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        SparseLinear(12, 16, density=0.3, generator=g, dtype=DOUBLE),
        nn.Tanh(),
        SparseLinear(16, 16, density=0.3, generator=g, dtype=DOUBLE),
        nn.Tanh(),
        SparseLinear(16, 6, density=0.3, generator=g, dtype=DOUBLE),
    )
    optimizer, method = stepped(kind, model)
    for seed in (0, 1):  # what is left of one step does not reach the next
        dense, truth = twin_of(model)
        x = torch.randn(4, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        # In a dense network SAM moves dormant connections too, and the norm is that of all.
        if loop not in (sharpness_aware, clipped):
            loop(dense, torch.optim.SGD(dense.parameters(), 0.0), x)
        optimizer.zero_grad()
        loop(model, optimizer, x)
        own = {
            name: (w.coo()[:2], w.values.grad[w.active()].clone())
            for name, w in sparse_weights(model)
        }  # type: ignore[index]
        optimizer.step()
        if after == "zero_grad":
            model.zero_grad(set_to_none=bool(seed))
        elif after == "backward":
            (100 * model(x + 3)).square().sum().backward()
        method.step()
        for name, ((rows, cols), gradient) in own.items():
            torch.testing.assert_close(
                method.found[name].double()[rows, cols], gradient, rtol=1e-6, atol=1e-12
            )
        if loop not in (sharpness_aware, clipped):
            close(method.found, truth())


@both
def test_a_step_made_within_the_backward_pass(kind: type[Watch]) -> None:
    """Optimizers that step in hooks, as soon as a gradient is there; ours come after those, or
    before.
    """
    for early in (True, False):
        torch.manual_seed(0)
        model = LAYERS["linear"](DOUBLE, 5)
        optimizers = {p: torch.optim.SGD([p], 0.0) for p in model.parameters()}

        def step(p: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad(set_to_none=p.dim() == 1)

        def hook(model: nn.Module = model, step: Any = step) -> None:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(step)

        if early:
            hook()
        method = kind(model, list(optimizers.values()), seed=0)
        if not early:
            hook()
        for seed in (0, 1):
            dense, truth = twin_of(model)
            x = torch.randn(4, 12, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
            for net in (model, dense):
                net(x).square().sum().backward()
            method.step()
            close(method.found, truth())


@both
@pytest.mark.parametrize("to_none", [True, False])
def test_a_weight_without_part_in_the_step(kind: type[Watch], to_none: bool) -> None:
    torch.manual_seed(0)
    a, b = (SparseLinear(8, 8, density=0.3) for _ in range(2))
    model = nn.ModuleList([a, b])
    optimizer, method = stepped(kind, model)
    x = torch.randn(4, 8)
    b(a(x)).sum().backward()
    optimizer.step()
    method.step()
    optimizer.zero_grad(set_to_none=to_none)
    b(a(x).detach()).sum().backward()
    optimizer.step()
    method.step()
    if to_none:
        assert set(method.found) == {"1.weight"}
    else:
        assert method.status == {"0.weight": Status.NOTHING, "1.weight": Status.COMPLETE}
        assert not method.found["0.weight"].any()


def test_gradients_from_before_the_request_are_refused_or_waited_for() -> None:
    torch.manual_seed(0)
    model = LAYERS["linear"](DOUBLE, 5)
    optimizer, method = stepped(Watch, model)
    x = torch.randn(4, 12, dtype=DOUBLE)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        if method.steps:
            with pytest.raises(RuntimeError, match="call zero_grad"):
                method.step()
        else:
            method.step()
    method.finalize()
    # At the end of an epoch micro-batches are left over.
    model.zero_grad()
    for make in (
        lambda o: methods.Rewirer(
            model, o, drop=drop.ByMagnitude(), grow=grow.ByGradient(), fraction=0.3, seed=0
        ),
        lambda o: methods.SNFS(model, o, window=2, seed=0),
    ):
        method = make(optimizer)
        for batch in range(9):
            model(x).square().sum().backward()
            if batch % 2:
                optimizer.step()
                optimizer.zero_grad()
                method.step()
            if batch == 2:
                method.end_epoch()
            if batch == 3:
                assert method.updates == 0  # the first half of this step was not recorded
        assert method.updates == 1
