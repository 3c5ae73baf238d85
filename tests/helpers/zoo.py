"""Small networks of many kinds, with what surgery should make of each: layers it cuts, layers it
refuses and why.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass
class Out:
    logits: Tensor
    hidden: Any = None


@dataclasses.dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As the outputs of large libraries: a dataclass that is a dict of what is not None."""

    logits: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return {"out": super().forward(input), "norm": input.norm()}


class Net(nn.Module):
    """Layers a (6 -> 8), b (8 -> 8) and head (8 -> 3), and a forward that does with them what it is
    given.
    """

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def loop(net: Any, x: Tensor, *, state: bool = False) -> Tensor:
    h: Any = None
    x = net.a(x).tanh()
    for t in range(x.shape[1]):
        h = net.cell(x[:, t], h)
    out: Tensor = net.head(net.b(h[0] if isinstance(h, tuple) else h).relu())
    return out


def transformer(net: Any, x: Tensor) -> Tensor:
    out: Tensor = net.head(net.encoder(net.a(x)).mean(1))
    return out


def drop_path(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    if net.training:
        h = h + net.b(h) * (torch.rand(len(x), 1) < 0.5)
        return net.head(F.dropout(h, 0.4) + torch.randn_like(h) * 0.1)
    return net.head(h + net.b(h))


def cached(net: Any, x: Tensor) -> Tensor:
    net.seen = {"h": net.a(x).relu()}
    net.last = net.b(net.seen["h"])
    return net.head(net.last.relu())


def glu(net: Any, x: Tensor) -> Tensor:
    u, v = net.a(x).chunk(2, 1)
    return net.small(u * v.sigmoid())


def labels(net: Any, x: Tensor, y: Tensor | None = None) -> Any:
    logits = net.head(net.b(net.a(x).relu()).relu())
    if net.training:
        assert y is not None, "labels are needed"
        return ModelOutput(logits=logits, loss=F.cross_entropy(logits, y))
    return ModelOutput(logits=logits)


def sequence(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
LONG = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
WORDS = torch.randint(0, 10, (4, 5), generator=torch.Generator().manual_seed(4))
PACKED = pack_sequence(
    [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (5, 3, 2)]
)

#: name: (network, its example, layers that are cut, the others and a pattern of what is said)
ZOO: dict[str, tuple[Callable[[], nn.Module], Any, list[str], dict[str, str]]] = {}


def add(
    name: str, build: Callable[[], nn.Module], x: Any, cut: str = "a b", **refused: str
) -> None:
    ZOO[name] = build, x, cut.split(), refused


OUTPUT = "shape of the network's output|outputs of the network"
plain: Any = lambda n, x: n.head(n.b(n.a(x).relu()).relu())  # noqa: E731

add(
    "head in training only",
    lambda: Net(
        lambda n, x: (plain(n, x), n.aux(n.a(x).relu())) if n.training else plain(n, x),
        aux=nn.Linear(8, 2),
    ),
    X,
    head=OUTPUT,
    aux=OUTPUT,
)
add(
    "head in eval only",
    lambda: Net(
        lambda n, x: plain(n, x) if n.training else (plain(n, x), n.aux(n.b(n.a(x).relu()))),
        aux=nn.Linear(8, 2),
    ),
    X,
    head=OUTPUT,
    aux=OUTPUT,
)
add(
    "softmax in training only",
    lambda: Net(lambda n, x: n.head(n.b(n.a(x).softmax(1) if n.training else n.a(x)))),
    X,
    "b",
    a="mixes them .*in training mode",
    head=OUTPUT,
)
add("dataclass", lambda: Net(lambda n, x: Out(plain(n, x), (x, None))), X, head=OUTPUT)
add("model output", lambda: Net(lambda n, x: ModelOutput(logits=plain(n, x))), X, head=OUTPUT)
add("object", lambda: Net(lambda n, x: Plain(plain(n, x))), X, head=OUTPUT)
add(
    "bytes",
    lambda: Net(lambda n, x: plain(n, x.float() / 255)),
    (X * 50).abs().to(torch.uint8),
    head=OUTPUT,
)
add(
    "keywords",
    lambda: Net(lambda n, *, x, scale: plain(n, x * scale)),
    {"x": X, "scale": torch.tensor(2.0)},
    head=OUTPUT,
)
add(
    "two inputs",
    lambda: Net(lambda n, x, y: n.head(n.b(n.a(x).relu() + n.c(y)).relu()), c=nn.Linear(6, 8)),
    (X, -X),
    "a b c",
    head=OUTPUT,
)
add(
    "labels in training",
    lambda: Net(labels),
    {"x": X, "y": torch.tensor([0, 1, 2, 0])},
    head=OUTPUT,
)
for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
    add(
        f"{kind.__name__} in a loop",
        lambda kind=kind: Net(loop, cell=kind(8, 8)),
        LONG,
        "b",  # type: ignore[misc]
        a=f"cell is a {kind.__name__}",
        head=OUTPUT,
    )
add(
    "functional",
    lambda: Net(lambda n, x: n.head(F.linear(n.a(x).relu(), n.b.weight, n.b.bias))),
    X,
    "",
    a="does not run|uses weights outside",
    head=OUTPUT,
    b="took no part",
)
add(
    "constant view",
    lambda: Net(lambda n, x: n.head(n.b(n.a(x).relu()).view(-1, 8))),
    X,
    "a",
    b="does not run",
    head=OUTPUT,
)
add(
    "heads",
    lambda: Net(lambda n, x: n.head(n.b(n.a(x)).view(len(x), 2, 4).transpose(1, 2).flatten(1))),
    X,
    "a",
    b="does not run",
    head=OUTPUT,
)
add(
    "concat",
    lambda: Net(
        lambda n, x: n.wide(torch.cat([(h := n.a(x)).relu(), n.b(h).tanh()], 1)),
        wide=nn.Linear(16, 3),
    ),
    X,
    head="took no part",
    wide=OUTPUT,
)
add(
    "concat with the input",
    lambda: Net(
        lambda n, x: n.wide(torch.cat([n.b(n.a(x).relu()).tanh(), x], 1)), wide=nn.Linear(14, 3)
    ),
    X,
    head="took no part",
    wide=OUTPUT,
)
add(
    "chunk",
    lambda: Net(glu, small=nn.Linear(4, 3)),
    X,
    "",
    a="units of a",
    b="took no part",
    head="took no part",
    small=OUTPUT,
)
add(
    "indexing",
    lambda: Net(lambda n, x: n.small(n.b(n.a(x).relu())[:, :4]), small=nn.Linear(4, 3)),
    X,
    "a",
    b="units of b",
    head="took no part",
    small=OUTPUT,
)
add(
    "checkpoint",
    lambda: Net(
        lambda n, x: n.head(checkpoint(lambda h: n.b(h).relu(), n.a(x), use_reentrant=False))
    ),
    X,
    head=OUTPUT,
)
add(
    "reentrant checkpoint",
    lambda: Net(
        lambda n, x: n.head(checkpoint(lambda h: n.b(h).relu(), n.a(x), use_reentrant=True))
    ),
    X,
    "",
    a="units of a",
    b="reentrant",
    head=OUTPUT,
)
add(
    "layer norm",
    lambda: sequence(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
    X,
    "2",
    **{"0": "1 is a LayerNorm", "4": OUTPUT},
)
add(
    "norms",
    lambda: sequence(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3),
        nn.InstanceNorm2d(8, affine=True),
        nn.PReLU(8),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    IMAGE,
    "2 5",
    **{"0": "1 is a GroupNorm", "7": OUTPUT},
)
add(
    "embedding",
    lambda: Net(lambda n, x: n.head(n.b(n.words(x).mean(1)).relu()), words=nn.Embedding(10, 8)),
    WORDS,
    "words b",
    a="took no part",
    head=OUTPUT,
)
add("tied embedding", lambda: tied(), WORDS, "", words="is shared", out="is shared|output")
add(
    "in place",
    lambda: sequence(
        nn.Linear(6, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 8),
        nn.Hardtanh(inplace=True),
        nn.Linear(8, 3),
    ),
    X,
    "0 2",
    **{"4": OUTPUT},
)
add(
    "in place sum",
    lambda: Net(lambda n, x: n.head(n.a(x).add_(n.c(x)).tanh_()), c=nn.Linear(6, 8)),
    X,
    "a c",
    b="took no part",
    head=OUTPUT,
)
add(
    "compiled",
    lambda: torch.compile(sequence(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), backend="eager"),
    X,
    "_orig_mod.0",
    **{"_orig_mod.2": OUTPUT},
)  # type: ignore[arg-type]
add("autocast", lambda: Net(lambda n, x: amp(n, x)), X, head=OUTPUT)
add("bfloat16", lambda: Net(plain).bfloat16(), X.bfloat16(), head=OUTPUT)
add("float64", lambda: Net(plain).double(), X.double(), head=OUTPUT)
add("chance", lambda: Net(drop_path), X, head=OUTPUT)
add(
    "batch norm, one sample",
    lambda: sequence(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3)),
    X[:1],
    "0",
    **{"4": OUTPUT},
)
add(
    "transformer",
    lambda: Net(
        transformer,
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
    ),
    LONG,
    "encoder.layers.0.linear1 encoder.layers.1.linear1",
    a=r"encoder.layers.0.self_attn is a Multi|norm1 is a LayerNorm",
    b="took no part",
    head=OUTPUT,
    **{f"encoder.layers.{i}.linear2": "is a LayerNorm" for i in (0, 1)},
)
add("kept activations", lambda: used(Net(cached)), X, head=OUTPUT)
add(
    "weight norm",
    lambda: Net(plain, b=weight_norm(nn.Linear(8, 8))),
    X,
    "",
    a="b is parametrized",
    b="b is parametrized",
    head=OUTPUT,
)
add(
    "an odd layer",
    lambda: Net(lambda n, x: n.head(n.odd(n.a(x).relu())["out"]), odd=Odd(8, 8)),
    X,
    "",
    a="odd is a Odd with a forward of its own",
    b="took no part",
    odd="forward of its own",
    head=OUTPUT,
)
add(
    "bilinear",
    lambda: Net(lambda n, x: n.head(n.two(n.a(x), n.b(n.a(x)))), two=nn.Bilinear(8, 8, 8)),
    X,
    "",
    a="two is a Bilinear",
    b="two is a Bilinear",
    head=OUTPUT,
)
add(
    "packed",
    lambda: Net(
        lambda n, x: n.head(n.rnn(input=x._replace(data=n.a(input=x.data).tanh()))[1][0]),
        rnn=nn.GRU(8, 5),
        head=nn.Linear(5, 3),
    ),
    PACKED,
    "a rnn",
    b="took no part",
    head=OUTPUT,
)
add(
    "einsum",
    lambda: Net(lambda n, x: n.head(torch.einsum("bi,bj->bj", x.softmax(1), n.a(x)) * n.b(n.a(x)))),
    X,
    head=OUTPUT,
)
add("frozen", lambda: frozen(Net(plain)), X, head=OUTPUT)
add(
    "without gradients",
    lambda: Net(lambda n, x: n.head(n.b(no_grad(n.a, x)).relu())),
    X,
    "b",
    a="cannot be followed",
    head=OUTPUT,
)
add(
    "mean over positions",
    lambda: Net(lambda n, x: n.head(n.b(n.a(x).relu()).relu().amax(1))),
    LONG,
    head=OUTPUT,
)
add(
    "normalised by hand",
    lambda: Net(lambda n, x: n.head(F.normalize(n.b(n.a(x).relu()), dim=1))),
    X,
    "a",
    b="mixes them",
    head=OUTPUT,
)
add(
    "predictions in eval",
    lambda: Net(lambda n, x: plain(n, x) if n.training else plain(n, x).argmax(1)),
    X,
    head=OUTPUT,
)


def tied() -> nn.Module:
    net = Net(
        lambda n, x: n.out(n.words(x).mean(1)), words=nn.Embedding(10, 8), out=nn.Linear(8, 10)
    )
    net.out.weight = net.words.weight
    return net


def amp(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(net, x).float()  # type: ignore[no-any-return]


def used(net: nn.Module) -> nn.Module:
    net(X)
    return net


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


def no_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)  # type: ignore[no-any-return]
