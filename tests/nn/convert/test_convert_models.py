"""Whole models built from torch.nn, converted and back: Transformers and recurrent classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rewire
from rewire.app.bench.networks import resnet18
from rewire.nn import (
    SparseConv2d,
    SparseLinear,
    SparseLSTM,
    SparseMultiheadAttention,
    SparseWeight,
    densify,
    sparse_weights,
    sparsify,
)


class Classifier(nn.Module):
    """A bidirectional LSTM over embedded words of sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, words, lengths):
        self.lstm.flatten_parameters()
        x = nn.utils.rnn.pack_padded_sequence(
            self.embed(words), lengths, batch_first=True, enforce_sorted=False
        )
        output, (h, _) = self.lstm(x)
        padded, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        return self.head(torch.cat([h[-2], h[-1]], 1) + padded.view(*padded.shape[:2], 16).mean(1))


def encoder(batch_first=True, norm_first=False, activation="relu", layers=2, dropout=0.1):
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout, batch_first=batch_first, norm_first=norm_first, activation=activation
    )
    fused = batch_first and not norm_first
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=fused)


def words():
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 20, (5, 7), generator=g), [4, 7, 1, 6, 3]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(
            module, (nn.MultiheadAttention, SparseMultiheadAttention, nn.LSTM, SparseLSTM)
        ):
            module.dropout = 0.0
    return model


# --- Transformers ---------------------------------------------------------------------------------

PARTS = {
    "all": {},
    "attention only": {"only": "*self_attn"},
    "feed-forward only": {"exclude": "*self_attn"},
    "second layer only": {"only": "layers.1.*"},
    "one linear": {"only": "layers.0.linear2"},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_transformer_encoder(part, training, grad):
    # In eval mode without grad, PyTorch would call a fused kernel with the dense weights, on nested
    # tensors.
    sparse = without_dropout(sparsify(encoder(), density=0.3, **PARTS[part])).train(training)
    dense = densify(copy.deepcopy(sparse))
    assert not any(isinstance(m, SparseWeight) for m in dense.modules())
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.set_grad_enabled(grad):
        for options in ({}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}):
            y = sparse(x, **options)
            assert not y.is_nested
            torch.testing.assert_close(y, dense(x, **options))


@pytest.mark.parametrize(
    "options", [{"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}], ids=str
)
def test_other_encoders(options):
    sparse = without_dropout(sparsify(encoder(**options), density=0.3))
    dense = densify(copy.deepcopy(sparse))
    x = torch.randn(3, 5, 16)
    for training in (True, False):
        torch.testing.assert_close(sparse.train(training)(x), dense.train(training)(x))
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), dense(x))


def test_a_whole_transformer():
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    sparse = sparsify(model, density=0.2)
    assert not any(type(m) in (nn.Linear, nn.MultiheadAttention) for m in sparse.modules())
    dense = densify(copy.deepcopy(sparse))
    source, target = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    for training in (True, False):
        sparse.train(training), dense.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(
                sparse(source, target, tgt_mask=causal), dense(source, target, tgt_mask=causal)
            )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the dense twin uses them
def test_a_layer_put_into_an_encoder_by_hand():
    model = encoder(layers=1)
    model.layers[0].linear1 = SparseLinear(16, 32, density=0.2)
    dense = densify(copy.deepcopy(model)).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y, expected = (m.eval()(x, src_key_padding_mask=padding) for m in (model, dense))
    # the fused path leaves zeros at padding
    torch.testing.assert_close(y[~padding], expected[~padding])
    with pytest.raises(TypeError, match="SparseWeight is not a tensor: use its layer, or to_dense"):
        torch.nn.functional.linear(x, model.layers[0].linear1.weight)


# torch's compiler calls what torch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_encoder_compiles(training):
    torch._dynamo.reset()
    model = without_dropout(sparsify(encoder(layers=1), density=0.3, exclude="*linear2")).train(
        training
    )
    x = torch.randn(3, 5, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), model(x))


# --- recurrent models -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels-last"])
def test_resnet(training, channels_last):
    """A ResNet-18: outputs, gradients and BatchNorm statistics equal those of the dense network it
    stands for.
    """
    torch.manual_seed(0)
    sparse = sparsify(resnet18(classes=5), density=0.1, distribution="erk").train(training).double()
    assert sum(isinstance(m, SparseConv2d) for m in sparse.modules()) == 20
    assert not any(type(m) is nn.Conv2d for m in sparse.modules())
    dense = densify(copy.deepcopy(sparse))
    assert sum(type(m) is nn.Conv2d for m in dense.modules()) == 20
    x = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        dense = dense.to(memory_format=torch.channels_last)
    results = []
    for model in (sparse, dense):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, model[1].weight.grad))
    torch.testing.assert_close(results[0], results[1])
    buffers = dict(dense.named_buffers())
    for name, buffer in sparse.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, buffers[name])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lstm_classifier(training):
    sparse = without_dropout(sparsify(Classifier(), density=0.3)).train(training)
    assert isinstance(sparse.lstm, SparseLSTM)
    dense = densify(copy.deepcopy(sparse))
    assert type(dense.lstm) is nn.LSTM
    torch.testing.assert_close(sparse(*words()), dense(*words()))


@pytest.mark.parametrize(
    "layer",
    [
        nn.RNN(4, 5, 2, nonlinearity="relu", bias=False),
        nn.GRU(4, 5, batch_first=True, bidirectional=True, dtype=torch.float64),
        nn.LSTM(4, 5, 2, dropout=0.5, proj_size=2),
        nn.MultiheadAttention(4, 2, 0.1, batch_first=True, kdim=3, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, bias=False, add_zero_attn=True),
        nn.Linear(4, 5),
    ],
    ids=lambda m: type(m).__name__,
)
def test_magnitude_at_full_density_gives_the_layer_back(layer):
    rng = torch.get_rng_state()
    twin = densify(sparsify(copy.deepcopy(layer).eval(), density=1.0, select="magnitude"))
    back = densify(copy.deepcopy(twin))
    assert back.state_dict().keys() == layer.state_dict().keys()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key
    assert repr(twin) == repr(layer)
    assert not twin.training
    torch.set_rng_state(rng)
    ignored = {"training", "_flat_weight_refs", "_flat_weights", "_modules", "_parameters"}
    for name, value in vars(layer).items():
        if name not in ignored:
            assert getattr(twin, name) == value, name


def test_magnitude_keeps_the_largest():
    dense = nn.Sequential(nn.MultiheadAttention(8, 2))
    stacked = dense[0].in_proj_weight.detach().clone()
    sparse = sparsify(dense, connections={"0": 100}, distribution="uniform", select="magnitude")
    for part, name in zip(stacked.chunk(3), ("q", "k", "v"), strict=True):
        kept = getattr(sparse[0], f"{name}_proj_weight").to_dense()
        largest = part.abs().flatten().sort().values[-25]
        assert torch.equal(kept, part * (part.abs() >= largest))


# --- budgets --------------------------------------------------------------------------------------


def test_every_weight_counts_in_the_budget():
    sparse = sparsify(Classifier(), connections=300)
    counts = {name: w.connections for name, w in sparse_weights(sparse)}
    assert sum(counts.values()) == 300
    assert len(counts) == 9
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l1_reverse", "head.weight"} <= counts.keys()
    shapes = [tuple(w.shape) for _, w in sparse_weights(sparse)]
    assert list(counts.values()) == rewire.budget.erk(shapes, 300)


def test_budgets_of_layers_and_of_single_weights():
    budget = {"lstm.weight_hh*": 7, "lstm": 100, "head.weight": 5}
    counts = {
        name: w.connections
        for name, w in sparse_weights(sparsify(Classifier(), connections=budget))
    }
    assert [counts.pop(f"lstm.weight_hh_l{s}") for s in ("0", "0_reverse", "1", "1_reverse")] == [
        7
    ] * 4
    assert counts.pop("head.weight") == 5
    assert sum(counts.values()) == 100
    dense = {"lstm": 0.25}
    sparse = sparsify(Classifier(), density=dense, distribution="uniform")
    assert all(w.density == 0.25 for _, w in sparse_weights(sparse))
    assert type(sparse.head) is nn.Linear
    for given, message in [
        ({"lstm.weight_ih*": 0.5}, "sparse as a whole, but no pattern matches lstm.weight_hh_l0"),
        ({"lstm": 0.5, "gru": 0.5}, "pattern 'gru' matches no layer; there are lstm, head"),
    ]:
        model = Classifier()
        with pytest.raises(ValueError, match=message):
            sparsify(model, density=given)
        assert type(model.lstm) is nn.LSTM
    with pytest.raises(
        ValueError,
        match=r"head.weight can have between 1 and 48 connections, "
        r"not 49",
    ):
        sparsify(Classifier(), connections={"head.weight": 49})


# --- shared parts ---------------------------------------------------------------------------------


def test_a_shared_layer_stays_shared():
    model = nn.ModuleDict({"a": nn.GRU(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    sparsify(model, density=0.5)
    assert model["a"] is model["c"]
    assert len(list(sparse_weights(model))) == 3
    densify(model)
    assert model["a"] is model["c"]


def test_tied_parameters_are_refused_by_name():
    tied = nn.ModuleDict({"embed": nn.Embedding(9, 4), "rnn": nn.RNN(4, 5), "out": nn.Linear(4, 9)})
    tied["out"].weight = tied["embed"].weight
    with pytest.raises(
        ValueError,
        match=r"out shares its weight with embed.weight: exclude both, "
        r"or untie",
    ):
        sparsify(tied, density=0.5)
    assert type(tied["rnn"]) is nn.RNN
    sparsify(tied, density=0.5, exclude="out")
    assert tied["out"].weight is tied["embed"].weight
    pair = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.LSTM(4, 4)})
    pair["b"].weight_hh_l0 = pair["a"].weight_hh_l0
    with pytest.raises(ValueError, match=r"a shares its weight_hh_l0 with b.weight_hh_l0"):
        sparsify(pair, density=0.5)


def test_subclasses_stay_as_they_are():
    class Special(nn.LSTM):
        pass

    with pytest.raises(ValueError, match="no layer to convert"):
        sparsify(nn.Sequential(Special(4, 4)), density=0.5)


# --- training -------------------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Embedding(20, 16), encoder(), nn.Linear(16, 3)

    def forward(self, words, lengths):
        padding = torch.arange(words.shape[1]) >= torch.tensor(lengths)[:, None]
        y = self.encoder(self.embed(words), src_key_padding_mask=padding)
        return self.head(y.masked_fill(padding[:, :, None], 0.0).sum(1))


@pytest.mark.parametrize("build", [Classifier, Pooled])
def test_trains_with_deep_r(build):
    model = sparsify(build(), density=0.3)
    before = {name: (w.connections, w.fingerprint()) for name, w in sparse_weights(model)}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    method = rewire.methods.DeepR(model, optimizer, l1=1e-3, noise=1e-3)
    labels = torch.tensor([0, 1, 2, 1, 0])
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(*words()), labels) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, weight in sparse_weights(model):
        assert weight.connections == before[name][0]
    assert (
        sum(w.fingerprint() != before[name][1] for name, w in sparse_weights(model))
        > len(before) // 2
    )
    model = method.finalize().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*words()), densify(copy.deepcopy(model))(*words()))
