"""LoRAs of every program give what diffusers gives with them fused into its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_checkpoint
import torch
import torch.nn.functional as F
from conftest import replica_for
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from engine.errors import CheckpointError, InputError
from engine.files.checkpoint import Checkpoint, open_checkpoint
from engine.files.lora import LoRA, open_lora
from engine.models import loading
from engine.models.transformer import Transformer, rotary_embedding
from engine.weights.adapters import Adapter, Adapters, adaptable_layers
from safetensors.torch import load_file, save_file
from test_transformer import GRIDS, by_diffusers, inputs

CPU = torch.device("cpu")
RANK, ALPHA, TOLERANCE = 4, 6.0, 1e-5
GRID = GRIDS["reference"]
TIMESTEP = torch.tensor([0.6])

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module", params=[False, True], ids=["index", "zero_cond_t"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("lora") / "checkpoint"
    return open_checkpoint(tiny_checkpoint.build(folder, zero_cond_t=request.param))


@pytest.fixture(scope="module")
def transformer(checkpoint: Checkpoint) -> Transformer:
    return loading.load(replica_for(checkpoint, "transformer"))


def factors(checkpoint: Checkpoint, seed: int = 0, rank: int = RANK) -> Factors:
    """Random (down, up) for every layer of the blocks, modulation included."""
    generator = torch.Generator().manual_seed(seed)
    layers = adaptable_layers(checkpoint).items()
    return {
        name: (
            torch.randn(rank, inputs, generator=generator) / inputs**0.5,
            torch.randn(outputs, rank, generator=generator) / rank**0.5,
        )
        for name, (outputs, inputs) in layers
        if name.startswith("transformer_blocks")
    }


# Each writes the factors as a program does, and says by which scale they act there.


def peft(found: Factors, path: Path) -> float:
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["to_q"]}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    _save(found, path, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", metadata=metadata)
    return ALPHA / RANK


def diffusers(found: Factors, path: Path) -> float:
    _save(found, path, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight")
    return 1.0


def lightx2v(found: Factors, path: Path) -> float:
    _save(found, path, "{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha")
    return ALPHA / RANK


def kohya(found: Factors, path: Path) -> float:
    flat = {name.replace(".", "_"): pair for name, pair in found.items()}
    _save(flat, path, "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha")
    return ALPHA / RANK


def diffsynth(found: Factors, path: Path) -> float:
    _save(found, path, "pipe.dit.{}.lora_A.default.weight", "pipe.dit.{}.lora_B.default.weight")
    return 1.0


def ai_toolkit(found: Factors, path: Path) -> float:
    _save(found, path, "diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight")
    return 1.0


def lycoris(found: Factors, path: Path) -> float:
    flat = {name.replace(".", "_"): pair for name, pair in found.items()}
    _save(flat, path, "lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight", "lycoris_{}.alpha")
    return ALPHA / RANK


def _save(
    found: Factors, path: Path, down: str, up: str, alpha: str = "", metadata: dict[str, str] | None = None
) -> None:
    tensors = {}
    for name, (first, second) in found.items():
        tensors |= {down.format(name): first.contiguous(), up.format(name): second.contiguous()}
        if alpha:
            tensors[alpha.format(name)] = torch.tensor(ALPHA)
    save_file(tensors, path, metadata)


FORMATS = [peft, diffusers, lightx2v, kohya, diffsynth, ai_toolkit, lycoris]
UNKNOWN_TO_DIFFUSERS = (diffsynth, lycoris)  # their prefixes, to diffusers 0.42
Writer = Callable[[Factors, Path], float]


def opened(checkpoint: Checkpoint, path: Path) -> LoRA:
    return open_lora(path, adaptable_layers(checkpoint))


@torch.inference_mode()
def predicted(transformer: Transformer, *adapters: Adapter) -> torch.Tensor:
    """In the transformer's own arithmetic."""
    model, loaded = transformer.model, Adapters(adapters, CPU)
    tokens = inputs(GRID, text_width=model.config.text_width)
    image, text = (tensor.to(transformer.replica.spec.math) for tensor in tokens)
    modulation = transformer.modulation.of(TIMESTEP, loaded).at(0)
    rotary = rotary_embedding(model.config, GRID, text.shape[1], CPU)
    targets = GRID[0][0] * GRID[0][1]
    with loaded.attached(model):
        return model(image, text, modulation, rotary, targets).float()


def fused_by_diffusers(checkpoint: Checkpoint, path: Path, strength: float) -> torch.Tensor:
    """The prediction of diffusers' own class, the LoRA loaded by its own converters and fused."""
    original = QwenImageTransformer2DModel.from_pretrained(checkpoint.folder / "transformer").float().eval()
    state, metadata = QwenImageEditPlusPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    original.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    original.fuse_lora(lora_scale=strength)
    original.unload_lora()
    return by_diffusers(original, GRID, TIMESTEP, None)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_equals_its_product(
    checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path, write: Writer
) -> None:
    """Against weights that hold strength * scale * up @ down, summed here."""
    found, path = factors(checkpoint), tmp_path / "style.safetensors"
    scale = write(found, path)
    original = QwenImageTransformer2DModel.from_pretrained(checkpoint.folder / "transformer").float().eval()
    with torch.no_grad():
        for name, (down, up) in found.items():
            original.get_submodule(name).weight += 0.7 * scale * (up @ down)
    expected = by_diffusers(original, GRID, TIMESTEP, None)
    lora = opened(checkpoint, path)
    ours = predicted(transformer, Adapter(lora, 0.7))
    assert len(lora.layers) == len(found) and not lora.left_out
    assert relative_error(ours, expected) < TOLERANCE
    assert relative_error(predicted(transformer), expected) > 0.01
    assert not any(module._forward_hooks for module in transformer.model.modules())


@pytest.mark.parametrize("write", [write for write in FORMATS if write not in UNKNOWN_TO_DIFFUSERS])
def test_what_diffusers_reads_is_what_diffusers_computes(
    checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path, write: Writer
) -> None:
    path = tmp_path / "style.safetensors"
    write(factors(checkpoint), path)
    expected = fused_by_diffusers(checkpoint, path, 0.7)
    ours = predicted(transformer, Adapter(opened(checkpoint, path), 0.7))
    assert relative_error(ours, expected) < TOLERANCE


def test_several_loras_add_up(checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path) -> None:
    """As one LoRA of both; of other ranks, dtypes and strengths."""
    first, second = factors(checkpoint, seed=1), factors(checkpoint, seed=2, rank=7)
    lightx2v(first, tmp_path / "first.safetensors")
    halved = {name: (down, up.to(torch.bfloat16).float()) for name, (down, up) in second.items()}
    _save(
        {name: (down, up.to(torch.bfloat16)) for name, (down, up) in halved.items()},
        tmp_path / "second.safetensors", "{}.lora_A.weight", "{}.lora_B.weight",
    )  # fmt: skip
    joined = {
        name: (
            torch.cat([first[name][0] * 0.5 * ALPHA / RANK, halved[name][0] * -0.3]),
            torch.cat([first[name][1], halved[name][1]], dim=1),
        )
        for name in first
    }
    _save(joined, tmp_path / "joined.safetensors", "{}.lora_A.weight", "{}.lora_B.weight")
    one, other, both = (
        opened(checkpoint, tmp_path / f"{n}.safetensors") for n in ("first", "second", "joined")
    )
    ours = predicted(transformer, Adapter(one, 0.5), Adapter(other, -0.3))
    assert relative_error(ours, predicted(transformer, Adapter(both, 1.0))) < TOLERANCE


def test_layers_of_one_input_may_differ(
    checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path
) -> None:
    """In rank, in dtype, and in whether they have a LoRA at all."""
    ranks = {"to_q": 3, "to_k": 5, "add_k_proj": 2, "add_v_proj": 6}
    every = {rank: factors(checkpoint, rank, rank) for rank in ranks.values()}
    found = {
        name: every[ranks[layer]][name]
        for name in factors(checkpoint)
        if (layer := name.rpartition(".")[2]) in ranks and name.startswith("transformer_blocks.1.")
    }
    rounded = {
        name: (down.bfloat16() if name.endswith("to_k") else down, up) for name, (down, up) in found.items()
    }
    path = tmp_path / "style.safetensors"
    lightx2v(rounded, path)
    original = QwenImageTransformer2DModel.from_pretrained(checkpoint.folder / "transformer").float().eval()
    with torch.no_grad():
        for name, (down, up) in rounded.items():
            original.get_submodule(name).weight += 0.7 * ALPHA / len(down) * (up @ down.float())
    lora = opened(checkpoint, path)
    ours = predicted(transformer, Adapter(lora, 0.7))
    assert len(lora.layers) == len(ranks)
    assert relative_error(ours, by_diffusers(original, GRID, TIMESTEP, None)) < TOLERANCE


@torch.inference_mode()
def test_layers_of_one_input_may_get_others(
    checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path
) -> None:
    """Each product is that of the layer's own input, in several threads too, and no input is kept."""
    found = factors(checkpoint)
    lightx2v(found, tmp_path / "style.safetensors")
    adapters = Adapters([Adapter(opened(checkpoint, tmp_path / "style.safetensors"), 1.0)], CPU)
    attention = "transformer_blocks.0.attn"
    layers = {
        name: transformer.model.get_submodule(f"{attention}.{name}") for name in ("to_q", "to_k", "to_v")
    }

    def largest_error(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            same, other = (torch.randn(1, 9, 64, generator=generator) for _ in range(2))
            error = 0.0
            for _ in range(20):
                for name, x in (("to_q", same), ("to_k", other), ("to_v", same), ("to_k", same)):
                    layer, (down, up) = layers[name], found[f"{attention}.{name}"]
                    expected = F.linear(x, layer.weight + ALPHA / RANK * (up @ down), layer.bias)
                    error = max(error, relative_error(layer(x), expected))
        return error

    with adapters.attached(transformer.model), ThreadPoolExecutor(4) as threads:
        assert max(threads.map(largest_error, range(8))) < TOLERANCE
    assert not any(shared._inner for shared in adapters.shared)


def test_strength_zero_is_without(checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path) -> None:
    lightx2v(factors(checkpoint), tmp_path / "style.safetensors")
    adapter = Adapter(opened(checkpoint, tmp_path / "style.safetensors"), 0.0)
    assert torch.equal(predicted(transformer, adapter), predicted(transformer))


@pytest.mark.parametrize("precision", ["int8", "int8-fast", "bf16", "nf4", "int8-bnb"])
def test_a_lora_on_quantised_weights_is_not_quantised(
    checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path, precision: str
) -> None:
    """Its effect on the prediction is the one that it has on whole weights, within the precision's error."""
    lightx2v(factors(checkpoint), tmp_path / "style.safetensors")
    adapter = Adapter(opened(checkpoint, tmp_path / "style.safetensors"), 0.5)
    low = loading.load(replica_for(checkpoint, "transformer", precision))
    with_lora, without = predicted(transformer, adapter), predicted(transformer)
    error = relative_error(predicted(low, adapter), with_lora)
    assert error < 0.15 and error < 0.5 * relative_error(without, with_lora)


def test_nothing_of_the_weights_is_read_for_a_modulation_that_is_folded_already(
    checkpoint: Checkpoint, transformer: Transformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lightx2v(factors(checkpoint), tmp_path / "style.safetensors")
    predicted(transformer)
    caplog.clear()
    with caplog.at_level("INFO"):
        predicted(transformer, Adapter(opened(checkpoint, tmp_path / "style.safetensors"), 1.0))
    assert not [record for record in caplog.records if "computing modulation" in record.message]


# What cannot be applied


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "style.safetensors"


def test_what_a_file_holds_beside_a_lora_is_counted(checkpoint: Checkpoint, path: Path) -> None:
    lightx2v(factors(checkpoint), path)
    others = {
        "transformer_blocks.0.attn.norm_q.diff": torch.ones(2),
        "lora_te1_text_model.lora_down.weight": torch.ones(2, 2),
        "time_text_embed.timestep_embedder.linear_1.lora_down.weight": torch.ones(2, 2),
        "something.else": torch.ones(2),
    }
    save_file(load_file(path) | others, path)
    assert set(opened(checkpoint, path).left_out.split(", ")) == {
        "1 of a full difference",
        "1 of the text encoder",
        "1 of the timestep embedding",
        "1 unknown (something.else)",
    }


def _flux() -> dict[str, torch.Tensor]:
    return {
        "double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 64),
        "double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(64, 4),
    }


NAME = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (_flux(), InputError, "is no LoRA for this transformer: none of its 2 tensors .* double_blocks.0"),
        ({}, InputError, "style.safetensors holds no factors of a LoRA"),
        ({f"{NAME}.lokr_w1": torch.ones(2, 2)}, InputError, "It holds LoKr, which these nodes do not apply"),
        ({f"{NAME}.hada_w1_a": torch.ones(2, 2)}, InputError, "It holds LoHa"),
        ({f"{NAME}.diff": torch.ones(2, 2)}, InputError, "It holds a full difference"),
        (
            {f"{NAME}.lora_A.weight": torch.ones(2, 64), f"{NAME}.lora_B.weight": torch.ones(64, 2),
             f"{NAME}.dora_scale": torch.ones(64)},
            InputError, "is a DoRA",
        ),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 64)}, CheckpointError, "but not its other half"),
        ({f"{NAME}.alpha": torch.tensor(1.0)}, InputError, "holds no factors of a LoRA"),
        (
            {f"{NAME}.lora_A.weight": torch.ones(2, 64, 1, 1),
             f"{NAME}.lora_B.weight": torch.ones(64, 2, 1, 1)},
            InputError, "was made for convolutions",
        ),
        (
            {f"{NAME}.lora_A.weight": torch.ones(2, 64), f"{NAME}.lora_B.weight": torch.ones(64, 3)},
            CheckpointError, "share no rank",
        ),
        (
            {f"{NAME}.lora_A.weight": torch.ones(0, 64), f"{NAME}.lora_B.weight": torch.ones(64, 0)},
            CheckpointError, "share no rank",
        ),
        (
            {f"{NAME}.lora_A.weight": torch.ones(2, 100), f"{NAME}.lora_B.weight": torch.ones(64, 2)},
            InputError, "was made for another model: its transformer_blocks.0.attn.to_q has 100 inputs",
        ),
        (
            {f"{NAME}.lora_A.weight": torch.ones(2, 64), f"{NAME}.lora_B.weight": torch.ones(64, 2),
             f"{NAME}.alpha": torch.tensor(math.nan)},
            CheckpointError, "the alpha of transformer_blocks.0.attn.to_q is nan",
        ),
    ],
    ids=["flux", "empty", "lokr", "loha", "diff", "dora", "half", "alpha alone", "convolution", "two ranks",
         "rank 0", "shape", "alpha"],
)  # fmt: skip
def test_a_file_that_cannot_be_applied_says_why(
    tiny: Checkpoint, path: Path, tensors: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    save_file(tensors, path)
    with pytest.raises(error, match=message):
        opened(tiny, path)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": ["odd"]}, 2.0),
    ],
)
def test_pefts_configuration_sets_the_scale(
    tiny: Checkpoint, path: Path, config: dict[str, object], scale: float
) -> None:
    tensors = {f"{NAME}.lora_A.weight": torch.ones(4, 64), f"{NAME}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    assert opened(tiny, path).layers[NAME].scale == scale


def test_pefts_configuration_beside_a_file_is_part_of_it(tiny: Checkpoint, tmp_path: Path) -> None:
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    lightx2v({NAME: (torch.ones(4, 64), torch.ones(64, 4))}, path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("alpha")}
    save_file(tensors, path)
    config.write_text(json.dumps({"lora_alpha": 8}))
    lora = opened(tiny, path)
    assert lora.layers[NAME].scale == 2.0
    config.write_text(json.dumps({"lora_alpha": 2}))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        lora.require_unchanged()
    assert opened(tiny, path).identity != lora.identity


def test_a_suffix_in_capitals_is_one(tiny: Checkpoint, tmp_path: Path) -> None:
    lightx2v(factors(tiny), tmp_path / "STYLE.SAFETENSORS")
    assert opened(tiny, tmp_path / "STYLE.SAFETENSORS").layers


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        (json.dumps({"use_dora": True}), InputError),
        (json.dumps({"alpha_pattern": {"(": 1}}), CheckpointError),
        (json.dumps({"lora_alpha": "eight"}), CheckpointError),
        ("[1", CheckpointError),
        ("[1]", CheckpointError),
    ],
)
def test_a_configuration_that_cannot_be_obeyed_says_so(
    tiny: Checkpoint, path: Path, metadata: str, error: type[Exception]
) -> None:
    tensors = {f"{NAME}.lora_A.weight": torch.ones(4, 64), f"{NAME}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, path, {"lora_adapter_metadata": metadata})
    with pytest.raises(error, match=r"style\.safetensors"):
        opened(tiny, path)


def test_a_factor_that_is_not_finite_is_named(tiny: Checkpoint, path: Path) -> None:
    """torch's attention on a CPU turns NaN queries into 0: the picture would be wrong without an error."""
    lightx2v(factors(tiny), path)
    tensors = load_file(path)
    tensors[f"{NAME}.lora_down.weight"][0, 0] = math.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"to_q\.lora_down\.weight holds NaN or infinity"):
        Adapters([Adapter(opened(tiny, path), 1.0)], CPU)


def test_two_loras_for_a_layer_in_one_file_are_refused(tiny: Checkpoint, path: Path) -> None:
    down, up = torch.ones(2, 64), torch.ones(64, 2)
    halves = {f"{NAME}.lora_A.{name}.weight": down.clone() for name in ("default", "second")}
    save_file(halves | {f"{NAME}.lora_B.default.weight": up}, path)
    with pytest.raises(InputError, match="has two LoRAs for transformer_blocks"):
        opened(tiny, path)


def test_factors_of_whole_numbers_are_refused(tiny: Checkpoint, path: Path) -> None:
    ones = torch.ones(2, 64, dtype=torch.int8)
    save_file({f"{NAME}.lora_A.weight": ones, f"{NAME}.lora_B.weight": ones.T.contiguous()}, path)
    with pytest.raises(CheckpointError, match="is stored as I8"):
        opened(tiny, path)


def test_a_pickle_is_refused_unread(tiny: Checkpoint, tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "style.pt")
    with pytest.raises(InputError, match=r"is no \.safetensors file\. Other formats can run programs"):
        opened(tiny, tmp_path / "style.pt")


@pytest.mark.parametrize("content", [b"", b"\x10", b"not a file of tensors at all"])
def test_a_damaged_file_is_named(tiny: Checkpoint, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"style\.safetensors is not a safetensors file"):
        opened(tiny, path)


def test_a_truncated_file_is_named(tiny: Checkpoint, path: Path) -> None:
    lightx2v(factors(tiny), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        opened(tiny, path)


def test_a_file_replaced_while_in_use_is_noticed(tiny: Checkpoint, path: Path) -> None:
    lightx2v(factors(tiny), path)
    adapter = Adapter(opened(tiny, path), 1.0)
    lightx2v(factors(tiny, seed=3), path)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        Adapters([adapter], CPU)
