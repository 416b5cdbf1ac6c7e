"""Nodes for tests on a real server. They make odd inputs, keep tensors and build small models of core's."""

import functools
import gc
import json
import sys
from dataclasses import replace
from json import loads
from pathlib import Path
from types import SimpleNamespace

import comfy.model_base
import comfy.model_management as mm
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.text_encoders.qwen_image as qwen_image
import comfy.text_encoders.qwen_vl as qwen_vl
import folder_paths
import psutil
import torch
from comfy_extras import nodes_differential_diffusion


def pack_host(part):
    """A module of the pack's nodes/host, as the server imported it."""
    name = f"firered-image-edit.nodes.host.{part}"
    (module,) = [module for path, module in sys.modules.items() if path.endswith(name)]
    return module


class Probe:
    CATEGORY = "probe"
    FUNCTION = "execute"


class ProbeImage(Probe):
    """An IMAGE of any shape. `fill` is a number and may be nan."""

    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"shape": ("STRING", {}), "fill": ("STRING", {"default": "0.5"})}}

    def execute(self, shape, fill):
        return (torch.full([int(size) for size in shape.split(",")], float(fill)),)


class ProbeLatent(ProbeImage):
    RETURN_TYPES = ("LATENT",)

    def execute(self, shape, fill):
        return ({"samples": super().execute(shape, fill)[0]},)


class ProbeConditioning(ProbeImage):
    """A CONDITIONING of `entries` entries, each with a reference latent if `reference` gives its shape."""

    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        inputs = super().INPUT_TYPES()
        inputs["required"] |= {"entries": ("INT", {"default": 1}), "reference": ("STRING", {"default": ""})}
        return inputs

    def execute(self, shape, fill, entries, reference):
        embeds = super().execute(shape, fill)[0]
        extras = {"reference_latents": [super().execute(reference, "0.1")[0]]} if reference else {}
        return ([[embeds, dict(extras)] for _ in range(entries)],)


class ProbeValue(Probe):
    """The value of `json`, which may be NaN or Infinity. It can be linked to any input."""

    RETURN_TYPES = ("*",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"json": ("STRING", {})}}

    def execute(self, json):
        return (loads(json),)


class ProbeKey(Probe):
    """A LATENT or a CONDITIONING with one more key, whose value is `json`."""

    RETURN_TYPES = ("*",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"given": ("*", {}), "key": ("STRING", {}), "json": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def execute(self, given, key, json):
        more = {key: loads(json)}
        return (given | more if isinstance(given, dict) else [[given[0][0], given[0][1] | more]],)


class ProbeNoise(Probe):
    """The noise that core's samplers start from for this LATENT and seed, written to output/NAME.pt."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT", {}), "seed": ("INT", {}), "name": ("STRING", {})}}

    def execute(self, latent, seed, name):
        noise = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
        torch.save(noise, Path(folder_paths.get_output_directory()) / f"{name}.pt")
        return {}


class ProbeKeep(Probe):
    """Writes its value to output/NAME.pt."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*", {}), "name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def execute(self, value, name):
        torch.save(value, Path(folder_paths.get_output_directory()) / f"{name}.pt")
        return {}


class ProbeResidents(Probe):
    """Writes what is in memory to output/NAME.json: [model, device, bytes], torch's bytes, the RSS."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, name):
        return float("nan")

    def execute(self, name):
        host = pack_host("memory")
        ours = {patcher: str(spec) for spec, patcher in host._patchers.items()}
        core = {model.model: type(model.model.model).__name__ for model in mm.current_loaded_models}
        models = [
            [name, str(patcher.load_device), patcher.loaded_size()] for patcher, name in (core | ours).items()
        ]
        cards = range(torch.cuda.device_count())
        allocated = {f"cuda:{card}": torch.cuda.memory_allocated(card) for card in cards}
        found = {"models": models, "allocated": allocated, "rss": psutil.Process().memory_info().rss}
        (Path(folder_paths.get_output_directory()) / f"{name}.json").write_text(json.dumps(found))
        return {}


class ProbeEviction(Probe):
    """Loads two components as if on a card, forgets them, and has ComfyUI evict everything.

    Writes how many bytes were loaded before and after to output/NAME.json.
    """

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"one": ("*", {}), "other": ("*", {}), "name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def execute(self, one, other, name):
        host = pack_host("memory")
        for handle in (one, other):
            card = replace(handle.replica.card, is_gpu=True, label="gpu:0")
            replica = replace(handle.replica, card=card)
            with host.borrow(host.Handle(replica, host._make_patcher(replica))):
                pass
        del handle
        gc.collect()
        forgotten = list(host._on_cards.values())
        before = sum(patcher.loaded_size() for patcher in forgotten)
        del forgotten
        mm.free_memory(1e30, torch.device("cpu"))
        after = sum(patcher.loaded_size() for patcher in host._on_cards.values())
        (Path(folder_paths.get_output_directory()) / f"{name}.json").write_text(json.dumps([before, after]))
        return {}


class ProbeBorrowed(Probe):
    """Has ComfyUI evict everything while a component is in use, and again afterwards.

    Writes to output/NAME.json the bytes that partially_unload freed, and those loaded during the use, after
    it, and after the second eviction.
    """

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"one": ("*", {}), "name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def execute(self, one, name):
        patcher, device = one.patcher, one.replica.device
        with pack_host("memory").borrow(one) as component:
            freed = patcher.partially_unload(device, 1e30)
            mm.free_memory(1, device)
            mm.free_memory(1e30, device)
            patcher.detach()
            during = patcher.loaded_size() if patcher.model.component is component else 0
        after = patcher.loaded_size()
        mm.free_memory(1e30, device)
        found = [freed, during, after, patcher.loaded_size()]
        (Path(folder_paths.get_output_directory()) / f"{name}.json").write_text(json.dumps(found))
        return {}


class ProbeCopies(Probe):
    """Finds which copies of a component a new one releases, and writes [old, new, kept] to output/NAME.json.

    It loads nothing, and the cards need not be there.
    """

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"one": ("*", {}), "name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def execute(self, one, name):
        host, found, same = pack_host("memory"), [], one.replica.spec
        places = {"cpu": "cpu", "gpu:0": "cuda:0", "gpu:1": "cuda:1"}
        for old, new, precision in (
            ("gpu:0", "gpu:1", same.precision.name),
            ("gpu:0", "gpu:0", "another"),
            ("gpu:0", "cpu", "another"),
            ("cpu", "gpu:0", same.precision.name),
        ):
            cards = [replace(one.replica.card, device=torch.device(places[label])) for label in (old, new)]
            there = replace(one.replica, spec=replace(same, identity="old"), card=cards[0])
            patcher = host._make_patcher(there)
            patcher.model.model_loaded_weight_memory = 1
            changed = replace(there.spec, precision=replace(same.precision, name=precision))
            host._release_replaced(replace(there, spec=changed, card=cards[1]))
            found.append([old, new, bool(patcher.loaded_size())])
            patcher.detach()
        (Path(folder_paths.get_output_directory()) / f"{name}.json").write_text(json.dumps(found))
        return {}


class ProbeBrokenCard(Probe):
    """Opens components on a machine whose gpu:0 is the CPU, and whose gpu:1 is a card that torch cannot use.

    Writes the devices that `auto` chooses, and the errors of choosing gpu:1 twice, to output/NAME.json.
    """

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"checkpoint": ("STRING", {}), "name": ("STRING", {})}}

    def execute(self, checkpoint, name):
        devices, components = pack_host("devices"), pack_host("components")
        real, errors = devices.accelerators, []
        devices.accelerators = lambda: [torch.device("cpu"), torch.device("cuda", 99)]
        try:
            chosen = [
                components.open_component(role, checkpoint, "auto", "auto").replica.card.label
                for role in ("transformer", "text_encoder", "vae")
            ]
            for _ in range(2):
                try:
                    components.open_component("vae", checkpoint, "auto", "gpu:1")
                except Exception as error:
                    errors.append([type(error).__name__, str(error)])
        finally:
            devices.accelerators = real
        found = {"chosen": chosen, "errors": errors}
        (Path(folder_paths.get_output_directory()) / f"{name}.json").write_text(json.dumps(found))
        return {}


class ProbeCards(Probe):
    """From now on this machine has so many cards, each of which is the CPU."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {})}}

    def execute(self, count):
        cards = [torch.device("cpu", number) for number in range(count)]
        devices = pack_host("devices")
        devices.accelerators, devices._copy_rate = lambda: cards, lambda gpus: 10.0
        preflight = devices.preflight
        devices.preflight = lambda device: preflight(torch.device("cpu"))  # measured once
        mm.get_all_torch_devices = lambda *_, **__: cards
        return {}


class ProbeCLIP(Probe):
    """Core's Qwen2.5-VL classes and tokenizer at their real width, with one layer and random weights."""

    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def execute(self):
        class Target:
            params = {}
            clip = qwen_image.QwenImageTEModel
            tokenizer = qwen_image.QwenImageTokenizer

        vision = qwen_vl.Qwen2VLVisionTransformer
        small = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 151936}
        options = {"model_name": "qwen25_7b", "qwen25_7b_model_config": small, "dtype": torch.bfloat16}
        qwen_vl.Qwen2VLVisionTransformer = functools.partial(vision, intermediate_size=64, num_layers=1)
        try:
            clip = comfy.sd.CLIP(Target, model_options=options)
        finally:
            qwen_vl.Qwen2VLVisionTransformer = vision
        noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
        for parameter in clip.cond_stage_model.parameters():  # half a billion numbers
            for part in parameter.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        return (clip,)


class ProbeKSampler(Probe):
    """What core's Euler sampler makes of a LATENT with a noise_mask, with a smooth field as the model.

    Writes the noise levels, the latents and the mask to output/NAME.pt. The latents count as normalised.
    differential below 0: without DifferentialDiffusion.
    """

    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        numbers = dict(steps="INT", seed="INT", denoise="FLOAT", differential="FLOAT")
        inputs = {"latent": ("LATENT", {}), "name": ("STRING", {})}
        return {"required": inputs | {name: (kind, {"min": -1}) for name, kind in numbers.items()}}

    def execute(self, latent, name, steps, seed, denoise, differential):
        class Levels(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
            pass

        levels = Levels()
        model = SimpleNamespace(model_sampling=levels, get_model_object=lambda _: levels, model_options={})
        model.scale_latent_inpaint = functools.partial(comfy.model_base.BaseModel.scale_latent_inpaint, model)

        class Field:
            inner_model, model_patcher, cfg = model, SimpleNamespace(model=model), 1.0

            def __call__(self, x, sigma, **_):
                return x - sigma.item() * (1 + 0.3 * torch.sin(x))

        sampler = comfy.samplers.KSampler(model, steps, "cpu", "euler", "simple", denoise)
        pictures, patched = latent["samples"], {}
        mask = comfy.sampler_helpers.prepare_mask(latent["noise_mask"], pictures.shape, "cpu")
        if differential >= 0:
            forward = nodes_differential_diffusion.DifferentialDiffusion.forward
            patched = {"denoise_mask_function": functools.partial(forward, strength=differential)}
        noise = comfy.sample.prepare_noise(pictures, seed)
        arguments = {"model_options": patched, "seed": seed}
        euler = comfy.samplers.sampler_object("euler")
        made = euler.sample(Field(), sampler.sigmas, arguments, None, noise, pictures, mask, True)
        found = {"sigmas": sampler.sigmas, "samples": made, "mask": mask, "noise": noise}
        torch.save(found, Path(folder_paths.get_output_directory()) / f"{name}.pt")
        return {}


PROBES = (
    ProbeImage,
    ProbeLatent,
    ProbeConditioning,
    ProbeValue,
    ProbeKey,
    ProbeNoise,
    ProbeKeep,
    ProbeResidents,
    ProbeEviction,
    ProbeBorrowed,
    ProbeCopies,
    ProbeBrokenCard,
    ProbeCards,
    ProbeCLIP,
    ProbeKSampler,
)
NODE_CLASS_MAPPINGS = {probe.__name__: probe for probe in PROBES}
