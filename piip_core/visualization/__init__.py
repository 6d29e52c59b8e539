"""Figures of the inside of a PIIP (paper section IV-G): attention maps, sampling points, Fourier spectra."""

from .drawing import draw_attention, draw_sampling, visualize
from .scene import Scene, network_input, prepare_scene
from .trace import feature_spectrum, find_pyramid, trace_pyramid

__all__ = [
    "Scene",
    "draw_attention",
    "draw_sampling",
    "feature_spectrum",
    "find_pyramid",
    "network_input",
    "prepare_scene",
    "trace_pyramid",
    "visualize",
]
