"""Bad input over the API: the node is named, the value is shown, and the message says what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import other_versions
import pytest
from other_versions import rename_dtype
from prompts import (
    DECODE,
    ENCODE,
    SAMPLE,
    changed,
    edit_prompt,
    fail,
    keep_tensor,
    kept_tensor,
    succeed,
    with_node,
)
from safetensors.torch import load_file, save_file
from warm_server import Server

from launcher.client import Client, PromptRejected

ODD = "20"


def rejection(client: Client, prompt: dict[str, Any], node: str) -> str:
    """Why the server refuses to queue the prompt, in its details about that node."""
    with pytest.raises(PromptRejected) as caught:
        client.run(prompt)
    errors = caught.value.answer["node_errors"][node]["errors"]
    return " ".join(f"{error['message']}: {error['details']}" for error in errors)


def with_picture(shape: str, fill: str = "0.5") -> dict[str, Any]:
    prompt = with_node(edit_prompt(), ODD, "ProbeImage", shape=shape, fill=fill)
    return changed(prompt, ENCODE, **{"images.image0": [ODD, 0]})


def with_latent(node: str, shape: str, fill: str = "0.1") -> dict[str, Any]:
    return changed(
        with_node(edit_prompt(), ODD, "ProbeLatent", shape=shape, fill=fill), node, latent=[ODD, 0]
    )


def with_conditioning(shape: str, fill: str = "0.1", entries: int = 1, reference: str = "") -> dict[str, Any]:
    inputs = dict(shape=shape, fill=fill, entries=entries, reference=reference)
    return changed(with_node(edit_prompt(), ODD, "ProbeConditioning", **inputs), SAMPLE, positive=[ODD, 0])


@pytest.mark.parametrize("node", ["1", "2", "3"])
def test_a_checkpoint_that_is_not_there(client: Client, node: str) -> None:
    details = rejection(client, changed(edit_prompt(), node, checkpoint="absent"), node)
    (choices,) = re.findall(
        r"There is no checkpoint 'absent'\. Choose one of (.+)\. The template firered_demo runs without a",
        details,
    )
    assert {"tiny", "wide", "zero_cond_t"} <= set(choices.split(", "))  # other tests add theirs


def test_a_folder_of_another_pipeline(client: Client, work: Path) -> None:
    folder = work / "models" / "diffusers" / "flux"
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    details = rejection(client, changed(edit_prompt(), "1", checkpoint="flux"), "1")
    assert "holds a FluxPipeline, not a QwenImageEditPlusPipeline. Get FireRed with: hf download" in details


def test_a_path_out_of_the_models_folder(client: Client) -> None:
    assert "There is no checkpoint" in rejection(
        client, changed(edit_prompt(), "1", checkpoint="../../input"), "1"
    )


def test_a_device_that_is_no_device(client: Client) -> None:
    details = rejection(client, changed(edit_prompt(), "2", device="cuda:0"), "2")
    assert "device: 'cuda:0' not in ['auto', 'cpu'" in details


def test_a_missing_checkpoint_is_reported_once(client: Client) -> None:
    prompt = changed(edit_prompt(), "1", checkpoint="absent", device="auto", precision="auto")
    assert rejection(client, prompt, "1").count("There is no checkpoint 'absent'") == 1


@pytest.mark.parametrize("name", [5, [], {"a": 1}, "a\0b", "x" * 5000, "", "/etc", "\ud800", "..", True])
def test_a_checkpoint_that_is_no_name(client: Client, name: Any) -> None:
    plan = keep_tensor(with_node({}, "1", "FireRedHardwarePlan"), ["1", 1], "text")
    for prompt in (edit_prompt(), plan):
        details = rejection(client, changed(prompt, "1", checkpoint=name), "1")
        assert "here is no checkpoint" in details or "cannot be a path here" in details
        assert len(details) < 700


@pytest.mark.parametrize(
    ("input_name", "value"),
    [("device", 0), ("device", ["a"]), ("precision", 5), ("math", 0), ("checkpoint", ["a", "b"])],
)
def test_a_choice_of_another_type_is_named(client: Client, input_name: str, value: Any) -> None:
    """As a plain value over the API, and as a list in the form that ComfyUI needs for lists."""
    given = {"__value__": value} if isinstance(value, list) else value
    assert input_name in rejection(client, changed(edit_prompt(), "1", **{input_name: given}), "1")


@pytest.mark.parametrize("input_name", ["checkpoint", "device", "precision", "math"])
@pytest.mark.parametrize("value", [None, 0, [], "gpu:x"])
def test_a_linked_choice_that_is_none_is_named(client: Client, input_name: str, value: Any) -> None:
    prompt = with_node(edit_prompt(), ODD, "ProbeValue", json=json.dumps(value))
    error = fail(client, changed(prompt, "1", **{input_name: [ODD, 0]}))
    assert error["node_type"] == "FireRedLoadTransformer"
    wanted = f"There is no checkpoint {value!r}"
    if input_name != "checkpoint":
        wanted = f"{input_name} is {value!r}; choose auto"
    assert wanted in error["exception_message"]


@pytest.mark.parametrize(("node", "precision"), [("1", "nf4"), ("1", "int8-bnb"), ("2", "nf4")])
def test_a_precision_this_machine_cannot_run(client: Client, node: str, precision: str) -> None:
    message = fail(client, changed(edit_prompt(), node, precision=precision))["exception_message"]
    assert f"{precision} needs a GPU that bitsandbytes supports, and this is cpu" in message
    assert "choose int8, int8-fast or fp32" in message


def test_a_precision_that_is_none(client: Client) -> None:
    assert "'fp8' not in" in rejection(client, changed(edit_prompt(), "1", precision="fp8"), "1")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"steps": 0}, "Value 0 smaller than min of 1: steps"),
        ({"width": 100_000}, "Value 100000 bigger than max of 4096: width"),
        ({"height": -64}, "Value -64 smaller than min of 0: height"),
        ({"cfg": "much"}, "could not convert string to float"),
        ({"seed": -1}, "Value -1 smaller than min of 0: seed"),
    ],
)
def test_numbers_out_of_range(client: Client, inputs: dict[str, Any], expected: str) -> None:
    assert expected in rejection(client, changed(edit_prompt(), SAMPLE, **inputs), SAMPLE)


def test_no_picture(client: Client) -> None:
    details = rejection(client, changed(edit_prompt(), ENCODE, **{"images.image0": None}), ENCODE)
    assert "Required input is missing: image0" in details


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(client: Client, prompt: str) -> None:
    error = fail(client, changed(edit_prompt(), ENCODE, prompt=prompt))
    assert error["node_type"] == "FireRedEncodePrompt"
    assert "The prompt is empty. Write what to change" in error["exception_message"]


def test_a_prompt_too_long_for_the_model(client: Client) -> None:
    error = fail(client, changed(edit_prompt(), ENCODE, prompt="hat " * 2000))
    assert "tokens, the model takes 1024. Shorten it." in error["exception_message"]


@pytest.mark.parametrize("shape", ["1,8,8,1", "1,8,8,4", "1,1,1,3", "1,8000,1000,3", "8,8,3"])
def test_odd_pictures_work(client: Client, shape: str) -> None:
    succeed(client, with_picture(shape))


@pytest.mark.parametrize(
    ("shape", "fill", "message"),
    [
        ("1,8,8,3", "nan", "Picture 1 holds NaN or infinite values. Check the node that made it."),
        ("1,8000,8,3", "0.5", "Picture 1 is 8x8000: more than 16 times as long as wide. Crop it first."),
        ("1,8,8,2", "0.5", "Picture 1 has shape (8, 8, 2)"),
        ("0,8,8,3", "0.5", "There is no picture to edit. Connect at least one image."),
    ],
)
def test_unusable_pictures(client: Client, shape: str, fill: str, message: str) -> None:
    error = fail(client, with_picture(shape, fill))
    assert error["node_type"] == "FireRedEncodePrompt" and message in error["exception_message"]


@pytest.mark.parametrize("node", [SAMPLE, DECODE])
@pytest.mark.parametrize("shape", ["1,4,8,8", "1,16,3,8,8", "16,8,8"])
def test_latents_of_the_wrong_shape(client: Client, node: str, shape: str) -> None:
    error = fail(client, with_latent(node, shape))
    assert error["node_type"] == {SAMPLE: "FireRedSampler", DECODE: "FireRedDecode"}[node]
    assert "this model takes (batch, 16, 1, height/8, width/8)" in error["exception_message"]


@pytest.mark.parametrize("shape", ["1,16,1,2,800", "1,16,1,2,2"])
def test_latents_of_absurd_sizes(client: Client, shape: str) -> None:
    assert "each side must be 32 to 4096" in fail(client, with_latent(SAMPLE, shape))["exception_message"]


def test_a_nan_latent_is_not_decoded(client: Client) -> None:
    message = fail(client, with_latent(DECODE, "1,16,1,4,4", "nan"))["exception_message"]
    assert "The latent to decode holds 256 NaN" in message and "check the node that made it" in message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            dict(shape="1,3,64"),
            "is 64 wide, this transformer takes 128. Use the text encoder of the same checkpoint.",
        ),
        (dict(shape="3,128"), "has shape (3, 128); expected (1, tokens, 128)"),
        (dict(shape="1,3,128", entries=2), "has 2 entries; this sampler takes exactly one"),
        (
            dict(shape="1,3,128", reference="1,4,8,8"),
            "Reference latent 1 of the positive conditioning has shape",
        ),
        (dict(shape="1,3,128", fill="inf"), "The positive conditioning holds 0 NaN and 384 infinite values"),
    ],
)
def test_conditioning_that_does_not_fit(client: Client, inputs: dict[str, Any], message: str) -> None:
    error = fail(client, with_conditioning(**inputs))
    assert error["node_type"] == "FireRedSampler" and message in error["exception_message"]


def test_a_text_encoder_of_another_width(client: Client) -> None:
    """In `wide`, the transformer takes embeddings of width 3584, but the text encoder makes 128."""
    message = fail(client, edit_prompt("wide"))["exception_message"]
    assert "The positive conditioning is 128 wide, this transformer takes 3584" in message


@pytest.fixture
def damaged(work: Path, tiny_folder: Path) -> Iterator[Path]:
    """A checkpoint named `damaged`. It is deleted after the test."""
    folder = work / "models" / "diffusers" / "damaged"
    shutil.copytree(tiny_folder, folder)
    yield folder
    shutil.rmtree(folder)


def test_a_missing_weight_file(client: Client, damaged: Path) -> None:
    (damaged / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    error = fail(client, edit_prompt("damaged"))
    assert (
        error["node_type"] == "FireRedLoadVAE" and "No .safetensors weights in" in error["exception_message"]
    )


def test_a_truncated_weight_file(client: Client, damaged: Path) -> None:
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = fail(client, edit_prompt("damaged"))
    assert error["node_type"] == "FireRedLoadTransformer"
    assert (
        "is truncated" in error["exception_message"]
        and "Download this file again" in error["exception_message"]
    )


def test_a_missing_component(client: Client, damaged: Path) -> None:
    shutil.rmtree(damaged / "text_encoder")
    error = fail(client, edit_prompt("damaged"))
    assert (
        error["node_type"] == "FireRedLoadTextEncoder"
        and "has no text_encoder/ folder" in error["exception_message"]
    )


def test_a_stored_dtype_that_is_not_read_is_told_by_its_own_loader_alone(
    client: Client, damaged: Path
) -> None:
    rename_dtype(damaged / "transformer" / "diffusion_pytorch_model.safetensors", "img_in.weight", "U16")
    error = fail(client, edit_prompt("damaged"))
    assert error["node_type"] == "FireRedLoadTransformer"
    assert "img_in.weight is stored as U16, which these nodes do not read" in error["exception_message"]
    plan = with_node({}, "plan", "FireRedHardwarePlan", checkpoint="damaged")
    succeed(client, keep_tensor(keep_tensor(plan, ["plan", 1], "text"), ["plan", 2], "device"))


@pytest.mark.parametrize(
    ("file", "node_type"),
    [
        ("transformer/config.json", "FireRedLoadTransformer"),
        ("scheduler/scheduler_config.json", "FireRedLoadTransformer"),
        ("processor/tokenizer.json", "FireRedLoadTextEncoder"),
        ("vae/config.json", "FireRedLoadVAE"),
    ],
)
def test_a_missing_file_is_named_by_the_loader_that_needs_it_and_by_the_plan(
    client: Client, damaged: Path, work: Path, file: str, node_type: str
) -> None:
    other_versions.rewrite_as_transformers_5(damaged)  # there each file is needed
    (damaged / file).unlink()
    error = fail(client, edit_prompt("damaged"))
    assert error["node_type"] == node_type and Path(file).name in error["exception_message"]
    plan = with_node({}, "plan", "FireRedHardwarePlan", checkpoint="damaged")
    succeed(client, keep_tensor(plan, ["plan", 1], "text"))
    assert Path(file).name in kept_tensor(work, "text")


def test_weights_that_overflow_stop_at_the_step(client: Client, damaged: Path) -> None:
    """With these weights activations exceed FP16's range. In FP32 the same graph ends well."""
    file = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.1.img_mlp.net.2.weight"] *= 1e6
    save_file(tensors, file)
    error = fail(client, changed(edit_prompt("damaged"), "1", precision="fp16"))
    assert error["node_type"] == "FireRedSampler"
    message = error["exception_message"]
    assert "Step 1 of 2: the positive prediction holds" in message and "transformer fp16 on cpu" in message
    assert "Set its precision to fp32 or int8" in message
    succeed(client, changed(edit_prompt("damaged"), "1", precision="fp32"))


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with Server(tmp_path, ("--disable-api-nodes", "--database-url", "sqlite:///:memory:")) as empty:
        loader = empty.client.get("/object_info/FireRedLoadVAE")["FireRedLoadVAE"]
        assert loader["input"]["required"]["checkpoint"][1]["options"] == ["FireRed-Demo"]
        details = rejection(empty.client, edit_prompt("FireRed-Image-Edit-1.0"), "3")
        assert "The template firered_demo runs without a download. Get FireRed with: hf download" in details
        assert str(tmp_path / "models" / "diffusers") in details
