"""Our CUDA kernels compile for cards that are not here. What goes wrong is named and costs only time.

That they compute right is tested on each card before they are used (engine.cuda).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compiling import ALL, EPSILON, OLD_COMPILER, compile_for, old_nvrtc, resources
from conftest import replica_for
from engine.cuda import compiler
from engine.cuda.attention import Int8Attention, int8_attention, rounded_attention
from engine.cuda.compiler import (
    OPTIONS,
    KernelError,
    Nvrtc,
    compiled,
    find_nvrtc,
    nvrtc,
)
from engine.cuda.driver import driver_version, if_they_pass
from engine.cuda.rows import row_kernels
from engine.files.cache import SUFFIX, DiskCache
from engine.files.checkpoint import Checkpoint
from engine.limits import INT8
from engine.models import loading
from engine.models.attention import attention_on
from engine.models.transformer import attend
from engine.weights.formats import Int8FastLinear
from sass import disassemble, find_cuobjdump, issue_cycles, paths

from launcher.folders import ROOT

# Threads of each kernel's largest block, and how many blocks must fit on a multiprocessor.
BLOCKS = {
    "attend": (128, 2),
    "multiply_int8": (256, 2),
    "measure_parts": (128, 2),
    "measure_all": (128, 2),
    "pack_queries": (256, 2),
    "pack_keys": (256, 2),
    "pack_values": (256, 2),
    "quantize_rows": (1024, 1),
    "finish_heads": (1024, 1),
    "finish_rows": (256, 2),
    "upcast_rows": (256, 2),
}
CURRENT = "sm_75"  # NVRTC 12 and 13 compile for it
DRIVER = 12080
TINY = 'extern "C" __global__ void set(int* out) { *out = NUMBER; }'
CPU = torch.device("cpu")

needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")


# Compiling


@pytest.mark.parametrize("architecture", ["sm_61", "sm_70"])
def test_every_kernel_compiles_without_spills_and_leaves_room_for_two_blocks(architecture: str) -> None:
    seen = set()
    for source, macros in ALL:
        for name, found in resources(compile_for(architecture, source, macros).log).items():
            threads, blocks = BLOCKS[name]
            assert found.spilled == 0, name
            assert found.blocks(threads) >= blocks, (name, found)
            seen.add(name)
    assert seen == BLOCKS.keys()


@pytest.mark.parametrize("source", ["attention.cu", "product.cu"])
def test_a_card_without_dp4a_is_told_so(source: str) -> None:
    with pytest.raises(KernelError, match=r"^NVRTC \(12, 6\): .*error.*dp4a"):
        compile_for("sm_60", source, {})


def test_row_kernels_need_no_dp4a() -> None:
    assert resources(compile_for("sm_60", "rows.cu", EPSILON).log).keys() < BLOCKS.keys()


def test_an_error_in_a_source_is_told_by_its_first_line() -> None:
    text = 'extern "C" __global__ void f() {\n  missing();\n  also_missing();\n}'
    with pytest.raises(KernelError, match=r'broken\.cu\(2\): error: identifier "missing" is undefined$'):
        old_nvrtc().compile(text, "broken.cu", (*OPTIONS, "--gpu-architecture=sm_61"))


@pytest.mark.skipif(find_cuobjdump() is None, reason="Triton brings what reads machine code")
@pytest.mark.parametrize(
    ("source", "kernel", "turns", "least"),
    [("attention.cu", "attend", 7, 0.7), ("product.cu", "multiply_int8", 1, 0.8)],
)
def test_pascal_spends_the_main_loops_on_products(source: str, kernel: str, turns: int, least: float) -> None:
    """Bank conflicts included, which the order of a store once doubled."""
    code = disassemble(find_cuobjdump(), compile_for("sm_61", source, {}).binary)[kernel]
    trace = [instruction for path in paths(code, turns) for instruction in path]
    products = sum(instruction.operation == "IDP" for instruction in trace)
    assert products / issue_cycles(trace) > least


# The compiler's library


@needs_cuda_torch
def test_the_compiler_is_that_of_torchs_cuda() -> None:
    assert str(nvrtc().version[0]) == torch.version.cuda.partition(".")[0]
    assert old_nvrtc().version == (12, 6)


@needs_cuda_torch
def test_the_compiler_works_where_torch_loaded_parts_of_another_version() -> None:
    """torch loads what any package of that name has, such as one that another node pack brought."""
    script = (
        "from engine.cuda.compiler import OPTIONS, nvrtc\n"
        "text = 'extern \"C\" __global__ void f() {}'\n"
        f"print(len(nvrtc().compile(text, 'f.cu', (*OPTIONS, '--gpu-architecture={CURRENT}')).binary))"
    )
    path = os.pathsep.join([str(OLD_COMPILER), str(ROOT / "nodes")])
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1000


def test_a_missing_compiler_is_told(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"^there is no NVRTC 14: .*14.* cannot be used \("):
        find_nvrtc("14", tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="the library's names are Linux's")
@pytest.mark.parametrize("kind", ["another library", "no library"])
def test_a_library_that_is_not_the_compiler_is_passed_over(tmp_path: Path, kind: str) -> None:
    real = Path(old_nvrtc()._library._name)
    library = tmp_path / "nvidia" / "a" / "lib" / "libnvrtc.so.12"
    library.parent.mkdir(parents=True)
    if kind == "another library":
        library.symlink_to(next(real.parent.glob("libnvrtc-builtins.so*")))
    else:
        library.write_text("not a library")
    with pytest.raises(KernelError, match=rf"{library} cannot be used \("):
        Nvrtc(str(library))
    (tmp_path / "nvidia" / "b").symlink_to(real.parents[1])
    found = find_nvrtc("12", tmp_path)
    assert found.version == (12, 6) and Path(found._library._name).parts[-3] == "b"


@pytest.mark.skipif(sys.platform == "win32", reason="the library's names are Linux's")
def test_a_compiler_of_another_version_is_passed_over(tmp_path: Path) -> None:
    library = tmp_path / "nvidia" / "a" / "lib" / "libnvrtc.so.14"
    library.parent.mkdir(parents=True)
    library.symlink_to(old_nvrtc()._library._name)
    with pytest.raises(KernelError, match=rf"there is no NVRTC 14: {library} is version \(12, 6\); "):
        find_nvrtc("14", tmp_path)


# What is kept


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 10**9)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A source that compiles at once."""
    (tmp_path / "tiny.cu").write_text(TINY)
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    return "tiny.cu"


@contextmanager
def keeping(cache: DiskCache) -> Iterator[None]:
    """Inside this context, compiled kernels are kept there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_find_cache", lambda: cache)
        yield


def binaries(source: str, cache: DiskCache, driver: int = DRIVER) -> list[bytes]:
    """All that may be tried: what is kept, if it is good, then what is compiled."""
    with keeping(cache):
        return list(compiled(source, CURRENT, {"NUMBER": 3}, driver))


def kept(cache: DiskCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def replace_binary(path: Path, cache: DiskCache, content: bytes) -> None:
    """Keep other bytes under that name, as if they had been compiled."""
    tensor = compiler._bytes(content)
    cache.write(
        path.name.removesuffix(SUFFIX), {compiler.BINARY: tensor, compiler.CHECK: compiler._check(tensor)}
    )


@needs_cuda_torch
def test_a_kept_binary_is_used_and_another_is_compiled_for_whoever_cannot_use_it(
    cache: DiskCache, source: str
) -> None:
    (first,) = binaries(source, cache)
    assert binaries(source, cache) == [first, first]
    (path,) = kept(cache)
    replace_binary(path, cache, b"of another time")
    assert binaries(source, cache) == [b"of another time", first]
    assert binaries(source, cache) == [first, first]  # it was replaced


@needs_cuda_torch
def test_a_kept_binary_is_for_one_driver_one_architecture_and_its_macros(
    cache: DiskCache, source: str
) -> None:
    binaries(source, cache)
    assert len(binaries(source, cache, driver=13000)) == 1
    with keeping(cache):
        assert len(list(compiled(source, "sm_80", {"NUMBER": 3}, DRIVER))) == 1
        assert len(list(compiled(source, CURRENT, {"NUMBER": 4}, DRIVER))) == 1
    assert len(kept(cache)) == 4


def flip(at: Callable[[int], int]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        place = at(len(content))
        return content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1 :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-100],
    "a bit of the binary": flip(lambda size: size // 2),
    "a bit of the check": flip(lambda size: size - 1),
    "a bit of the header": flip(lambda size: 40),
    "its length": flip(lambda size: 0),
    "another file": lambda content: b"not what was kept" * 99,
}


@needs_cuda_torch
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_binary_is_compiled_again(cache: DiskCache, source: str, damage: str) -> None:
    (first,) = binaries(source, cache)
    (path,) = kept(cache)
    good = path.read_bytes()
    path.write_bytes(DAMAGES[damage](good))
    assert binaries(source, cache) == [first]
    assert kept(cache) == [path] and path.read_bytes() == good


@needs_cuda_torch
def test_a_binary_damaged_anywhere_is_not_used(cache: DiskCache, source: str) -> None:
    (first,) = binaries(source, cache)
    (path,) = kept(cache)
    good = path.read_bytes()
    for place in range(0, len(good), 97):
        path.write_bytes(flip(lambda size, place=place: place)(good))
        assert binaries(source, cache)[0] == first, place


@needs_cuda_torch
@pytest.mark.skipif(sys.platform == "win32", reason="a folder that nobody can write, not even root")
def test_a_folder_that_cannot_be_written_keeps_nothing_and_costs_nothing(source: str) -> None:
    cache = DiskCache(Path("/proc/self/firered"), 10**9)
    (first,) = binaries(source, cache)
    assert binaries(source, cache) == [first]


@needs_cuda_torch
@pytest.mark.skipif(sys.platform == "win32", reason="permissions are Linux's")
def test_what_is_kept_in_a_read_only_folder_is_used(cache: DiskCache, source: str) -> None:
    (first,) = binaries(source, cache)
    (path,) = kept(cache)
    replace_binary(path, cache, b"kept")
    path.chmod(0o444)
    cache.folder.chmod(0o555)
    try:
        assert binaries(source, cache) == [b"kept", first]
    finally:
        cache.folder.chmod(0o755)


WRITER = """
import sys
from pathlib import Path
from engine.cuda import compiler
from engine.files.cache import DiskCache, digest
compiler.SOURCES = Path(sys.argv[1])
compiler.nvrtc()
print("ready", flush=True)
input()
cache = DiskCache(Path(sys.argv[2]), 10**9)
compiler.keep_kernels_in(lambda: cache)
for number in range(25):
    binary = next(compiler.compiled("tiny.cu", sys.argv[3], {"NUMBER": number}, 1))
    print(digest(binary))
"""


@needs_cuda_torch
def test_two_processes_that_compile_at_once_leave_whole_files(cache: DiskCache, source: str) -> None:
    command = [sys.executable, "-c", WRITER, str(compiler.SOURCES), str(cache.folder), CURRENT]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "nodes")}
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert found[0] == found[1] and len(set(found[0].split())) == 25
    assert len(kept(cache)) == 25
    assert all(cache.read(path.name.removesuffix(SUFFIX)) for path in kept(cache))


# Where there is no card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_has_no_kernels(dtype: torch.dtype) -> None:
    assert row_kernels(CPU, dtype) is None
    assert int8_attention(CPU) is None
    assert attention_on(CPU, INT8) is attend
    with pytest.raises(KernelError, match="NVIDIA"):
        Int8Attention(CPU)


def test_a_model_on_the_cpu_computes_in_plain_torch(tiny: Checkpoint) -> None:
    model = loading.load(replica_for(tiny, "transformer", "int8-fast")).model
    layers = [layer for layer in model.modules() if isinstance(layer, Int8FastLinear)]
    assert layers and all(layer.path is None or layer.path.kernels is None for layer in layers)
    assert not any(layer.takes_rows(1000) for layer in layers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_missing_driver_is_told() -> None:
    with pytest.raises(KernelError, match="the driver's library cannot be used"):
        driver_version()


# INT8 attention: what the kernels compute, against exact attention

HEADS, QUERIES, KEYS, SIZE = 2, 200, 700, 128


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def normed(x: torch.Tensor) -> torch.Tensor:
    return x * x.square().mean(dim=-1, keepdim=True).rsqrt()


def spread(low: float, high: float) -> torch.Tensor:
    """A factor for each head's channel."""
    return torch.rand(1, HEADS, 1, SIZE, dtype=torch.float64) * (high - low) + low


def after_norm() -> Iterator[torch.Tensor]:
    """As after the norm of queries and keys, with weights of 1 to 3."""
    yield from (normed(normal(1, HEADS, tokens, SIZE)) * spread(1, 3) for tokens in (QUERIES, KEYS))
    yield normal(1, HEADS, KEYS, SIZE)


def tails_and_mean() -> Iterator[torch.Tensor]:
    """Keys with heavy tails around a large mean."""
    yield normed(normal(1, HEADS, QUERIES, SIZE)) * spread(1, 2)
    tails = normal(1, HEADS, KEYS, SIZE) / (normal(1, HEADS, KEYS, 1).abs() * 0.5 + 0.5)
    mean = normal(1, HEADS, 1, SIZE) * 3
    mean[..., 7], mean[..., 70] = 25, -18
    yield tails * spread(0.5, 2) + mean
    yield normal(1, HEADS, KEYS, SIZE)


def outlier_channels() -> Iterator[torch.Tensor]:
    weight = spread(0.5, 1.5)
    weight[..., 3], weight[..., 90] = 8, 6
    yield from (normed(normal(1, HEADS, tokens, SIZE)) * weight for tokens in (QUERIES, KEYS))
    yield normal(1, HEADS, KEYS, SIZE)


def sink() -> Iterator[torch.Tensor]:
    """One key far above all others."""
    yield normed(normal(1, HEADS, QUERIES, SIZE)) + 0.25
    keys = normed(normal(1, HEADS, KEYS, SIZE))
    keys[:, :, 0] = 2.2
    yield keys
    yield normal(1, HEADS, KEYS, SIZE)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=3) @ value


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("inputs", "bound"), [(after_norm, 0.03), (tails_and_mean, 0.03), (outlier_channels, 0.02), (sink, 0.02)]
)
def test_rounded_attention_is_near_exact_attention(
    inputs: Callable[[], Iterator[torch.Tensor]], bound: float
) -> None:
    query, key, value = inputs()
    error = difference(rounded_attention(query, key, value, None), exact(query, key, value))
    assert bound / 3 < error < bound  # it does round


def test_the_values_means_and_scales_cost_nothing() -> None:
    query, key, value = after_norm()
    value[..., ::17] *= 100
    error = difference(rounded_attention(query, key, value, None), exact(query, key, value))
    shifted = rounded_attention(query, key, value + 1000, None) - 1000
    assert error < 0.03
    assert difference(shifted, rounded_attention(query, key, value, None)) < 1e-9


def test_an_added_key_mean_changes_nothing() -> None:
    """No probability depends on it."""
    query, key, value = after_norm()
    shifted = rounded_attention(query, key + 100 * normal(1, HEADS, 1, SIZE), value, None)
    assert difference(shifted, rounded_attention(query, key, value, None)) < 1e-3


@pytest.mark.parametrize("first", [0, 2, 300, 699])
def test_masked_keys_are_as_if_they_were_not_there(first: int) -> None:
    query, key, value = after_norm()
    mask = torch.ones(1, 1, 1, KEYS, dtype=torch.bool)
    mask[..., first : first + 140] = False
    kept = mask.flatten()
    key[:, :, ~kept], value[:, :, ~kept] = torch.nan, torch.inf
    found = rounded_attention(query, key, value, mask)
    assert torch.equal(found, rounded_attention(query, key[:, :, kept], value[:, :, kept], None))
    assert difference(found, exact(query, key[:, :, kept], value[:, :, kept])) < 0.03


@pytest.mark.parametrize(("keys", "size"), [(1, 128), (128, 128), (129, 64)])
def test_any_number_of_keys_and_any_power_of_2_of_channels(keys: int, size: int) -> None:
    query, key, value = (normal(1, HEADS, tokens, size) for tokens in (5, keys, keys))
    assert difference(rounded_attention(query, key, value, None), exact(query, key, value)) < 0.02


def test_kernels_that_do_not_start_are_left_and_a_full_card_is_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(error: RuntimeError) -> Callable[[torch.device], None]:
        def load(device: torch.device) -> None:
            raise error

        return load

    card = torch.device("cuda", 0)
    with caplog.at_level("INFO"):
        found = if_they_pass(card, "torch instead", fail(RuntimeError("not launched")), lambda kernels: "")
    assert found is None and "cuda:0: torch instead (not launched)" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        if_they_pass(card, "torch instead", fail(torch.OutOfMemoryError("full")), lambda kernels: "")
