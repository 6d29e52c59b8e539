"""BEiT branches against timm's own BEiT and against the formula in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit

from piip_core import BranchConfig
from piip_core.branches import BEiTConfig, build_branch
from piip_core.branches.beit import RelativeBiasAttention
from piip_core.errors import ConfigError

NETWORK = BEiTConfig(embed_dim=32, depth=2, num_heads=4, layer_scale=1.0, bias_window=4)
SIDE = NETWORK.bias_window


def branch_of(window_size=None, window_padding="before_qkv", **options):
    network = dataclasses.replace(NETWORK, **options)
    config = BranchConfig(network=network, image_size=64, window_size=window_size, window_padding=window_padding)
    return build_branch(config)


def run_all(branch, image):
    return branch.run(branch.embed(image), 0, branch.num_blocks).tokens


def test_a_branch_computes_what_timm_does(randomize):
    """timm's network has a class token; with a bias of -inf towards it, no patch sees it."""
    branch = randomize(branch_of()).eval()
    timm_model = Beit(
        img_size=64, embed_dim=32, depth=2, num_heads=4, init_values=1.0, use_abs_pos_emb=False, use_rel_pos_bias=True
    ).eval()
    state = dict(branch.model.state_dict())
    for name, table in branch.model.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            class_token = torch.tensor([[0.0], [-torch.inf], [0.0]]).expand(3, 4)  # from it, to it, within it
            state[name] = torch.cat((table, class_token))
    missing, unexpected = timm_model.load_state_dict(state, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"cls_token", "fc_norm", "head"}
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = timm_model.forward_intermediates(image, indices=[1], norm=False, intermediates_only=True)[0]
        torch.testing.assert_close(run_all(branch, image).permute(0, 3, 1, 2), expected, rtol=1e-5, atol=1e-5)


def formula(attention, tokens):
    """softmax(q k^T / sqrt(d) + bias) v of one sequence (N, C), N a square, in float64, the bias entry by entry."""
    value = {name: parameter.double() for name, parameter in attention.named_parameters()}
    heads, side = attention.num_heads, round(len(tokens) ** 0.5)
    q, k, v = (tokens @ weight.T for weight in value["qkv.weight"].chunk(3))
    q, v = q + value["q_bias"], v + value["v_bias"]
    table = value["relative_position_bias_table"].view(2 * side - 1, 2 * side - 1, heads)
    outputs = []
    for head, (qh, kh, vh) in enumerate(zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)):
        logits = qh @ kh.T / qh.shape[1] ** 0.5
        for i in range(side * side):
            for j in range(side * side):
                dy, dx = i // side - j // side, i % side - j % side
                logits[i, j] += table[dy + side - 1, dx + side - 1, head]
        outputs.append(logits.softmax(dim=1) @ vh)
    return torch.cat(outputs, dim=1) @ value["proj.weight"].T + value["proj.bias"]


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (5, 7), (3, 2)])
@torch.no_grad()
def test_attention_in_windows_is_the_formula_in_each_padded_window(size, randomize):
    attention = randomize(RelativeBiasAttention(16, 2, qkv_bias=True, bias_window=SIDE)).eval()
    attention.window_size = SIDE
    x = torch.randn(1, *size, 16)
    padded = F.pad(x, (0, 0, 0, -size[1] % SIDE, 0, -size[0] % SIDE)).double()
    expected = torch.empty_like(padded)
    for top in range(0, padded.shape[1], SIDE):
        for left in range(0, padded.shape[2], SIDE):
            window = padded[0, top : top + SIDE, left : left + SIDE]
            result = formula(attention, window.flatten(0, 1)).view_as(window)
            expected[0, top : top + SIDE, left : left + SIDE] = result
    expected = expected[:, : size[0], : size[1]].float()
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_without_biases_of_queries_and_values(randomize):
    attention = randomize(RelativeBiasAttention(16, 2, qkv_bias=False, bias_window=SIDE)).eval()
    with_zeros = RelativeBiasAttention(16, 2, qkv_bias=True, bias_window=SIDE)
    missing = with_zeros.load_state_dict(attention.state_dict(), strict=False).missing_keys
    assert missing == ["q_bias", "v_bias"]
    x = torch.randn(1, SIDE, SIDE, 16)
    torch.testing.assert_close(attention(x), with_zeros(x))


def test_windows_other_than_the_tables_are_an_error():
    with pytest.raises(ConfigError, match=r"window_size=3.*bias_window=4"):
        branch_of(window_size=3)
    with pytest.raises(ConfigError, match=r"window_padding='after_qkv'"):
        branch_of(window_size=4, window_padding="after_qkv")


def test_global_blocks_need_images_of_the_tables_size():
    branch = branch_of()
    assert run_all(branch, torch.randn(1, 3, 64, 64)).shape == (1, 4, 4, 32)
    with pytest.raises(ConfigError, match=r"4 x 5 tokens.*bias_window=4.*window_size"):
        run_all(branch, torch.randn(1, 3, 64, 80))
    windowed = branch_of(window_size=4)
    assert run_all(windowed, torch.randn(1, 3, 64, 80)).shape == (1, 4, 5, 32)


def test_state_dicts_have_timms_names_only():
    """The indices of the bias follow from the window and are in no file."""
    names = {name.split(".", 2)[-1] for name in branch_of().model.state_dict() if name.startswith("blocks.")}
    reference = Beit(img_size=64, embed_dim=32, depth=2, num_heads=4, init_values=1.0, use_rel_pos_bias=True)
    assert names == {name.split(".", 2)[-1] for name in reference.state_dict() if name.startswith("blocks.")}
