"""The result as one page: everything inside it, no server, no network."""

from ffprune.stages.page.html import Content, render

__all__ = ["Content", "render"]
