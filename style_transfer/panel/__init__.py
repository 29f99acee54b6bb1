"""The interactive panel."""

from .studio import style_studio

__all__ = ["style_studio"]
