"""Pictures of the inside of a PIIP (paper section IV-G): attention maps, sampling points, Fourier spectra."""

from .attention import AttentionRow, attention_row
from .drawing import draw_attention, draw_sampling, draw_spectra
from .report import visualize
from .scene import Scene, network_input, prepare_scene
from .spectrum import Spectrum, feature_spectrum
from .trace import Trace, find_pyramid, load_pyramid_weights, trace_pyramid

__all__ = [
    "AttentionRow",
    "Scene",
    "Spectrum",
    "Trace",
    "attention_row",
    "draw_attention",
    "draw_sampling",
    "draw_spectra",
    "feature_spectrum",
    "find_pyramid",
    "load_pyramid_weights",
    "network_input",
    "prepare_scene",
    "trace_pyramid",
    "visualize",
]
