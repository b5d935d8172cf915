"""VidGen: video generation nodes for ComfyUI with their own PyTorch core.

ComfyUI loads this folder as a package and reads the names below; pip installs the same folder as ``vidgen``.
Importing it starts nothing: no device is asked, no file is read, and torch itself waits until a node runs.
"""

__version__ = "0.1.0"

# pytest runs a bare __init__.py of the root folder without a package: then there is nothing to import from.
if __package__:
    from .nodes.bridges import FromConditioning
    from .nodes.embeddings import LoadEmbeddings, SaveEmbeddings
    from .nodes.image import FitImages, ImageToVideo, LoadImage, PadVideo
    from .nodes.loaders import LoadAll, LoadModel, LoadTextEncoders, LoadVAE
    from .nodes.lora import ApplyLora
    from .nodes.sampling import EmptyLatent, Sampler, Sigmas
    from .nodes.text import EncodePrompt
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
        "VidGenLoadImage": LoadImage,
        "VidGenFitImages": FitImages,
        "VidGenImageToVideo": ImageToVideo,
        "VidGenPadVideo": PadVideo,
        "VidGenSigmas": Sigmas,
        "VidGenFromConditioning": FromConditioning,
        "VidGenDecodeSave": DecodeSave,
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
        "VidGenLoadImage": "Load Image (VidGen)",
        "VidGenFitImages": "Fit Images (VidGen)",
        "VidGenImageToVideo": "Image to Video (VidGen)",
        "VidGenPadVideo": "Pad Video (VidGen)",
        "VidGenSigmas": "Sigmas (VidGen)",
        "VidGenFromConditioning": "From Conditioning (VidGen)",
        "VidGenDecodeSave": "Decode and Save Video (VidGen)",
    }

    WEB_DIRECTORY = "./web"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
