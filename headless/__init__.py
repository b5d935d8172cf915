"""VidGen without ComfyUI: the command line, the executor of workflows, batches, and the server."""

from pathlib import Path

FILES = Path.home() / "VidGen"
"""where a server's files lie, in ``input``, ``output`` and others, where nobody names another folder"""
