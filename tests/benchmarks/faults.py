"""Kill and cancel one long edit at random steps, and count what is lost and what is done twice.

Usage: python faults.py [FAULTS [STEPS]]    (the tiny checkpoint, in a server of its own)
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import tiny_checkpoint
import torch
from conftest import PROBE_NODES
from prompts import SAMPLE, changed, edit_prompt, keep_tensor, kept_tensor, succeed

from launcher.client import ServerError
from launcher.folders import add_pack
from launcher.server import Server

SIZE = 384  # large enough for steps that the websocket keeps up with
FLAGS = ("--disable-api-nodes", "--database-url", "sqlite:///:memory:")


class Fault:
    """Kills the server, or cancels the prompt, when the sampler has reached the step `at`."""

    def __init__(self, server: Server, kind: str, steps: int, at: int):
        self._server, self._kind, self._steps, self._at = server, kind, steps, at
        self.first = self.last = 0  # steps reported

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        if name != "progress" or data["node"] != SAMPLE or data["max"] != self._steps:
            return
        self.first, self.last = self.first or data["value"], data["value"]
        if self.last >= self._at:
            self._at = self._steps + 1
            if self._kind == "kill -9":
                self._server.process.kill()
            else:
                self._server.client.post("/interrupt")


def main(faults: int, steps: int) -> int:
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "models/diffusers").mkdir(parents=True)
        tiny_checkpoint.build(work / "models/diffusers/tiny")
        add_pack(work, PROBE_NODES)
        prompt = keep_tensor(
            changed(edit_prompt(), SAMPLE, steps=steps, seed=1, width=SIZE, height=SIZE),
            [SAMPLE, 0],
            "latent",
        )
        met: Counter[str] = Counter()
        reached = repeated = 0
        while sum(met.values()) < faults:
            with Server(work, FLAGS) as server:
                kind = chance.choice(("kill -9", "cancel"))
                at = reached + chance.randint(1, max((steps - reached) // faults, 2))
                fault = Fault(server, kind, steps, at)
                try:
                    server.client.run(prompt, fault)
                except (ServerError, OSError) as error:
                    assert kind == "kill -9", error
                met[kind] += 1
                repeated += max(reached - fault.first + 1, 0)
                print(f"{kind} after step {fault.last}: had started at step {fault.first}", flush=True)
                reached = fault.last
        with Server(work, FLAGS) as server:
            succeed(server.client, prompt)
            resumed = kept_tensor(work, "latent")["samples"]
            succeed(server.client, changed(prompt, SAMPLE, resume="off"))
            same = torch.equal(resumed, kept_tensor(work, "latent")["samples"])
        left = len(list((work / "models/firered_cache/runs").iterdir()))
    print(
        f"{dict(met)} over {steps} steps: {repeated} steps done twice, {left} files left, same bits: {same}"
    )
    return 0 if same and not left else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) if len(sys.argv) == 3 else main(10, 200))
