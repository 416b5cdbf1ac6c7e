"""FireRedHardwarePlan on a real server, without a GPU."""

from __future__ import annotations

from pathlib import Path

from engine.drawing import WIDTH
from prompts import LOADERS, changed, edit_prompt, keep_tensor, kept_tensor, succeed, with_node

from launcher.client import Client, Prompt


def plan_prompt(checkpoint: str = "tiny") -> Prompt:
    return with_node({}, "plan", "FireRedHardwarePlan", checkpoint=checkpoint, width=2048, references=2)


def test_the_plan_is_a_picture_a_text_and_three_devices(client: Client, work: Path) -> None:
    prompt = plan_prompt()
    for output in range(5):
        prompt = keep_tensor(prompt, ["plan", output], f"plan_{output}")
    succeed(client, prompt)
    image, text, *devices = (kept_tensor(work, f"plan_{output}") for output in range(5))
    assert image.shape[0] == 1 and image.shape[2:] == (WIDTH, 3) and 0 <= image.min() < image.max() <= 1
    assert devices == ["cpu", "cpu", "cpu"]
    assert "transformer fp32 on cpu: 0.0 GiB" in text and "measured speeds" in text


def test_a_planned_device_can_be_linked_to_a_loader(client: Client) -> None:
    prompt = edit_prompt() | plan_prompt()
    for output, loader in enumerate(LOADERS, start=2):
        prompt = changed(prompt, loader, device=["plan", output])
    succeed(client, prompt)
