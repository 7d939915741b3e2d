"""The private gradient: the sum of per-record clipped gradients of one loss, and its noised, integer form.

Two kernels compute the same sum. "opacus" is Opacus's ghost clipping; "fused" is one exact book-keeping
backward pass (Bu et al. 2023, arXiv 2210.00038) and several times faster. Everything that touches a record
(its views, its wrong prompts) is inside its one loss and one clip; only real rows come here from a site.
Not here: the Poisson draw, the calibration of sigma, the ledger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.privacy.entropy import Entropy
from shared.privacy.plan import PrivacyPlan

# Rows of one pass: few enough that their windows stay in the processor's cache.
BLOCK = 64

RecordLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClippedSum:
    """`total` is `(num_parameters,)` float64 in the order of parameter names. `norms` and `logits` are private.

    Attributes:
        norms: `(B,)` float32, before clipping; of the loss of one record.
        logits: `(B, V, P)` as the discriminator returned them.
    """

    total: Tensor
    norms: Tensor
    logits: Tensor


def clipped_gradient_sum(
    discriminator: nn.Module, features: Tensor, conditioning: Tensor, loss: RecordLoss,
    *, clipping_norm: float, kernel: str = "fused",
) -> ClippedSum:  # fmt: skip
    """Sum over records of their gradients, each scaled down to an L2 norm of at most `clipping_norm`.

    Args:
        features: `(B, V, h, w, c)`; B may be 0.
        conditioning: `(B, P, E)`.
        loss: logits `(B, V, P)` to per-record losses `(B,)`, record by record.
        kernel: "fused" or "opacus".
    Returns:
        The sum. A record whose gradient is not finite contributes zero (PRIVACY rule 8).
    """
    compute = _opacus_sum if kernel == "opacus" else _fused_sum
    size = sum(p.numel() for p in discriminator.parameters())
    total = torch.zeros(size, dtype=torch.float64, device=features.device)
    norms: list[Tensor] = []
    logits: list[Tensor] = []
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        part = compute(discriminator, features[rows], conditioning[rows], loss, clipping_norm)
        finite = torch.isfinite(part.norms)
        if not finite.all():
            # The zero that rule 8 asks for: computed again without those records, since 0 * NaN is NaN.
            kept = compute(discriminator, features[rows][finite], conditioning[rows][finite], loss, clipping_norm)
            part = ClippedSum(kept.total, part.norms, part.logits)
        total += part.total
        norms.append(part.norms)
        logits.append(part.logits)
    if not norms:
        return ClippedSum(total, features.new_zeros(0), features.new_zeros(0, features.shape[1], conditioning.shape[1]))
    return ClippedSum(total, torch.cat(norms), torch.cat(logits))


def noised_sum(
    total: Tensor, *, plan: PrivacyPlan, entropy: Entropy, labels: tuple[int | str, ...]
) -> np.ndarray:  # fmt: skip
    """The only form in which a clipped sum leaves a site: on a public lattice, noised, as integers.

    The rounding of the sum enters the sensitivity (`plan.sensitivity`); Gaussian noise rounded to the same
    lattice then is post-processing of the Gaussian mechanism.

    Returns:
        `(num_parameters,)` int64, in units of `plan.lattice`.
    """
    units = np.rint(total.cpu().numpy() / plan.lattice)
    if plan.private:
        std = plan.noise_multiplier * plan.sensitivity(len(units))
        units += np.rint(entropy.gaussian(len(units), std / plan.lattice, *labels))
    return units.astype(np.int64)


def _fused_sum(
    discriminator: nn.Module, features: Tensor, conditioning: Tensor, loss: RecordLoss, clipping_norm: float
) -> ClippedSum:  # fmt: skip
    """One forward, one backward to the layers' outputs, norms from (input, output gradient) of each layer."""
    count = len(features)
    with _recorded_linear(discriminator) as passes:
        logits = discriminator(features, conditioning)
        losses = loss(logits)
    if count == 0:
        size = sum(p.numel() for p in discriminator.parameters())
        return ClippedSum(features.new_zeros(size, dtype=torch.float64), losses.detach(), logits.detach())
    gradients = torch.autograd.grad(losses.sum(), [p.output for p in passes])
    with torch.no_grad():
        squared = features.new_zeros(count)
        layers: list[tuple[_Pass, Tensor, Tensor, Tensor | None]] = []
        for record, gradient in zip(passes, gradients, strict=True):
            inputs = record.inputs.reshape(count, -1, record.inputs.shape[-1])  # (B, T, K)
            outputs = gradient.reshape(count, -1, gradient.shape[-1])  # (B, T, O)
            positions, width, height = inputs.shape[1], inputs.shape[2], outputs.shape[2]
            rows = None
            if positions == 1:
                squared += inputs.square().sum(dim=(1, 2)) * outputs.square().sum(dim=(1, 2))
            elif positions * (width + height) < width * height:
                # |G^T A|^2 = <A A^T, G G^T>: cheaper than the gradient itself where there are few positions.
                gram = torch.bmm(inputs, inputs.transpose(1, 2)).mul_(torch.bmm(outputs, outputs.transpose(1, 2)))
                squared += gram.sum(dim=(1, 2))
            else:
                rows = torch.bmm(outputs.transpose(1, 2), inputs)  # (B, O, K), small enough to keep
                squared += rows.square().sum(dim=(1, 2))
            if record.layer.bias is not None:
                squared += outputs.sum(dim=1).square().sum(dim=1)
            layers.append((record, inputs, outputs, rows))
        # The Gram form may round a vanishing norm below zero.
        norms = torch.where(squared.isnan(), squared, squared.clamp(min=0)).sqrt()
        factors = (clipping_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
        sums: dict[Tensor, Tensor] = {}
        for record, inputs, outputs, rows in layers:
            if rows is not None:
                sums[record.layer.weight] = factors @ rows.flatten(1)
            else:
                outputs_clipped = outputs * factors[:, None, None]
                sums[record.layer.weight] = outputs_clipped.flatten(0, 1).t() @ inputs.flatten(0, 1)
            if record.layer.bias is not None:
                sums[record.layer.bias] = factors @ outputs.sum(dim=1)
        total = torch.cat([sums[p].reshape(-1).double() for _, p in sorted(discriminator.named_parameters())])
    return ClippedSum(total, norms, logits.detach())


@dataclass(frozen=True)
class _Pass:
    layer: nn.Linear
    inputs: Tensor
    output: Tensor


@contextmanager
def _recorded_linear(model: nn.Module) -> Iterator[list[_Pass]]:
    """Notes input and output of each linear layer; the first outputs become leaves that gradients reach."""
    passes: list[_Pass] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear)
        assert all(p.layer is not layer for p in passes), "a layer called twice a forward is not supported"
        if not output.requires_grad:
            output.requires_grad_()
        passes.append(_Pass(layer, inputs[0].detach(), output))
        return output

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.enable_grad():
            yield passes
    finally:
        for handle in handles:
            handle.remove()


def _opacus_sum(
    discriminator: nn.Module, features: Tensor, conditioning: Tensor, loss: RecordLoss, clipping_norm: float
) -> ClippedSum:  # fmt: skip
    """Opacus's ghost clipping: a backward pass for the norms, a second one of the rescaled losses."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    model = copy.deepcopy(discriminator).requires_grad_(True)
    if len(features) == 0:
        size = sum(p.numel() for p in model.parameters())
        logits = model(features, conditioning).detach()
        return ClippedSum(features.new_zeros(size, dtype=torch.float64), features.new_zeros(0), logits)
    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="sum", max_grad_norm=clipping_norm, use_ghost_clipping=True
    )
    # Inputs that require gradients keep torch from warning that Opacus's backward hooks have none to watch.
    logits = wrapped(features.detach().requires_grad_(), conditioning.detach().requires_grad_())
    losses = loss(logits)
    losses.sum().backward(retain_graph=True)
    norms = wrapped.get_norm_sample().detach()
    factors = wrapped.get_clipping_coef().detach()
    wrapped.disable_hooks()
    wrapped.zero_grad()
    (factors * losses).sum().backward()
    gradients = [p.grad for _, p in sorted(model.named_parameters())]
    total = torch.cat([(torch.zeros(0) if g is None else g).reshape(-1).double() for g in gradients])
    return ClippedSum(total, norms, logits.detach())
