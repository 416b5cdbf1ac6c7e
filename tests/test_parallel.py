"""Several cards of this process compute one image, and it is the image that one card gives."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_lora as lora_formats
import test_single_files as single_files
import tiny_checkpoint
import torch
from conftest import replica_on
from engine.cards.card import Card
from engine.cards.kernels import CardError, on_card
from engine.errors import InputError, NonFiniteError
from engine.files.cache import DiskCache
from engine.files.checkpoint import Checkpoint, Component, open_checkpoint
from engine.files.lora import open_lora
from engine.files.single import open_file
from engine.models import loading, together
from engine.models.transformer import Transformer
from engine.progress import before_each_block
from engine.sampling.conditioning import NEGATIVE, POSITIVE, Condition
from engine.sampling.layout import BOTH, CFG, LAYERS, SEQUENCE, Layout, dealt
from engine.sampling.options import SamplingOptions, StepCacheOptions
from engine.sampling.parallel import ParallelWorker
from engine.sampling.resume import SavedRun
from engine.sampling.sampling import SamplingRun, prepare_run, sample
from engine.sampling.workers import LocalWorker, Part
from engine.weights.adapters import Adapter, adaptable_layers
from engine.weights.components import Replica
from engine.weights.precision import PRECISIONS, resolve
from test_estimates import BF16_CARD

MODES = {CFG: 2, SEQUENCE: 3, BOTH: 4, LAYERS: 2}  # with the number of cards that each is tested on
LAYERS_OF_TINY = 2
# Parts of the tokens are summed in another order. Where that turns a rounding, it is more than in FP32.
SUMS_DIFFER = {"bf16": 2e-2, "int8-fast": 1e-3}


def card(number: int, name: str = "Tesla P40") -> Card:
    """A card of this process that is the CPU."""
    return Card(f"gpu:{number}", name, torch.device("cpu", number), native_bf16=False, memory=2**35)


def layout(checkpoint: Checkpoint, mode: str, precision: str = "fp32", cards: int = 0) -> Layout:
    cards = cards or MODES[mode]
    replicas = [replica_on(card(number), checkpoint, "transformer", precision) for number in range(cards)]
    if mode == LAYERS:
        replicas = [
            each.holding(tuple(range(number, LAYERS_OF_TINY, cards))) for number, each in enumerate(replicas)
        ]
    return Layout(mode, tuple(replicas))


def load_all(layout: Layout) -> list[Transformer]:
    return [loading.load(replica) for replica in layout.replicas]


def pictures(*sizes: tuple[int, int], tokens: int, masked: bool = False) -> Condition:
    generator = torch.Generator().manual_seed(tokens)
    latents = tuple(torch.randn(1, 16, 1, *size, generator=generator) for size in sizes)
    mask = torch.arange(tokens)[None] % 3 != 1 if masked else None
    return Condition(torch.randn(1, tokens, 128, generator=generator), mask, latents)


def prepared(
    replica: Replica, sizes: Sequence[tuple[int, int]] = ((4, 4),), masked: bool = False, **changes: Any
) -> SamplingRun:
    arguments: dict[str, Any] = dict(steps=3, true_cfg_scale=4.0, width=96, height=160, seed=0)
    conditions = {
        POSITIVE: pictures(*sizes, tokens=7, masked=masked), NEGATIVE: pictures(*sizes, tokens=2)
    }  # fmt: skip
    return prepare_run(replica, conditions, **(arguments | changes))


def alone(checkpoint: Checkpoint, precision: str = "fp32", **changes: Any) -> torch.Tensor:
    replica = replica_on(card(0), checkpoint, "transformer", precision)
    return sample(loading.load(replica), prepared(replica, **changes))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-fast", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_image_of_one_card(tiny: Checkpoint, mode: str, precision: str) -> None:
    shared = layout(tiny, mode, precision)
    found = sample(load_all(shared), prepared(shared.replicas[0], layout=shared))
    expected = alone(tiny, precision)
    if mode in (CFG, LAYERS):
        assert torch.equal(found, expected)
    else:
        assert difference(found, expected) < SUMS_DIFFER.get(precision, 1e-5)


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["", "zero_cond_t"])
@pytest.mark.parametrize("mode", MODES)
def test_masks_and_several_odd_pictures_are_shared_too(tmp_path: Path, mode: str, zero_cond_t: bool) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint.build(tmp_path / "tiny", zero_cond_t=zero_cond_t))
    shared = layout(checkpoint, mode)
    changes: dict[str, Any] = dict(sizes=((6, 10), (7, 3), (2, 2)), masked=True)
    found = sample(load_all(shared), prepared(shared.replicas[0], layout=shared, **changes))
    assert difference(found, alone(checkpoint, **changes)) < 1e-5


def test_a_step_with_one_branch_is_shared_by_all_cards(tiny: Checkpoint) -> None:
    """Guidance in a part of the steps: the other steps are split over four cards instead of two."""
    options = SamplingOptions(guidance_to=0.5)
    shared = layout(tiny, BOTH)
    run = prepared(shared.replicas[0], layout=shared, options=options, steps=4)
    seen: list[set[str]] = []
    with spied(seen):
        found = sample(load_all(shared), run)
    assert difference(found, alone(tiny, options=options, steps=4)) < 1e-5
    assert seen[0] == {"gpu:0", "gpu:1", "gpu:2", "gpu:3"} == seen[-1]


@pytest.mark.parametrize("mode", MODES)
def test_loras_and_the_step_cache_work_in_every_mode(tiny: Checkpoint, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "style.safetensors"
    lora_formats.diffusers(lora_formats.factors(tiny), path)
    adapter = Adapter(open_lora(path, adaptable_layers(tiny)), 0.5)
    options = SamplingOptions(adapters=(adapter,), step_cache=StepCacheOptions(0.5, 0.1))
    shared = layout(tiny, mode)
    found = sample(load_all(shared), prepared(shared.replicas[0], layout=shared, options=options, steps=8))
    expected = alone(tiny, options=options, steps=8)
    assert difference(found, expected) < 1e-5
    assert difference(found, alone(tiny, steps=8)) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-fast", "bf16", "nf4", "int8-bnb"])
def test_a_second_copy_comes_from_the_first_card(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    shared = layout(tiny, CFG, precision)
    first = loading.load(shared.replicas[0])
    monkeypatch.setattr(Component, "tensors", lambda *_: pytest.fail("the file was read again"))
    second = loading.load(shared.replicas[1], source=first)
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {x.data_ptr() for x in ours.values()} & {x.data_ptr() for x in theirs.values()}
    assert second.arithmetic == first.arithmetic
    monkeypatch.undo()
    made = [sample(model, prepared(model.replica)) for model in (first, second)]
    assert torch.equal(*made)


def test_a_copy_keeps_the_form_of_the_files(tmp_path: Path) -> None:
    folder = open_checkpoint(tiny_checkpoint.build(tmp_path / "tiny", published_heads=True))
    path = tmp_path / "scaled_fp8.safetensors"
    single_files.new_fp8(single_files.weights(folder, "transformer"), path)
    shared = layout(open_file(path, "transformer"), CFG)
    first = loading.load(shared.replicas[0])
    second = loading.load(shared.replicas[1], source=first)
    x, layers = torch.randn(3, 256), [model.model.block(1).attn.to_k for model in (first, second)]
    assert [name for name, _ in layers[1].named_parameters()] == ["bias"]
    assert torch.equal(*(layer(x[:, : layer.in_features]) for layer in layers))


# What a run is resumed by


def names(checkpoint: Checkpoint, layout_: Layout | None) -> str:
    replica = layout_.replicas[0] if layout_ else replica_on(card(0), checkpoint, "transformer", "fp32")
    return prepared(replica, layout=layout_).name()


def test_a_layout_that_keeps_the_bits_goes_on_with_a_run_of_one_card(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    store, shared = DiskCache(tmp_path, 10**9), layout(tiny, CFG)
    replica = replica_on(card(0), tiny, "transformer", "fp32")

    def stop(done: int, total: int, denoised: torch.Tensor) -> None:
        if done == 2:
            raise KeyboardInterrupt

    run = prepared(replica)
    with pytest.raises(KeyboardInterrupt):
        sample(loading.load(replica), run, stop, saved=SavedRun(store, run.name()))
    seen: list[int] = []
    both = prepared(replica, layout=shared)
    resumed = sample(
        load_all(shared), both, lambda done, *_: seen.append(done), saved=SavedRun(store, both.name())
    )
    assert seen == [3] and torch.equal(resumed, alone(tiny))


def test_other_layouts_have_runs_of_their_own(tiny: Checkpoint) -> None:
    kept = {names(tiny, None), names(tiny, layout(tiny, CFG)), names(tiny, layout(tiny, LAYERS))}
    assert len(kept) == 1
    others = [layout(tiny, SEQUENCE), layout(tiny, SEQUENCE, cards=2), layout(tiny, BOTH)]
    assert len({*(names(tiny, other) for other in others), *kept}) == 4
    cfg = layout(tiny, CFG)
    unequal = Layout(CFG, (cfg.replicas[0], replace(cfg.replicas[1], card=card(1, "RTX 3090"))))
    assert names(tiny, unequal) not in kept
    first, second = (replace(each, card=other) for each, other in zip(
        layout(tiny, LAYERS).replicas, (card(0), card(1, "RTX 3090")), strict=True
    ))  # fmt: skip
    swapped = [each.holding(other.spec.held) for each, other in ((first, second), (second, first))]
    dealt_otherwise = {names(tiny, Layout(LAYERS, found)) for found in ((first, second), tuple(swapped))}
    assert len(dealt_otherwise) == 2


def test_without_guidance_cfg_leaves_the_second_card_alone(tiny: Checkpoint) -> None:
    shared = layout(tiny, CFG)
    run = prepared(shared.replicas[0], layout=shared, true_cfg_scale=1.0)
    assert run.layout is None and [each.replica for each in run.on_each_card()] == [shared.replicas[0]]
    both = prepared(shared.replicas[0], layout=shared)
    assert tuple(each.replica for each in both.on_each_card()) == shared.replicas


# Faults


@contextlib.contextmanager
def failing(label: str, at: int, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """The card's blocks fail from their `at`th call on; collects the card of every call."""
    calls: list[str] = []
    before = together.on_card

    @contextlib.contextmanager
    def on_card(device: torch.device) -> Iterator[None]:
        with before(device):
            calls.append(f"gpu:{device.index}")
            if calls[-1] == label and calls.count(label) >= at:
                raise error()
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "on_card", on_card)
        yield calls


@contextlib.contextmanager
def spied(seen: list[set[str]]) -> Iterator[None]:
    """The cards that each step uses."""
    before = ParallelWorker._predict

    def predict(self: ParallelWorker, latents: torch.Tensor, step: int) -> Any:
        with failing("", 0, RuntimeError) as calls:
            made = before(self, latents, step)
        seen.append(set(calls))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParallelWorker, "_predict", predict)
        yield


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("mode", [CFG, SEQUENCE, BOTH])
def test_a_card_that_fails_costs_a_step(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture, mode: str, failed: int
) -> None:
    shared = layout(tiny, mode)
    models, steps = load_all(shared), []
    with failing(f"gpu:{failed}", 8, lambda: torch.OutOfMemoryError("CUDA out of memory")):
        found = sample(
            models, prepared(shared.replicas[0], layout=shared), lambda done, *_: steps.append(done)
        )
    assert steps == [1, 2, 3]
    assert difference(found, alone(tiny)) < 1e-5
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    left = MODES[mode] - 1
    assert said.startswith(f"gpu:{failed} (Tesla P40) ran out of memory at step ")
    assert said.endswith(f"this step is done again, and the run goes on without it ({left} left)")


def test_the_last_cards_error_ends_the_run_and_it_resumes(
    tiny: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared, store = layout(tiny, CFG), DiskCache(tmp_path, 10**9)
    models, run = load_all(shared), prepared(shared.replicas[0], layout=shared)
    broken = RuntimeError("CUDA error: unspecified launch failure")
    with (
        failing("gpu:0", 8, lambda: broken),
        failing("gpu:1", 8, lambda: broken),
        pytest.raises(RuntimeError, match="unspecified launch failure") as raised,
    ):
        sample(models, run, saved=SavedRun(store, run.name()))
    assert raised.value is broken
    assert "gpu:0 (Tesla P40) failed (CUDA error: unspecified launch failure)" in caplog.text
    seen: list[int] = []
    resumed = sample(models, run, lambda done, *_: seen.append(done), saved=SavedRun(store, run.name()))
    assert seen[0] > 1 and torch.equal(resumed, alone(tiny))


def test_a_first_card_that_fails_for_good_ends_the_run(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """The latents are on it: nobody else can go on from them, and nobody else is blamed."""
    shared = layout(tiny, SEQUENCE)
    models, broken = load_all(shared), RuntimeError("CUDA error: an illegal memory access")
    run = prepared(shared.replicas[0], layout=shared)
    arguments = run.schedule, run.padded_size, run.conditions
    worker = ParallelWorker([LocalWorker(model, *arguments) for model in models], shared)
    seen = CardError(shared.replicas[0].device, broken)
    seen.__cause__ = broken
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker._leave_out(seen, 0, shared.replicas[0].device)
    assert "gpu:0 (Tesla P40) failed (CUDA error: an illegal memory access)" in caplog.text
    assert "gpu:1" not in caplog.text


def test_an_error_keeps_the_card_it_was_first_seen_on() -> None:
    first, second = torch.device("cpu", 1), torch.device("cpu", 2)
    with pytest.raises(CardError) as raised, on_card(second), on_card(first):
        raise RuntimeError("out of memory")
    assert raised.value.device == first


def test_a_black_image_that_cannot_be_repeated_says_so(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = layout(tiny, SEQUENCE)
    models = load_all(shared)
    models[2].model.block(1).img_mlp.net[2].weight.data[0, 0] = torch.nan
    full = CardError(shared.replicas[1].device, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(ParallelWorker, "_trace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(NonFiniteError, match=r"a traced repeat failed .*would be black") as raised:
        sample(models, prepared(shared.replicas[0], layout=shared))
    assert "suspect the card" not in str(raised.value)


def test_a_part_that_fails_ends_the_run_with_its_card_named(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    shared = layout(tiny, LAYERS)
    models, full = load_all(shared), torch.OutOfMemoryError("CUDA out of memory")
    with failing("gpu:1", 3, lambda: full), pytest.raises(torch.OutOfMemoryError):
        sample(models, prepared(shared.replicas[0], layout=shared))
    assert "gpu:1 (Tesla P40) ran out of memory at step" in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_a_cancel_in_any_cards_block_stops_all(tiny: Checkpoint, mode: str) -> None:
    """As ComfyUI's interrupt, it is no error of the card: nothing is tried again."""

    class Interrupted(BaseException):
        pass

    shared = layout(tiny, mode)
    models, calls = load_all(shared), []

    def interrupt() -> None:
        calls.append(1)
        raise Interrupted

    with before_each_block(models[1].model, torch.device("cpu"), interrupt), pytest.raises(Interrupted):
        sample(models, prepared(shared.replicas[0], layout=shared))
    assert calls == [1]


@pytest.mark.parametrize("mode", MODES)
def test_a_black_image_names_the_module_on_whichever_card_it_broke(tiny: Checkpoint, mode: str) -> None:
    shared = layout(tiny, mode)
    models = load_all(shared)
    broken = models[1].model.block(1)
    broken.img_mlp.net[2].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError) as raised:
        sample(models, prepared(shared.replicas[0], layout=shared))
    assert "transformer_blocks.1.img_mlp.net.2" in str(raised.value)
    assert "Its weight holds NaN or infinity" in str(raised.value)
    assert "gpu:1.transformer_blocks.1" in str(raised.value)


# What cannot share


def test_cards_that_would_compute_otherwise_are_refused(tiny: Checkpoint) -> None:
    first, second = layout(tiny, CFG).replicas
    bf16 = replace(second, spec=replace(second.spec, precision=resolve(PRECISIONS["bf16"], BF16_CARD)))
    with pytest.raises(
        InputError, match=r"compute differently.*Set math of FireRed Load Transformer to fp32"
    ):
        Layout(SEQUENCE, (first, bf16))
    with pytest.raises(InputError, match="cfg takes two cards, one for each branch of guidance, not 3"):
        Layout(CFG, (first, second, second))
    with pytest.raises(InputError, match="even number of cards, not 3"):
        Layout(BOTH, (first, second, second))
    for mode in (SEQUENCE, BOTH, LAYERS):
        with pytest.raises(InputError, match="takes no fp16 arithmetic"):
            layout(tiny, mode, "fp16", cards=2)


def test_fp16_is_watched_in_the_mode_that_takes_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint.build(tmp_path / "tiny", overflow_block=1))
    shared = layout(checkpoint, CFG, "fp16")
    with pytest.raises(NonFiniteError, match="Set its precision to"):
        sample(load_all(shared), prepared(shared.replicas[0], layout=shared))


@pytest.mark.parametrize("counts", [(60,), (30, 30), (25, 35), (20, 20, 20), (3, 1), (1, 1, 1, 57), (0, 5)])
def test_every_block_is_dealt_once(counts: tuple[int, ...]) -> None:
    hands = dealt(counts)
    assert tuple(map(len, hands)) == counts
    assert sorted(number for hand in hands for number in hand) == list(range(sum(counts)))


def test_two_branches_are_on_two_cards_at_once(tiny: Checkpoint) -> None:
    """While one branch is on a card the other one is on the next, but for the first and the last block."""
    shared = layout(tiny, LAYERS)
    models, order = load_all(shared), []
    for number, model in enumerate(models):
        for block in model.model.transformer_blocks.values():
            block.register_forward_pre_hook(lambda *_, number=number: order.append(number))
    sample(models, prepared(shared.replicas[0], layout=shared, steps=2))
    assert order == [0, 1, 0, 1] * 2


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64, 8442])
@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_parts_are_equal_and_leave_nothing_out(tokens: int, of: int) -> None:
    found = [range(tokens)[part.among(tokens)] for part in Part(of=of).all]
    assert [token for part in found for token in part] == list(range(tokens))
    assert max(map(len, found)) - min(map(len, found)) <= 1
