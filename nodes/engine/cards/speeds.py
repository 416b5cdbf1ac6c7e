"""How fast one card is, as measured by preflight or assumed of a machine that is only described."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speeds:
    """Rates of one card, counting a multiplication and an addition as two operations.

    fp32, bf16, fp16: TFLOPS of big matrix products in that dtype, TF32 off. int8: TOPS of torch._int_mm.
    fp32_attention, bf16_attention: TFLOPS of scaled_dot_product_attention, 24 heads of 128, its fastest
    backend.
    bandwidth: GB/s that a copy within its memory reads and writes.
    None where the card, or this torch build on it, cannot or is not native at it, or where nobody measured.
    """

    fp32: float
    fp32_attention: float
    bf16: float | None = None
    bf16_attention: float | None = None
    fp16: float | None = None
    int8: float | None = None
    bandwidth: float | None = None


# Cards that nobody measured: matrix products at 85 % of the peak, the FP32 attention kernel at 45 %, DP4A at
# half of its 47 TOPS, and the data sheet's bandwidth.
ASSUMED = {"Tesla P40": Speeds(fp32=10.0, fp32_attention=5.3, int8=25.0, bandwidth=310.0)}
