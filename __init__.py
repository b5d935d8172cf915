"""VidGen: video generation nodes for ComfyUI with their own PyTorch core.

ComfyUI loads this folder as a package and reads the names below; pip installs the same folder as ``vidgen``.
Importing it starts nothing: no device is asked, no file is read, and torch itself waits until a node runs.
"""

__version__ = "0.1.0"

import sys

# pytest runs a bare __init__.py of the root folder without a package: then there is nothing to import from.
if __package__:
    from .nodes.attention import Attention
    from .nodes.bridges import FromConditioning
    from .nodes.compile import Compile
    from .nodes.embeddings import LoadEmbeddings, SaveEmbeddings
    from .nodes.image import FitImages, ImageToVideo, KeyframesToVideo, LoadImage, PadVideo, PlaceKeyframe
    from .nodes.loaders import LoadAll, LoadModel, LoadTextEncoders, LoadVAE
    from .nodes.lora import ApplyLora
    from .nodes.sampling import EmptyLatent, Sampler, Sigmas
    from .nodes.text import EncodePrompt
    from .nodes.tricks import (
        CalibrateCache,
        CfgZeroStar,
        ContextWindows,
        EnhanceAVideo,
        Riflex,
        SkipLayerGuidance,
        SpatioTemporalGuidance,
        StepCache,
    )
    from .nodes.video import Decode, DecodeSave, EncodeVideo, LoadVideo, SaveVideo

    NODE_CLASS_MAPPINGS = {
        "VidGenLoadModel": LoadModel,
        "VidGenLoadVAE": LoadVAE,
        "VidGenLoadTextEncoders": LoadTextEncoders,
        "VidGenLoadAll": LoadAll,
        "VidGenEncodePrompt": EncodePrompt,
        "VidGenSaveEmbeddings": SaveEmbeddings,
        "VidGenLoadEmbeddings": LoadEmbeddings,
        "VidGenEmptyLatent": EmptyLatent,
        "VidGenSampler": Sampler,
        "VidGenDecode": Decode,
        "VidGenEncodeVideo": EncodeVideo,
        "VidGenSaveVideo": SaveVideo,
        "VidGenLoadVideo": LoadVideo,
        "VidGenApplyLora": ApplyLora,
        "VidGenAttention": Attention,
        "VidGenLoadImage": LoadImage,
        "VidGenFitImages": FitImages,
        "VidGenImageToVideo": ImageToVideo,
        "VidGenPadVideo": PadVideo,
        "VidGenSigmas": Sigmas,
        "VidGenFromConditioning": FromConditioning,
        "VidGenCompile": Compile,
        "VidGenDecodeSave": DecodeSave,
        "VidGenStepCache": StepCache,
        "VidGenCalibrateCache": CalibrateCache,
        "VidGenSkipLayers": SkipLayerGuidance,
        "VidGenSTG": SpatioTemporalGuidance,
        "VidGenCfgZeroStar": CfgZeroStar,
        "VidGenEnhanceAVideo": EnhanceAVideo,
        "VidGenRIFLEx": Riflex,
        "VidGenContextWindows": ContextWindows,
        "VidGenKeyframe": PlaceKeyframe,
        "VidGenKeyframesToVideo": KeyframesToVideo,
    }

    NODE_DISPLAY_NAME_MAPPINGS = {
        "VidGenLoadModel": "Load Model (VidGen)",
        "VidGenLoadVAE": "Load VAE (VidGen)",
        "VidGenLoadTextEncoders": "Load Text Encoders (VidGen)",
        "VidGenLoadAll": "Load All (VidGen)",
        "VidGenEncodePrompt": "Encode Prompt (VidGen)",
        "VidGenSaveEmbeddings": "Save Embeddings (VidGen)",
        "VidGenLoadEmbeddings": "Load Embeddings (VidGen)",
        "VidGenEmptyLatent": "Empty Latent (VidGen)",
        "VidGenSampler": "Sampler (VidGen)",
        "VidGenDecode": "Decode (VidGen)",
        "VidGenEncodeVideo": "Encode Video (VidGen)",
        "VidGenSaveVideo": "Save Video (VidGen)",
        "VidGenLoadVideo": "Load Video (VidGen)",
        "VidGenApplyLora": "Apply LoRA (VidGen)",
        "VidGenAttention": "Attention (VidGen)",
        "VidGenLoadImage": "Load Image (VidGen)",
        "VidGenFitImages": "Fit Images (VidGen)",
        "VidGenImageToVideo": "Image to Video (VidGen)",
        "VidGenPadVideo": "Pad Video (VidGen)",
        "VidGenSigmas": "Sigmas (VidGen)",
        "VidGenFromConditioning": "From Conditioning (VidGen)",
        "VidGenCompile": "Compile (VidGen)",
        "VidGenDecodeSave": "Decode and Save Video (VidGen)",
        "VidGenStepCache": "Step Cache (VidGen)",
        "VidGenCalibrateCache": "Calibrate Cache (VidGen)",
        "VidGenSkipLayers": "Skip-Layer Guidance (VidGen)",
        "VidGenSTG": "Spatio-Temporal Guidance (VidGen)",
        "VidGenCfgZeroStar": "CFG-Zero* (VidGen)",
        "VidGenEnhanceAVideo": "Enhance-A-Video (VidGen)",
        "VidGenRIFLEx": "RIFLEx (VidGen)",
        "VidGenContextWindows": "Context Windows (VidGen)",
        "VidGenKeyframe": "Keyframe (VidGen)",
        "VidGenKeyframesToVideo": "Keyframes to Video (VidGen)",
    }

    WEB_DIRECTORY = "./web"

    def _plan(body):
        from .headless.plan import answer

        return answer(body)

    if "comfy.model_management" in sys.modules:  # ComfyUI runs, and has loaded torch long ago
        from .nodes.host import offer_plans

        offer_plans(_plan)

    def render(workflow, /, *, output=None, device=None, models=(), input_folder=None, quiet=True, **values):
        """Run a workflow: ``vidgen.render("hunyuan_t2v", seed=7, output="a.mp4", **{"Prompt.prompt": "a red star"})``.

        Args:
            workflow: a path (either format, or a video that carries one), the name of a shipped workflow, or a dict.
            output: the video, or a folder for several; None is the folder ``output``.
            device: "cpu", "cuda", ...; None takes a GPU if there is one.
            models: folders to look for models in, besides the bundled ones.
            input_folder: whose files ComfyUI's own loaders name; None is ``VidGen/input`` in the home folder.
            quiet: no progress bar.
            values: ``NODE.INPUT`` (id, title or class of the node), or ``INPUT`` where one node only has it.

        Returns:
            The videos that were saved, as a list of ``pathlib.Path``.

        Raises:
            UserError, executor.NodeError: what was given, what is expected and what to do.
        """
        from .headless.render import render_workflow

        return render_workflow(
            workflow,
            output=output,
            device=device,
            models=models,
            input_folder=input_folder,
            quiet=quiet,
            values=values,
        )

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "render"]
