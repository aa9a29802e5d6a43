"""Figures: what they show (``charts``), as pictures by matplotlib (``drawing``), and by plotly (``interactive``)."""

from ffprune.stages.figures.drawing import draw, matrix_policy, panels, policy, sensitivity

__all__ = ["draw", "matrix_policy", "panels", "policy", "sensitivity"]
