"""FireRed-Image-Edit for ComfyUI, on the hardware people own."""

from .nodes import FireRedExtension

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint() -> FireRedExtension:
    return FireRedExtension()
