"""The private gradient: the sum of per-record clipped gradients of one loss, and its noised, integer form.

"fused" is one exact book-keeping backward pass (Bu et al. 2023, arXiv 2210.00038). Whatever weights a coordinator
sends, one record moves its sum by at most C (1 + eta), with eta of `arithmetic`; a record's share is computed in
blocks of one shape and depends on no other record, not even in its last bit. "opacus" is Opacus's ghost clipping,
the reference that "fused" is held to: all float32, of no fixed shape, several times slower, and not covered by eta.
A deployed site uses "fused".
Everything that touches a record (its views, its wrong prompts) is inside its one loss and one clip; only real rows
come here from a site. Not here: the Poisson draw, the calibration of sigma, the ledger.
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

from shared.privacy.arithmetic import BLOCK, LARGEST_SUM, LARGEST_TERMS, UNDERFLOW, gram_allowance
from shared.privacy.entropy import Entropy
from shared.privacy.plan import PrivacyPlan

WIDENED = 256  # rows of inputs that are made float64 at a time, so that these stay in the cache

RecordLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClippedSum:
    """`total` is `(num_parameters,)` float64 in the order of parameter names. `norms` and `logits` are private.

    Attributes:
        norms: `(B,)` float32, before clipping, of the loss of one record; "fused" takes them a little too large.
        logits: `(B, V, P)` as the discriminator returned them.
    """

    total: Tensor
    norms: Tensor
    logits: Tensor


def clipped_gradient_sum(
    discriminator: nn.Module, features: Tensor, conditioning: Tensor, loss: RecordLoss,
    *, clipping_norm: float, kernel: str = "fused", padded_to: int | None = None,
) -> ClippedSum:  # fmt: skip
    """Sum over records of their gradients, each scaled down to an L2 norm of at most `clipping_norm`.

    Args:
        features: `(B, V, h, w, c)`; B may be 0.
        conditioning: `(B, P, E)`.
        loss: logits `(B, V, P)` to per-record losses `(B,)`, record by record.
        kernel: "fused" or "opacus".
        padded_to: at least B; "fused" then works as long as for so many records, whatever B is.
    Returns:
        The sum. A record whose gradient is not finite contributes zero (PRIVACY rule 8).
    """
    assert padded_to is None or len(features) <= padded_to
    compute = _opacus_sum if kernel == "opacus" else _fused_sum
    return compute(discriminator, features, conditioning, loss, clipping_norm, max(len(features), padded_to or 0))


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
    discriminator: nn.Module, features: Tensor, conditioning: Tensor, loss: RecordLoss, clipping_norm: float, rows: int
) -> ClippedSum:  # fmt: skip
    """One forward, one backward to the layers' outputs, norms from (input, output gradient) of each layer."""
    assert rows <= LARGEST_SUM
    # Of float32 matrices no bit less: "medium" would multiply in bfloat16, which `gram_allowance` does not cover.
    assert torch.get_float32_matmul_precision() == "highest"
    layers = {module: _LayerSum(module) for module in discriminator.modules() if isinstance(module, nn.Linear)}
    norms = [features.new_zeros(0)]
    logits = [features.new_zeros(0, features.shape[1], conditioning.shape[1])]
    with _recorded_linear(discriminator) as passes:
        for start in range(0, rows, BLOCK):
            real = min(max(len(features) - start, 0), BLOCK)
            block_logits = discriminator(_filled(features, start), _filled(conditioning, start))
            losses = loss(block_logits)
            gradients = torch.autograd.grad(losses.sum(), [p.output for p in passes])
            with torch.no_grad():
                squared = torch.zeros(BLOCK, dtype=torch.float64, device=features.device)
                for record, gradient in zip(passes, gradients, strict=True):
                    squared += layers[record.layer].squared_norms(record.inputs, gradient)
                passes.clear()
                block_norms = squared.sqrt()
                factors = (clipping_norm / block_norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
                factors[real:] = 0
                finite = block_norms.isfinite()
                if not finite.all():
                    # The zero that rule 8 asks for: 0 * NaN is NaN, so what these records hold is emptied as well.
                    factors[~finite] = 0
                    for layer in layers.values():
                        layer.empty(~finite)
                for layer in layers.values():
                    layer.add_clipped(factors)
            norms.append(block_norms[:real].float())
            logits.append(block_logits[:real].detach())
    sums = {p: s for layer in layers.values() for p, s in layer.sums().items()}
    total = torch.cat([sums[p].reshape(-1) for _, p in sorted(discriminator.named_parameters())])
    return ClippedSum(total, torch.cat(norms), torch.cat(logits))


def _filled(rows: Tensor, start: int) -> Tensor:
    """`(BLOCK, ...)`: the rows from `start` on, then zeros where there are no more."""
    block = rows[start : start + BLOCK]
    if len(block) < BLOCK:
        block = torch.cat([block, block.new_zeros(BLOCK - len(block), *block.shape[1:])])
    return block


@dataclass(frozen=True)
class _Pass:
    layer: nn.Linear
    inputs: Tensor
    output: Tensor


class _LayerSum:
    """What one linear layer adds: the float64 sum over records of their clipped G^T A, and of G for the bias.

    A is a record's input of the layer, `(T, K)`, and G the gradient of its loss by the output, `(T, O)`, both
    float32. Block by block `squared_norms`, perhaps `empty`, then `add_clipped`.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.weight = torch.zeros_like(layer.weight, dtype=torch.float64)  # (O, K)
        self.bias = self.weight.new_zeros(layer.out_features)
        # A part of the weight's sum, and how many terms its entries have.
        self.part, self.part_terms = torch.zeros_like(self.weight), 0
        self.wide = self.weight.new_empty(0)  # float64 of some inputs; kept, since fresh memory costs more than a copy

    def squared_norms(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """`(BLOCK,)`, never below the squared norm of what `add_clipped` adds at factor 1."""
        self.inputs = inputs.reshape(BLOCK, -1, inputs.shape[-1])  # A
        outputs = outputs.reshape(BLOCK, -1, outputs.shape[-1])  # G
        self.outputs = outputs.double()
        self.rows: Tensor | None = None
        self.of_bias: Tensor | None = None
        positions, width, height = self.inputs.shape[1], self.inputs.shape[2], outputs.shape[2]
        squared: Tensor
        if positions == 1:
            of_outputs = self.outputs.square().sum(dim=(1, 2))
            of_inputs = self.inputs.double().square().sum(dim=(1, 2))
            if self.layer.bias is not None:
                self.of_bias = self.outputs[:, 0].clone()  # (BLOCK, O)
                of_inputs += 1
            squared = of_inputs * of_outputs
            return squared
        if positions <= LARGEST_TERMS // 8 and positions * (width + height) < width * height:
            # |G^T A|^2 = <A A^T, G G^T>: cheaper than the gradient itself where there are few positions.
            of_inputs = torch.bmm(self.inputs, self.inputs.transpose(1, 2)).double()  # (BLOCK, T, T)
            of_outputs = torch.bmm(outputs, outputs.transpose(1, 2)).double()
            lengths = (of_inputs.diagonal(dim1=1, dim2=2) + UNDERFLOW) * (
                of_outputs.diagonal(dim1=1, dim2=2) + UNDERFLOW
            )
            squared = of_inputs.mul_(of_outputs).sum(dim=(1, 2))
            squared += gram_allowance(width, height) * lengths.sqrt().sum(dim=1).square()
        else:
            # The gradient itself, small enough to keep; what float32 made of it is what is summed.
            self.rows = torch.bmm(outputs.transpose(1, 2), self.inputs).flatten(1).double()  # (BLOCK, O K)
            squared = self.rows.square().sum(dim=1)
        if self.layer.bias is not None:
            self.of_bias = self.outputs.sum(dim=1)
            squared += self.of_bias.square().sum(dim=1)
        return squared

    def empty(self, which: Tensor) -> None:
        """Zeroes records: `which` is `(BLOCK,)` bool. Copies, since an input may be the caller's own tensor."""
        self.inputs = self.inputs.masked_fill(which[:, None, None], 0)
        self.outputs = self.outputs.masked_fill(which[:, None, None], 0)
        if self.of_bias is not None:
            self.of_bias = self.of_bias.masked_fill(which[:, None], 0)
        if self.rows is not None:
            self.rows = self.rows.masked_fill(which[:, None], 0)

    def add_clipped(self, factors: Tensor) -> None:
        """Adds the block's records, each times its one of `factors` `(BLOCK,)`."""
        if self.rows is not None:
            self.weight += (factors @ self.rows).view(self.weight.shape)
        else:
            outputs = self.outputs.mul_(factors[:, None, None]).flatten(0, 1)
            inputs = self.inputs.flatten(0, 1)
            for some_outputs, some_inputs in zip(outputs.split(WIDENED), inputs.split(WIDENED), strict=True):
                if self.part_terms + len(some_inputs) > LARGEST_TERMS:
                    self._close_part()
                self.part.addmm_(some_outputs.t(), self._widened(some_inputs))
                self.part_terms += len(some_inputs)
        if self.of_bias is not None:
            self.bias += factors @ self.of_bias

    def sums(self) -> dict[Tensor, Tensor]:
        """By parameter of the layer."""
        self._close_part()
        sums: dict[Tensor, Tensor] = {self.layer.weight: self.weight}
        if self.layer.bias is not None:
            sums[self.layer.bias] = self.bias
        return sums

    def _close_part(self) -> None:
        self.weight += self.part
        self.part.zero_()
        self.part_terms = 0

    def _widened(self, values: Tensor) -> Tensor:
        if self.wide.shape != values.shape:
            self.wide = self.wide.new_empty(values.shape)
        return self.wide.copy_(values)


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
    discriminator: nn.Module, features: Tensor, conditioning: Tensor, loss: RecordLoss, clipping_norm: float, rows: int
) -> ClippedSum:  # fmt: skip
    """Block by block, of the real rows alone."""
    total = features.new_zeros(sum(p.numel() for p in discriminator.parameters()), dtype=torch.float64)
    norms = [features.new_zeros(0)]
    logits = [features.new_zeros(0, features.shape[1], conditioning.shape[1])]
    for start in range(0, len(features), BLOCK):
        part = slice(start, start + BLOCK)
        of_block = _opacus_block(discriminator, features[part], conditioning[part], loss, clipping_norm)
        norms.append(of_block.norms)
        logits.append(of_block.logits)
        finite = torch.isfinite(of_block.norms)
        if not finite.all():
            # The zero that rule 8 asks for: computed again without those records, since 0 * NaN is NaN.
            of_block = _opacus_block(
                discriminator, features[part][finite], conditioning[part][finite], loss, clipping_norm
            )
        total += of_block.total
    return ClippedSum(total, torch.cat(norms), torch.cat(logits))


def _opacus_block(
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
