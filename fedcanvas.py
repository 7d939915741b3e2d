"""Pictures from a released model: `from fedcanvas import Generator`."""

from server.generator import Generator, Picture

__all__ = ["Generator", "Picture"]
