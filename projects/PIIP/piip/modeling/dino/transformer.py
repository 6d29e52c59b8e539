"""DINO's transformer: encoder, query selection, decoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from piip_core.ops import MSDeformAttn
from piip_core.recompute import GradCheckpointing, run_checkpointed

from .denoising import DenoisingQueries
from .geometry import Levels, box_encoding, inverse_sigmoid, map_encoding, padding_masks

_BASE_SIDE = 0.05  # of the image, on the largest map; doubles with every level
_BORDER = 0.01  # proposals nearer to 0 or 1 than this are none


class MLP(nn.Module):
    """Linear layers with ReLU between them; `dims` are the widths of input, hidden layers and output."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dims[0]) to (..., dims[-1])."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class EncoderLayer(nn.Module):
    """Deformable self-attention and FFN, each added and then normalised (Deformable DETR, section 4.1)."""

    def __init__(self, embed_dim: int, ffn_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(embed_dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, positions: Tensor, reference_points: Tensor, levels: Levels) -> Tensor:
        """Cells (B, S, embed_dim) with `positions` (B, S, embed_dim) to new cells."""
        attended = self.self_attn(x + positions, reference_points, x, levels.shapes, levels.padding_mask)
        x = self.norm1(x + attended)
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class Encoder(nn.Module):
    """A stack of `EncoderLayer`s, whose arguments are `layer_args`; positions are added anew in each."""

    def __init__(self, num_layers: int, *layer_args: int, use_act_checkpoint: GradCheckpointing = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*layer_args) for _ in range(num_layers))
        self.use_act_checkpoint = use_act_checkpoint

    def forward(self, x: Tensor, positions: Tensor, levels: Levels) -> Tensor:
        """Cells (B, S, embed_dim) to memory (B, S, embed_dim)."""
        reference_points = levels.reference_points()
        for layer in self.layers:
            x = run_checkpointed(self.use_act_checkpoint, layer, x, positions, reference_points, levels)
        return x


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and FFN, each added and then normalised."""

    def __init__(self, embed_dim: int, ffn_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = MSDeformAttn(embed_dim, num_heads, num_levels, num_points)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        reference_boxes: Tensor,
        memory: Tensor,
        levels: Levels,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Content of the queries (B, Q, embed_dim) to new content; see `Decoder`.

        `query_pos` (B, Q, embed_dim) is added wherever queries ask, and `reference_boxes` (B, Q, levels, 4) are in
        fractions of each padded map.
        """
        query = x + query_pos
        attended, _ = self.self_attn(query, query, x, attn_mask=attention_mask, need_weights=False)
        x = self.norm1(x + attended)
        attended = self.cross_attn(x + query_pos, reference_boxes, memory, levels.shapes, levels.padding_mask)
        x = self.norm2(x + attended)
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class Decoder(nn.Module):
    """A stack of `DecoderLayer`s, whose arguments are `layer_args`, with iterative refinement of boxes."""

    def __init__(self, num_layers: int, *layer_args: int) -> None:
        super().__init__()
        self.embed_dim = layer_args[0]
        self.layers = nn.ModuleList(DecoderLayer(*layer_args) for _ in range(num_layers))
        self.norm = nn.LayerNorm(self.embed_dim)
        self.ref_point_head = MLP((2 * self.embed_dim, self.embed_dim, self.embed_dim))

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        memory: Tensor,
        levels: Levels,
        bbox_embed: Sequence[nn.Module],
        attention_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs all layers.

        Args:
            x: (B, Q, embed_dim) initial content of the queries.
            boxes: (B, Q, 4) initial boxes (cx, cy, w, h), without gradient.
            memory: (B, S, embed_dim) of the encoder.
            levels: Layout of the memory.
            bbox_embed: The regression branch of every layer.
            attention_mask: (Q, Q) bool, True where a query (row) must not see another.

        Returns:
            Normalised content (B, Q, embed_dim) after every layer, and the boxes (B, Q, 4) that every layer started
            from, then those after the last. Layers see boxes without gradient; these have it, so that the prediction
            after a layer reaches the one before ("look forward twice").
        """
        ratios = levels.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, levels, 4)
        hidden, references = [], [boxes]
        for layer, refine in zip(self.layers, bbox_embed, strict=True):
            seen = boxes[:, :, None] * ratios
            # as published, of the boxes in the padded map: more padding moves them
            query_pos = self.ref_point_head(box_encoding(seen[:, :, 0], self.embed_dim))
            x = layer(x, query_pos, seen, memory, levels, attention_mask)
            refined = torch.sigmoid(refine(x) + inverse_sigmoid(boxes))
            hidden.append(self.norm(x))
            references.append(refined)
            boxes = refined.detach()
        return hidden, references


class Selection(NamedTuple):
    """The best Q proposals of every image, best first."""

    cells: Tensor  # (B, Q) index of the cell of each
    class_logits: Tensor  # (B, Q, num_classes)
    box_logits: Tensor  # (B, Q, 4); +inf for cells without a proposal, which are chosen where others do not suffice

    @property
    def boxes(self) -> Tensor:
        """(B, Q, 4) in (cx, cy, w, h), with gradient."""
        return self.box_logits.sigmoid()


def grid_proposals(levels: Levels) -> tuple[Tensor, Tensor]:
    """A square proposal at every cell, larger on smaller maps, but none in the padding and at the very border.

    Returns:
        Logits (B, S, 4) of (cx, cy, w, h), +inf where there is no proposal, and (B, S) bool: where there is one.
    """
    centres = levels.cell_centres()
    sides = [centres.new_full((height * width,), _BASE_SIDE * 2**i) for i, (height, width) in enumerate(levels.shapes)]
    sides = torch.cat(sides)[:, None].expand_as(centres)
    proposals = torch.cat((centres, sides), dim=-1)
    inside = ((proposals > _BORDER) & (proposals < 1 - _BORDER)).all(dim=-1)
    valid = inside & ~levels.padding_mask
    logits = torch.log(proposals / (1 - proposals))
    return logits.masked_fill(~valid[..., None], torch.inf), valid


def select_proposals(class_logits: Tensor, num_queries: int) -> Tensor:
    """(B, Q) cells with the highest logit of any class, best first, of `class_logits` (B, S, num_classes).

    Raises:
        ValueError: If there are fewer cells than queries.
    """
    if class_logits.shape[1] < num_queries:
        raise ValueError(
            f"num_queries={num_queries} on maps of {class_logits.shape[1]} cells in all: expected at most one query "
            "per cell; use larger images or fewer queries"
        )
    return class_logits.amax(dim=-1).topk(num_queries, dim=1).indices


class TransformerOutput(NamedTuple):
    """What the heads predict from. A tuple, for DeepSpeed's stage 3 finds no tensors in other containers."""

    hidden: list[Tensor]  # normalised content (B, slots + Q, embed_dim) of the queries after every decoder layer
    references: list[Tensor]  # boxes (B, slots + Q, 4) that every layer started from, then those after the last
    selection: Selection  # the proposals that the Q matching queries start from


class DINOTransformer(nn.Module):
    """Deformable encoder and decoder with mixed query selection (DINO, section 3.4).

    Queries start from the boxes of the encoder's best proposals, but their content is learned.

    Args:
        embed_dim: width; a multiple of 4 and of `num_heads`.
        num_heads: heads of every attention.
        num_points: points that a deformable attention reads per head and level.
        ffn_dim: width between the two layers of every FFN.
        num_encoder_layers: number of encoder layers.
        num_decoder_layers: number of decoder layers.
        num_levels: number of feature maps.
        num_queries: number of queries, at most the number of cells of all maps.
        use_act_checkpoint: recompute the encoder's activations in the backward pass; see `GradCheckpointing`.

    Raises:
        ValueError: if `embed_dim` is not such a multiple.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 2048,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        num_levels: int = 4,
        num_queries: int = 900,
        use_act_checkpoint: GradCheckpointing = False,
    ) -> None:
        super().__init__()
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim}: expected a multiple of 4 and of num_heads={num_heads}")
        self.embed_dim, self.num_levels, self.num_queries = embed_dim, num_levels, num_queries
        self.num_decoder_layers = num_decoder_layers
        sizes = embed_dim, ffn_dim, num_heads, num_levels, num_points
        self.encoder = Encoder(num_encoder_layers, *sizes, use_act_checkpoint=use_act_checkpoint)
        self.decoder = Decoder(num_decoder_layers, *sizes)
        self.enc_output = nn.Linear(embed_dim, embed_dim)
        self.enc_output_norm = nn.LayerNorm(embed_dim)
        self.level_embeds = nn.Parameter(torch.empty(num_levels, embed_dim))
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start: Xavier for matrices, the usual one of deformable attention, normal for the tables."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embeds)
        nn.init.normal_(self.query_embed.weight)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        padded_size: tuple[int, int],
        class_embed: Sequence[nn.Module],
        bbox_embed: Sequence[nn.Module],
        denoising: DenoisingQueries | None = None,
    ) -> TransformerOutput:
        """Runs encoder, selection and decoder.

        Args:
            maps: (B, embed_dim, H, W), one per level.
            image_sizes: Height and width of every image, before padding.
            padded_size: Those of the batch.
            class_embed: Classification branches: one per decoder layer, and one for the encoder.
            bbox_embed: Regression branches, likewise.
            denoising: Queries that go in front, in training.
        """
        levels = self.layout(maps, image_sizes, padded_size)
        memory = self.encode(maps, levels)
        selection = self.select(memory, levels, class_embed[-1], bbox_embed[-1])
        content, box_logits = self.initial_queries(selection, denoising)
        mask = denoising.layout.attention_mask(self.num_queries) if denoising and denoising.layout.size else None
        hidden, references = self.decoder(content, box_logits.sigmoid(), memory, levels, bbox_embed[:-1], mask)
        return TransformerOutput(hidden, references, selection)

    def layout(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int]
    ) -> Levels:
        """How the cells of the maps become one sequence."""
        sizes = [tuple(x.shape[-2:]) for x in maps]
        return Levels.of(padding_masks(image_sizes, padded_size, sizes, device=maps[0].device), maps[0].dtype)

    def encode(self, maps: Sequence[Tensor], levels: Levels) -> Tensor:
        """Maps to memory (B, S, embed_dim)."""
        cells = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        return self.encoder(cells, self.positions(levels).to(cells.dtype), levels)

    def positions(self, levels: Levels) -> Tensor:
        """Sine encoding with the embedding of the level, (B, S, embed_dim)."""
        sizes = [height * width for height, width in levels.shapes]
        masks = levels.padding_mask.split(sizes, dim=1)
        return torch.cat(
            [
                map_encoding(mask.unflatten(1, shape), self.embed_dim).flatten(1, 2) + embedding
                for mask, shape, embedding in zip(masks, levels.shapes, self.level_embeds, strict=True)
            ],
            dim=1,
        )

    def select(self, memory: Tensor, levels: Levels, class_embed: nn.Module, bbox_embed: nn.Module) -> Selection:
        """The `num_queries` proposals with the best class."""
        proposals, valid = grid_proposals(levels)
        memory = self.output_memory(memory, valid)
        class_logits = class_embed(memory)
        cells = select_proposals(class_logits, self.num_queries)
        image = torch.arange(len(cells), device=cells.device)[:, None]
        # boxes of the others are not needed
        box_logits = bbox_embed(memory[image, cells]) + proposals[image, cells]
        return Selection(cells, class_logits[image, cells], box_logits)

    def output_memory(self, memory: Tensor, valid: Tensor) -> Tensor:
        """What the encoder's heads see: (B, S, embed_dim) with cells without a proposal blanked."""
        return self.enc_output_norm(self.enc_output(memory.masked_fill(~valid[..., None], 0.0)))

    def initial_queries(self, selection: Selection, denoising: DenoisingQueries | None = None) -> tuple[Tensor, Tensor]:
        """Content (B, slots + Q, embed_dim) and box logits (B, slots + Q, 4) that the decoder starts from."""
        box_logits = selection.box_logits.detach()
        queries = torch.arange(self.num_queries, device=box_logits.device)
        content = self.query_embed(queries).expand(len(box_logits), -1, -1)
        if denoising is None:
            return content, box_logits
        return torch.cat((denoising.content, content), dim=1), torch.cat((denoising.box_logits, box_logits), dim=1)
