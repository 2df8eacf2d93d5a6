"""What users of neighbouring projects reported about gradients (see test_citations.py)."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.ops import reference
from helpers import close, heads, integers, on_native, outcome, random, tiny


@on_native
def test_autograd_losses_weighted_one_by_one(name):
    """linkedin/Liger-Kernel#968, linkedin/Liger-Kernel#1298: every row got the first row's weight in dW."""
    x, head, bias = random(7, 4), random(6, 4, seed=1), random(6, seed=2)
    targets = torch.tensor([0, 5, -100, 2, 3, -100, 1])
    weights = torch.tensor([0.0, 2.0, 5.0, -1.0, 0.5, 1.0, 3.0])
    for smoothing in (0.0, 0.2):
        options = {"reduction": "none", "label_smoothing": smoothing}

        def ours(x, head, bias, options=options):
            return ops.linear_cross_entropy(x, head, targets, bias=bias, backend=name, **options)

        def formula(x, head, bias, options=options):
            return reference.linear_cross_entropy(x, head, targets, bias=bias, **options)

        got, gradients = outcome(ours, (x, head, bias), weights)
        want, exact = outcome(formula, (x, head, bias), weights, torch.float64)
        close(got, want)
        for gradient, expected in zip(gradients, exact, strict=True):
            close(gradient, expected)


@on_native
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_autograd_a_loss_nobody_derives(name, context):
    """linkedin/Liger-Kernel#507: without a gradient to compute, the loss was 0."""
    x, head, targets = random(5, 3), random(4, 3, seed=1), integers(4, 5)
    with context():
        loss = ops.cross_entropy(x, targets.clamp(max=2), backend=name)
        fused = ops.linear_cross_entropy(x, head, targets, backend=name)
    close(loss, reference.cross_entropy(x.double(), targets.clamp(max=2)))
    close(fused, reference.linear_cross_entropy(x.double(), head.double(), targets))


@on_native
def test_autograd_logits_are_left_alone(name):
    """linkedin/Liger-Kernel#272, unslothai/unsloth#5002: gradients overwrote the logits, and exp's saved output."""
    leaf, targets = random(6, 5).requires_grad_(), integers(5, 6)
    logits = leaf.exp()  # whose derivative is its output
    before = logits.detach().clone()
    loss = ops.cross_entropy(logits, targets, backend=name) + logits.square().mean()
    loss.backward()
    assert torch.equal(logits.detach(), before)
    exact = leaf.detach().double().requires_grad_()
    (reference.cross_entropy(exact.exp(), targets) + exact.exp().square().mean()).backward()
    close(leaf.grad, exact.grad)


@on_native
def test_autograd_backward_twice(name):
    """axolotl-ai-cloud/axolotl#3892: a second pass through a kept graph gave numbers scaled or spoiled by the first."""
    x, head = (t.requires_grad_() for t in (random(5, 4), random(6, 4, seed=1)))
    loss = ops.linear_cross_entropy(x, head, integers(6, 5), backend=name)
    first = [g.clone() for g in torch.autograd.grad(2.0 * loss, (x, head), retain_graph=True)]
    second = torch.autograd.grad(loss, (x, head), retain_graph=True)
    third = torch.autograd.grad(-3.0 * loss, (x, head))
    for a, b, c in zip(first, second, third, strict=True):
        close(a, 2.0 * b)
        close(c, -3.0 * b)


@on_native
@pytest.mark.parametrize("factor", [1.0, 0.25, -2.0, 0.0])
def test_autograd_a_gradient_passed_to_backward(name, factor):
    """linkedin/Liger-Kernel#435: output.backward(gradient=...) of a loss that is not the last step."""
    logits, targets = random(4, 5).requires_grad_(), integers(5, 4)
    loss = ops.cross_entropy(logits, targets, reduction="sum", backend=name)
    loss.backward(gradient=torch.tensor(factor))
    want = torch.softmax(logits.detach().double(), -1) - F.one_hot(targets, 5)
    close(logits.grad, factor * want)


@on_native
def test_autograd_classes_in_the_second_dimension(name):
    """pytorch/pytorch#175084: the gradient of transposed (N, C, d1, d2) logits could not be made."""
    leaf, targets = random(2, 3, 4, 5).requires_grad_(), integers(5, 2, 3, 4)
    loss = ops.cross_entropy(leaf.movedim(-1, 1), targets, backend=name)
    loss.backward()
    exact = leaf.detach().double().requires_grad_()
    want = reference.cross_entropy(exact.movedim(-1, 1), targets)
    want.backward()
    close(loss.detach(), want.detach())
    close(leaf.grad, exact.grad)


@on_native
def test_autograd_second_derivatives(name):
    """pytorch/pytorch#76185, pytorch/pytorch#58509: what forward saved counted as a constant, silently."""
    logits, targets = random(3, 4, dtype=torch.float32).requires_grad_(), integers(4, 3)
    (gradient,) = torch.autograd.grad(ops.cross_entropy(logits, targets, backend=name), logits, create_graph=True)
    if name == "native":
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.square().sum().backward()
        return
    gradient.square().sum().backward()
    exact = logits.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.cross_entropy(exact, targets), exact, create_graph=True)
    wanted.square().sum().backward()
    close(logits.grad, exact.grad)


@on_native
def test_autograd_logits_changed_in_place_after_the_loss(name):
    """linkedin/Liger-Kernel#273: autograd did not notice; the gradient must be the old logits', or an error."""
    leaf, targets = random(4, 5).requires_grad_(), integers(5, 4)
    logits = leaf * 1.0
    want = torch.softmax(leaf.detach().double(), -1) - F.one_hot(targets, 5)
    loss = ops.cross_entropy(logits, targets, reduction="sum", backend=name)
    with torch.no_grad():
        logits.add_(random(4, 5, seed=1))
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        close(leaf.grad, want)


def test_autograd_under_deterministic_algorithms():
    """MooreThreads/torch_musa#152, pytorch/pytorch#195404: embedding's backward was not, though it was asked to be."""
    idx = integers(3, 4, 8)

    def gradients():
        torch.manual_seed(1)
        model = tiny(dropout=0.2)
        model.loss(idx, idx).backward()
        return [p.grad for p in model.parameters()]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, gradients(), gradients()))
        tiny().generate(idx[:, :2], 12, top_k=5, top_p=0.9)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autograd_parameters_given_from_outside():
    """pytorch/pytorch#92295: a functional call has to use the parameters it is given, in the fused loss as well."""
    model, idx = tiny(tie_weights=False), integers(11, 2, 8)
    given = {name: (2.0 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    loss = torch.func.functional_call(model, given, (idx, idx))[1]
    other = copy.deepcopy(model)
    other.load_state_dict(given)
    close(loss.detach(), other.loss(idx, idx).detach())
    gradients = torch.autograd.grad(loss, list(given.values()))
    expected = torch.autograd.grad(other.loss(idx, idx), list(other.parameters()))
    for gradient, exact in zip(gradients, expected, strict=True):
        close(gradient, exact)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy", "embedding", "layer_norm", "attention"])
def test_autograd_gradients_per_sample(op):
    """pytorch/pytorch#102720: vmap over a kernel with its own backward lost the gradient without a word."""
    targets = integers(5, 3, 4)
    if op == "embedding":
        given, run, formula = random(6, 2), ops.embedding, reference.embedding
        each = [integers(6, 1, 4, seed=i) for i in range(3)]

        def loss(table, tokens, run=run):
            return run(tokens, table).square().sum()
    elif op == "attention":
        given, run, formula = random(1, 2, 4, 8), ops.attention, reference.attention
        each = [random(1, 2, 4, 8, seed=i + 1) for i in range(3)]

        def loss(q, k, run=run):
            return run(q, k, k).square().sum()
    elif op == "layer_norm":
        given, run, formula = random(8), ops.layer_norm, reference.layer_norm
        each = [random(4, 8, seed=i + 1) for i in range(3)]

        def loss(weight, x, run=run):
            return run(x, weight).pow(3).sum()
    elif op == "cross_entropy":
        given, run, formula = random(4, 5), ops.cross_entropy, reference.cross_entropy
        each = list(targets)

        def loss(logits, targets, run=run):
            return run(logits, targets)
    else:
        given, run, formula = random(4, 3), ops.linear_cross_entropy, reference.linear_cross_entropy
        each, head = list(targets), random(5, 3, seed=9)

        def loss(x, targets, run=run):
            return run(x, head.to(x.dtype), targets)

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    if op == "linear_cross_entropy":  # it makes its gradient by hand on every backend, and says what to take instead
        with pytest.raises(NotImplementedError, match="take cross_entropy"):
            per_sample(given, torch.stack(each))
        return
    got = per_sample(given, torch.stack(each))
    for gradient, other in zip(got, each, strict=True):
        exact = given.double().requires_grad_()
        other = other.double() if other.is_floating_point() else other
        close(gradient, torch.autograd.grad(loss(exact, other, run=formula), exact)[0])


def test_autograd_training_after_inference_mode():
    """unslothai/unsloth#2434, snowflakedb/ArcticTraining#265: what inference mode made was saved for backward later."""
    model, idx = tiny(), integers(11, 2, 8)
    fresh = tiny()
    with torch.inference_mode():
        model.generate(idx[:, :3], max_new_tokens=9)
        model.loss(idx, idx)
    model.loss(idx, idx).backward()
    fresh.loss(idx, idx).backward()
    for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_autograd_activation_checkpointing_keeps_the_dropout(reentrant):
    """allenai/OLMo-core#828, pytorch/pytorch#14253: recomputed activations were dropped with another mask."""
    q, k, v = heads(1, 2, 2, 6, 6, 8)
    weight = random(8, seed=5)

    def branch(q, k, v, weight):
        y = ops.attention(q, k, v, dropout_p=0.5)
        return ops.add_layer_norm(y, q, weight, dropout_p=0.5)[0]

    torch.manual_seed(3)
    _, plain = outcome(branch, (q, k, v, weight))
    torch.manual_seed(3)
    _, again = outcome(lambda *given: checkpoint(branch, *given, use_reentrant=reentrant), (q, k, v, weight))
    assert all(map(torch.equal, plain, again))


@on_native
def test_autograd_an_overflow_that_the_gradient_scaler_sees(name):
    """pytorch/pytorch#26512, pytorch/pytorch#152279: the step is skipped where a scaled gradient is not finite."""
    logits = torch.nn.Parameter(10 * random(4, 5, dtype=torch.float32))
    before = logits.detach().clone()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    loss = ops.cross_entropy(logits, torch.tensor([0, 1, -100, 3]), reduction="sum", backend=name)
    scaler.scale(8.0 * loss).backward()
    assert (logits.grad[2] == 0).all(), "an ignored row has no gradient, whatever the scale"
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(logits.detach(), before) and scaler.get_scale() == pytest.approx(1.5e38)
