import math

import pytest
import torch

from piip_core.visualization import feature_spectrum, trace_pyramid


@pytest.mark.parametrize(("cycles_x", "cycles_y"), [(3, 0), (0, 5), (6, 8), (16, 0)])
def test_pure_cosine_has_one_peak(cycles_x, cycles_y):
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    wave = 0.5 + torch.cos(2 * math.pi * (cycles_x * x + cycles_y * y) / 32)
    spectrum = feature_spectrum(wave[..., None].repeat(1, 1, 4))
    peak = int(spectrum[1:].argmax()) + 1
    assert len(spectrum) == 17 and peak == pytest.approx(math.hypot(cycles_x, cycles_y))
    others = torch.cat((spectrum[1:peak], spectrum[peak + 1 :]))
    assert float(others.max()) < float(spectrum[peak]) - 10


def test_relative_amplitude_of_a_known_wave():
    """mean + a cos: coefficients N mean at 0 and N a / 2 at the two signs of the frequency, 16 cells in its ring."""
    wave = 2 + 0.5 * torch.cos(2 * math.pi * 3 * torch.arange(24.0) / 24)
    spectrum = feature_spectrum(wave.expand(24, 24)[..., None])
    assert float(spectrum[0]) == pytest.approx(0, abs=1e-9)
    assert float(spectrum[3]) == pytest.approx(math.log(0.25 / 2 * math.sqrt(2 / 16)), abs=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (25, 40)])
def test_white_noise_is_flat(size):
    noise = torch.randn(*size, 4096, generator=torch.Generator().manual_seed(0))
    spectrum = feature_spectrum(noise)
    assert spectrum.abs().max() < 0.05


def test_loud_channels_count_as_much_as_quiet_ones():
    features = torch.randn(16, 16, 8, generator=torch.Generator().manual_seed(0)) + 1
    scaled = features * torch.tensor([1e3, 1.0, 1e-3, 1, 1, 1, 1, 1])
    found, expected = feature_spectrum(scaled), feature_spectrum(features)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_map_without_spectrum():
    with pytest.raises(ValueError, match="1 x 8"):
        feature_spectrum(torch.zeros(1, 8, 3))


def test_spectra_are_of_the_maps_around_the_interaction(tiny_model, make_scene):
    """The padding of the image stays out: 80 rows are 5 cells of Branch 3, padded to 6."""
    scene = make_scene(height=80, width=120)
    assert tuple(scene.pixel_values.shape[-2:]) == (96, 128)
    seen = []
    pyramid = tiny_model.pyramid
    pyramid.interactions[1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    trace = trace_pyramid(pyramid, scene, interaction=1)
    ((before, after),) = seen
    for found, maps in ((trace.before, before), (trace.after, after)):
        expected = feature_spectrum(maps[2][0, :5, :8])
        torch.testing.assert_close(found[2], expected)
    assert not torch.allclose(trace.before[2], trace.after[2])
    assert [len(spectra) for spectra in trace.depth] == [2, 2, 2]
