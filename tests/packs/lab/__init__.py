"""A pack as strangers write them, for the tests: V1 classes, nothing of ComfyUI. What it does it notes in a file."""

import os
import time

import torch

from .paper import note, times_noted


class Load:
    """In the place of a loader: slow things that several prompts share."""

    CATEGORY = "lab"
    RETURN_TYPES = ("LAB_MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"notes": ("STRING", {"default": ""})}}

    def load(self, notes):
        note(notes, f"load {os.getpid()}")
        return (torch.linspace(0, 1, 64),)


class Draw:
    """In the place of a sampler: numbers that follow from the seed."""

    CATEGORY = "lab"
    RETURN_TYPES = ("LAB_NUMBERS",)
    RETURN_NAMES = "numbers"  # a tuple is meant
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("LAB_MODEL",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "mood": (("good", "bad", "stubborn"), {"default": "good"}),  # a list is meant
            },
            "optional": {"notes": ("STRING", {"default": ""})},
        }

    def draw(self, model, seed, mood, notes=""):
        note(notes, f"draw {os.getpid()} {seed}")
        if mood == "stubborn" and times_noted(notes, f" {seed}") == 1:
            time.sleep(600)  # until somebody ends this process; the next one to try is lucky
        if mood == "bad":
            raise RuntimeError(f"seed {seed} is not in the mood")
        noise = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        return ((model * noise).cumsum(0),)


class Keep:
    """Writes the numbers where the host says."""

    CATEGORY = "lab"
    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"numbers": ("LAB_NUMBERS",), "copies": ("INT", {"default": 1, "min": 0})}}

    def keep(self, numbers, copies):
        from vidgen.nodes.host import current

        shown = []
        for _ in range(copies):
            path, subfolder = current().output_path("lab/numbers", ".txt")
            path.write_text(" ".join(f"{number:.9g}" for number in numbers.tolist()))
            shown.append({"filename": path.name, "subfolder": subfolder, "type": "output"})
        return {"ui": {"files": shown}}


NODE_CLASS_MAPPINGS = {"LabLoad": Load, "LabDraw": Draw, "LabKeep": Keep}
NODE_DISPLAY_NAME_MAPPINGS = {"LabDraw": "Draw Numbers"}
WEB_DIRECTORY = "web"
