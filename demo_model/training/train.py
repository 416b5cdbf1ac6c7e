"""Train the built-in demo model: its VAE, its text encoder, its transformer. One command, one GPU.

    python demo_model/training/train.py

Takes about 13 minutes on an H100. It can be cut at any time, or told to stop after some minutes: the same
command goes on from what --work holds. The checkpoint folder is complete after each save, and better later.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
PACK = HERE.parent.parent  # its engine and tests know the checkpoint's format
sys.path[:0] = [str(HERE), str(PACK / "nodes"), str(PACK / "tests")]

import autoencoder  # noqa: E402
import text_encoder  # noqa: E402
import transformer  # noqa: E402
from autoencoder import Autoencoder, Progress  # noqa: E402
from edits import EditMaker  # noqa: E402
from instructions import training_instructions  # noqa: E402
from photos import PhotoBank  # noqa: E402
from tiny_checkpoint import model_index  # noqa: E402

VAE_SECONDS, TEXT_SECONDS, TRANSFORMER_SECONDS = 190, 20, 465


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    deadline = started + 60 * arguments.minutes if arguments.minutes else float("inf")
    device = torch.device(arguments.device)
    torch.manual_seed(int(time.time()) if arguments.work.exists() else 0)  # a run that goes on sees new pairs
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run = Run(arguments, EditMaker(PhotoBank(device, torch.float32)), deadline, started)
    if run.train_autoencoder():
        run.train_text_encoder()
        run.train_transformer()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=HERE.parent / "FireRed-Demo", help="what is written"
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="what a run that goes on needs")
    parser.add_argument("--minutes", type=float, help="stop after so many; run again to go on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    parser.add_argument("--layers", type=int, default=transformer.LAYERS)
    parser.add_argument("--vae-seconds", type=float, default=VAE_SECONDS)
    parser.add_argument("--text-seconds", type=float, default=TEXT_SECONDS)
    parser.add_argument("--transformer-seconds", type=float, default=TRANSFORMER_SECONDS)
    return parser.parse_args()


class Run:
    """One training: its stages in turn, each going on from what was saved of it."""

    def __init__(self, arguments: argparse.Namespace, maker: EditMaker, deadline: float, started: float):
        self.arguments, self.maker, self.deadline, self.started = arguments, maker, deadline, started
        self.work, self.checkpoint = arguments.work, arguments.checkpoint
        self.work.mkdir(parents=True, exist_ok=True)
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        self.autoencoder = Autoencoder().to(maker.device)

    def report(self, line: str) -> None:
        said = f"{time.monotonic() - self.started:6.0f} s  {line}"
        print(said, flush=True)
        with (self.work / "log.txt").open("a") as log:
            log.write(said + "\n")

    def train_autoencoder(self) -> bool:
        """Whether it is done."""
        progress, weights = self._saved("vae")
        if weights:
            self.autoencoder.load_state_dict(weights)

        def save() -> None:
            self._save("vae", progress, self.autoencoder.state_dict())

        torch.backends.cudnn.benchmark = True  # one size all the time; the transformer's stage has many
        done = progress.seconds >= self.arguments.vae_seconds or autoencoder.train(
            self.autoencoder,
            self.maker,
            progress,
            self.arguments.vae_seconds,
            self.deadline,
            save,
            self.report,
        )
        torch.backends.cudnn.benchmark = False
        self.autoencoder.eval().requires_grad_(False)
        if done:
            self.autoencoder.write(self.checkpoint)
            with torch.no_grad():
                pixels = autoencoder.any_views(self.maker, 8, (256, 256))
                quality = autoencoder.psnr(self.autoencoder.decode(self.autoencoder.encode(pixels)), pixels)
            self.report(f"vae done: {progress.step} steps, psnr {quality:.2f} dB")
        return done

    def train_text_encoder(self) -> None:
        if (self.checkpoint / "text_encoder" / "config.json").exists():
            return
        text_encoder.write_processor(self.checkpoint)
        text_encoder.train(self.checkpoint, self.maker.device, self.arguments.text_seconds, self.report)

    def train_transformer(self) -> None:
        device, layers = self.maker.device, self.arguments.layers
        progress, weights = self._saved("transformer")
        torch.manual_seed(progress.step)
        model = transformer.build(layers).to(device)
        names = [name for name, _ in model.named_parameters()]
        average = [parameter.detach().clone() for parameter in model.parameters()]
        if weights:
            model.load_state_dict({name: weights[name].float() for name in names})
            average = [weights[f"average.{name}"].to(device, torch.float32) for name in names]
        encoder = text_encoder.Encoder.load(self.checkpoint, device)
        instructions = training_instructions(text_encoder.INSTRUCTIONS_SEED)
        prompts = transformer.PromptBank.build(encoder, self.maker, instructions)
        self.report(f"{len(instructions)} prompts embedded")

        def save() -> None:
            averages = {f"average.{name}": value for name, value in zip(names, average, strict=True)}
            stored = model.state_dict() | averages
            self._save("transformer", progress, {name: value.bfloat16() for name, value in stored.items()})
            transformer.write(average, layers, self.checkpoint)
            index = json.dumps(model_index(), indent=2)
            (self.checkpoint / "model_index.json").write_text(index, encoding="utf-8")

        trainer = transformer.Trainer(
            model, average, self.autoencoder, self.maker, prompts, not self.arguments.eager
        )
        done = trainer.train(progress, self.arguments.transformer_seconds, self.deadline, save, self.report)
        self.report(f"transformer {'done' if done else 'goes on in the next run'}: {progress.step} steps")

    def _saved(self, stage: str) -> tuple[Progress, dict[str, torch.Tensor]]:
        file = self.work / f"{stage}.json"
        if not file.exists():
            return Progress(), {}
        return Progress(**json.loads(file.read_text())), load_file(self.work / f"{stage}.safetensors")

    def _save(self, stage: str, progress: Progress, weights: dict[str, torch.Tensor]) -> None:
        tensors = {name: value.contiguous().cpu() for name, value in weights.items()}
        partial = self.work / f"{stage}.partial"
        save_file(tensors, partial)
        partial.replace(self.work / f"{stage}.safetensors")
        (self.work / f"{stage}.json").write_text(json.dumps(asdict(progress)))


if __name__ == "__main__":
    main()
