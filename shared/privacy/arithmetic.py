"""How far float arithmetic may carry one record beyond the clipping norm: eta, derived from the number formats.

The coordinator chooses the weights, so it also chooses where rounding hurts: windows that nearly cancel, norms that
overflow or vanish. `dpsgd` is written so that two facts hold whatever the weights are:

1. What one record adds is a function of this record alone, and its norm is at most C. The norm that clips it is
   taken in float64 of exactly that which is summed; where it is taken by Gram matrices in float32, a bound of their
   error is added (`gram_allowance`).
2. Sums over records are float64. Only their rounding depends on other records, and eta is a bound of it.

The warm start's moments are float64 throughout and without cancellation: the same eta covers 2**24 records. Their
features, random ones among them, are fixed functions of a record, made in blocks of one shape.

Assumed: float32 and float64 of IEEE 754, sums and fused multiply-adds in any order, subnormal numbers kept or not
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 3); no bfloat16 inside float32 products. The
lattice of a release is not in here but in `PrivacyPlan.sensitivity`. Not covered: the kernel "opacus".
"""

from __future__ import annotations

FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53  # unit roundoff

# Rows of one pass, real ones and dummies: one shape, so that no product is computed in another way because more or
# fewer records were drawn; few enough that their windows stay in the processor's cache.
BLOCK = 64
# Terms of one float64 product; longer ones are taken in parts.
LARGEST_TERMS = 2**12
# Rows of one sum. A site that expects more in a step is refused with the plan.
LARGEST_SUM = 2**20
# Sum over windows of |output gradient| |input| of one record, clipped, over C: how far its windows may cancel.
# Its inverse square is added to every squared norm that is taken by Gram matrices.
LARGEST_CANCELLATION = 2.0**8
# An additive floor on squared lengths in float32: what products below the smallest normal number may have lost.
UNDERFLOW = 2.0**-100


def gamma(terms: int, unit: float) -> float:
    """Error of a sum of so many products, over the sum of their absolute values, in any order of summation."""
    assert terms * unit < 0.1, "the standard model says nothing useful of sums this long"
    return terms * unit / (1 - terms * unit)


def gram_allowance(inputs: int, outputs: int) -> float:
    """What is added to a squared norm <A A^T, G G^T> for every unit of (sum over windows |A_t| |G_t|)^2.

    A A^T and G G^T are float32, with `inputs` and `outputs` terms an entry: |error of entry (s, t)| is at most
    gamma |A_s| |A_t|, and so for G. Of the products the errors compose to gamma of all terms together; the lengths
    themselves come from the diagonals, each too small by a factor of 1 - gamma at most.
    """
    error = gamma(inputs + outputs, FLOAT32)
    return error / (1 - error) ** 2 + LARGEST_CANCELLATION**-2


def _slack() -> float:
    """eta. Norms below are over C; two neighbouring sums each have these errors, hence the factor 2."""
    # Clipped records' products of one part in float64: gamma times the sum of absolute products, which for one
    # record is at most LARGEST_CANCELLATION; two more roundings for the factor and its product.
    products = gamma(LARGEST_TERMS + 2, FLOAT64) * LARGEST_CANCELLATION * LARGEST_SUM
    # Parts added up: each addition rounds a total that is no longer than the number of records so far. There are at
    # least 8 records in a part, since Gram matrices are used below 512 windows only.
    additions = FLOAT64 * (LARGEST_SUM / 8) * LARGEST_SUM
    # A norm is a sum of fewer than 2**24 squares in float64 (of the widest convolution that settings allow: 2**22);
    # its root and the division by it are two roundings more.
    norms = gamma(2**24, FLOAT64)
    return 2 * (products + additions) + norms


ARITHMETIC_SLACK = _slack()
