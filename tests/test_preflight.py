"""Nothing is trusted that can be tested: kernels, speeds, copies between cards; and silence is filled."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import pytest
import torch
from engine.cards.heartbeat import NOTE, compile_note, heartbeat
from engine.cards.kernels import cannot_compute, card_name, install_line, require_kernels
from engine.cards.preflight import NATIVE, CardReport, Rate, preflight, rate_or_reason, unfused_attention
from engine.cards.timing import measure_rate
from engine.cards.transfer import copy_to, find_fault, needs_detour, through_host
from engine.errors import FireRedError
from engine.planning.machine import unusable
from engine.planning.planner import ROLES
from engine.progress import duration

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PATTERN = (4096, 1003)

# Kernels


@pytest.mark.parametrize(
    ("card", "release"),
    [
        ("sm_52", "torch==2.7.1 torchvision==0.22.1 torchaudio==2.7.1"),
        ("sm_61", "torch==2.7.1 torchvision==0.22.1 torchaudio==2.7.1"),
        ("sm_70", "torch==2.7.1 torchvision==0.22.1 torchaudio==2.7.1"),
        ("sm_75", "torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0"),
        ("sm_120", "torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0"),
        *((card, None) for card in ("sm_35", "sm_130", "gfx1151", "xpu", "avx2")),
    ],
)
def test_each_card_is_told_the_release_that_has_its_kernels(card: str, release: str | None) -> None:
    linux, windows = (install_line(card, windows=windows) for windows in (False, True))
    if release is None:
        assert linux == windows and "https://pytorch.org/get-started/locally" in linux
    else:
        index = "cu126" if "2.7.1" in release else "cu130"
        assert linux == f"pip install {release}"
        assert windows == f"{linux} --index-url https://download.pytorch.org/whl/{index}"


def test_a_card_that_torch_has_no_kernels_for_is_told_all_it_needs() -> None:
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
    card = "gpu:0 (Tesla P40, sm_61)"
    told = str(cannot_compute(card, "sm_61", ("sm_75", "sm_80"), error))
    assert told.startswith(
        f"This torch {torch.__version__} (built for sm_75, sm_80) cannot compute on {card}: "
        "CUDA error: no kernel image is available for execution on the device. Install with"
    )
    assert install_line("sm_61") in told and "update the driver" in told


def test_a_card_that_computes_wrong_or_not_at_all_is_refused() -> None:
    require_kernels(CPU)
    with pytest.raises(FireRedError, match=r"cpu .* multiplies small whole numbers wrong"):
        require_kernels(CPU, lambda a, b: (a @ b).index_fill(0, torch.tensor([63]), 0))

    def no_image(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    with pytest.raises(
        FireRedError, match=r"torch .* cannot compute on cpu .* no kernel image .*pytorch\.org"
    ):
        require_kernels(CPU, no_image)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
    ],
)
def test_a_card_without_room_is_not_told_to_update_its_driver(said: str) -> None:
    def fail(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(said)

    with pytest.raises(FireRedError, match=r"is full or held by another program.*choose another device") as e:
        require_kernels(CPU, fail)
    assert "driver" not in str(e.value)


def test_a_card_that_does_not_answer_is_refused_in_words() -> None:
    """A number that no machine has; torch raises at every question about it."""
    for ask in (card_name, require_kernels, preflight):
        with pytest.raises(FireRedError, match=r"^gpu:99 does not answer: .+\. Close programs that hold it"):
            ask(torch.device("cuda", 99))


def test_a_card_that_raised_is_a_place_without_room() -> None:
    with pytest.raises(Exception) as raised:  # whatever this build of torch raises
        torch.cuda.get_device_properties(99)
    device = unusable("gpu:1", torch.device("cuda", 1), raised.value)
    assert str(device.card) == "gpu:1" and device.usable < 0
    assert device.fault.startswith("gpu:1 does not answer: ")
    assert unusable("gpu:1", torch.device("cuda", 1), FireRedError("It is full.")).fault == "It is full."


# Attention


def test_attention_whose_kernels_are_off_holds_its_scores() -> None:
    assert unfused_attention(CPU) == frozenset()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert unfused_attention(CPU) == {(role, dtype) for role in ROLES for dtype in FLOATS}
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


# Speeds


def sleeping(seconds_an_operation: float, seen: list[int]) -> Callable[[int], Callable[[], object]]:
    def prepare(size: int) -> Callable[[], object]:
        seen.append(size)
        return lambda: time.sleep(seconds_an_operation * size)

    return prepare


def test_a_rate_is_operations_a_second() -> None:
    """20 ms for a size of 20, which stands for 10000 operations."""
    rate = measure_rate(sleeping(1e-3, []), lambda size: 500.0 * size, (1, 20), CPU)
    assert rate == pytest.approx(500_000, rel=0.2)


def test_a_slow_device_is_measured_at_a_small_size_in_little_time() -> None:
    seen: list[int] = []
    started = time.perf_counter()
    rate = measure_rate(sleeping(0.01, seen), float, (10, 100, 1000), CPU)
    assert seen == [10] and time.perf_counter() - started < 1
    assert rate == pytest.approx(100, rel=0.2)


def test_a_full_card_is_measured_at_the_size_that_fits() -> None:
    def prepare(size: int) -> Callable[[], object]:
        if size > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: time.sleep(0.02)

    assert measure_rate(prepare, float, (10, 20), CPU) == pytest.approx(500, rel=0.2)
    with pytest.raises(torch.OutOfMemoryError):
        measure_rate(prepare, float, (20,), CPU)


@pytest.fixture(scope="module")
def report() -> CardReport:
    preflight.cache_clear()
    others = torch.get_rng_state()
    measured = preflight(CPU)
    assert torch.equal(torch.get_rng_state(), others), "other people's random numbers changed"
    return measured


def test_the_cpu_is_measured_once_in_seconds(report: CardReport) -> None:
    assert preflight(CPU) is report
    assert report.seconds < 30
    rates = {rate.name: rate.tflops for rate in report.rates}
    assert list(rates)[:4] == ["matmul fp32", "matmul bf16", "matmul fp16", "matmul int8"]
    assert report.speeds.fp32 == rates["matmul fp32"] and 1e-4 < report.speeds.fp32 < 1e3
    assert report.speeds.int8 == rates["matmul int8"]
    assert report.speeds.bandwidth == rates["copy"] * 1e3 > 0.1
    attention = max(rates["attention fp32 flash"] or 0, rates["attention fp32 math"] or 0)
    assert report.speeds.fp32_attention == attention > 1e-4


def test_sixteen_bits_are_native_only_where_clearly_faster(report: CardReport) -> None:
    rates = {rate.name: rate.tflops or 0 for rate in report.rates}
    for name in ("bf16", "fp16"):
        rate = rates[f"matmul {name}"]
        is_faster = rate > NATIVE * rates["matmul fp32"]
        assert getattr(report.speeds, name) == (rate if is_faster else None)
    assert (report.speeds.bf16_attention is None) == (report.speeds.bf16 is None)


def test_what_does_not_run_says_why(report: CardReport) -> None:
    missing = {rate.name: rate.reason for rate in report.rates if rate.tflops is None}
    kinds = (
        f"attention {dtype} {backend}" for dtype in ("fp32", "bf16") for backend in ("efficient", "cudnn")
    )
    assert set(missing) == set(kinds)
    assert all("backend" in reason and "\n" not in reason for reason in missing.values())


def test_an_attention_backends_reason_is_found_among_torchs_warnings() -> None:
    """What torch says on a V100 with the flash backend alone."""
    where = " (Triggered internally at ../aten/src/ATen/native/transformers/cuda/sdp_utils.cpp:201.)"
    reason = "Flash attention only supports gpu architectures in the range [sm80, sm90]"

    def attend() -> None:
        for text in (
            "Memory efficient kernel not used because:",
            "Memory Efficient attention has been runtime disabled.",
            "Flash attention kernel not used because:",
            f"{reason}. Attempting to run on a sm 7.0 gpu.",
            "CuDNN attention kernel not used because:",
        ):
            warnings.warn(text + where, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    assert rate_or_reason("flash", lambda size: attend, float, (1,), CPU) == Rate("flash", None, reason)


def test_the_report_is_one_line_for_the_log(report: CardReport) -> None:
    assert str(report).startswith("cpu (") and "\n" not in str(report)
    assert f"matmul fp32 {report.speeds.fp32:.3g}" in str(report)


# Copies


def test_a_copy_that_arrives_intact_has_no_fault() -> None:
    assert find_fault(CPU, CPU, lambda tensor, device: tensor.clone(), PATTERN) is None


def test_zeros_instead_of_a_copy_are_found() -> None:
    fault = find_fault(CPU, CPU, lambda tensor, device: torch.zeros_like(tensor), PATTERN)
    assert fault is not None
    assert fault.startswith("4096 of 4096 numbers arrived wrong at attempt 1, number 0 as 0 instead of ")


def test_one_wrong_bit_in_the_last_number_of_the_odd_size_is_found() -> None:
    def flip(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copied = tensor.clone()
        if len(copied) % 2:
            copied[-1] ^= 1
        return copied

    fault = find_fault(CPU, CPU, flip, PATTERN)
    assert fault is not None and fault.startswith("1 of 1003 numbers arrived wrong at attempt 1, number 1002")


def test_a_copy_that_fails_now_and_then_is_found() -> None:
    copies = []

    def third_fails(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append(tensor.clone())
        return copies[-1] + (len(copies) == 3)

    assert "at attempt 3" in str(find_fault(CPU, CPU, third_fails, PATTERN))


def test_a_copy_that_never_happened_is_not_mistaken_for_the_one_before() -> None:
    kept: list[torch.Tensor] = []

    def stale(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not kept:
            kept.append(tensor.clone())
        return kept[0]

    assert "at attempt 2" in str(find_fault(CPU, CPU, stale, PATTERN))


def test_by_way_of_the_host_everything_arrives() -> None:
    assert find_fault(CPU, CPU, through_host, PATTERN) is None
    strided = torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).T
    assert torch.equal(through_host(strided, CPU), strided)


def test_only_pairs_of_cards_with_a_fault_take_the_detour() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    faults = {(first, second): "zeros", (second, first): None}
    asked = []

    def find(source: torch.device, target: torch.device) -> str | None:
        asked.append((source, target))
        return faults[source, target]

    assert needs_detour(first, second, find) and not needs_detour(second, first, find)
    assert not any(needs_detour(*pair, find) for pair in ((first, CPU), (CPU, first), (first, first)))
    assert asked == [(first, second), (second, first)]


def test_a_copy_to_another_device_is_in_fp32() -> None:
    copied = copy_to(torch.tensor([1.5, 3e38], dtype=torch.bfloat16), CPU)
    assert copied.dtype == torch.float32 and copied[0] == 1.5 and copied.isfinite().all()


# Signs of life


def test_a_heartbeat_speaks_first_then_at_intervals_then_never_again() -> None:
    said: list[str] = []
    with heartbeat("testing gpu:0", said.append, interval=0.05):
        assert len(said) == 1 and said[0].startswith("testing gpu:0")
        time.sleep(0.28)
    count = len(said)
    assert 3 <= count <= 6 and said[1:] == ["still testing gpu:0, 0 s so far"] * (count - 1)
    time.sleep(0.12)
    assert len(said) == count


def test_that_kernels_are_compiled_is_said_once_for_a_card() -> None:
    first, second = torch.device("cuda", 97), torch.device("cuda", 98)
    assert [compile_note(device) for device in (first, second, first)] == [NOTE, NOTE, ""]
    said: list[str] = []
    with heartbeat("running", said.append, interval=9, note=""):
        assert said == []


def test_a_heartbeat_ends_with_what_it_covers_failing() -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="broken"), heartbeat("testing", said.append, interval=0.02):
        raise ValueError("broken")
    time.sleep(0.06)
    assert len(said) == 1


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (29.6, 150, 3900)] == ["30 s", "2 min 30 s", "1 h 5 min"]
