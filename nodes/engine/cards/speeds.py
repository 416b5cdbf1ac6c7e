"""How fast one card is, as measured by preflight or assumed of a card that is not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speeds:
    """Rates of one card, counting a multiplication and an addition as two operations.

    fp32, bf16, fp16: TFLOPS of big matrix products in that dtype, TF32 off. int8: TOPS of torch._int_mm.
    fp32_attention, bf16_attention: TFLOPS of scaled_dot_product_attention with its fastest backend.
    int8_attention: TFLOPS of our kernels that round it to INT8. row_kernels: whether ours run between the
    products.
    bandwidth: GB/s that a copy within its memory reads and writes.
    None where the card or this torch cannot do it, where it is not native, and where it was not measured.
    """

    fp32: float
    fp32_attention: float
    bf16: float | None = None
    bf16_attention: float | None = None
    fp16: float | None = None
    int8: float | None = None
    int8_attention: float | None = None
    row_kernels: bool = False
    bandwidth: float | None = None
