"""Token merging for video: similar video tokens go through self-attention as one (ToMe: Bolya et al. 2023).

Tokens are destinations or sources.  A destination is one token of each cell of the video (method ``3d``) or
of each bin of tokens with like norms (``attnbin``).  Each source finds its nearest destination by cosine; the
share ``ratio`` of the sources that lie nearest are merged into theirs, by their mean, and afterwards get its
result.  Cells at the borders are smaller, so any number of frames, rows and columns is covered, and text
tokens, which CogVideoX attends to in one sequence with the video's, are never merged.

A destination is drawn at random within its cell, as in ToMe for images (Bolya and Hoffman 2023) and in the
token-merging project whose grid we measure: fixed places would leave a grid in the picture.  The draw follows
from a seed, the step and the block alone, so that every generation and both branches of guidance draw alike.

The torch code is in :mod:`token_matching` and :mod:`token_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from t2v_energy.config import Configuration, ModelFile
from t2v_energy.interventions.base import Change, Intervention, Target, Work, WorkClass
from t2v_energy.interventions.call_work import Call
from t2v_energy.work import cogvideox, wan
from t2v_energy.work.architectures import latents
from t2v_energy.work.blocks import Part
from t2v_energy.work.layers import linear_flop, product_flop

Grid = tuple[int, int, int]
"""Frames, rows and columns of video tokens."""

Stride = Annotated[int, Field(ge=1)]
FORMS: Mapping[str, Any] = {"wan": wan, "cogvideox": cogvideox}
FLOAT32_BYTES = 4


class Sizes(NamedTuple):
    """Video tokens of one sample.

    Attributes:
        tokens: all of them, L.
        destinations: tokens that others are merged into, n_d.
        merged: sources that are merged, r; L - r go on.
    """

    tokens: int
    destinations: int
    merged: int

    @property
    def kept(self) -> int:
        """Tokens after merging."""
        return self.tokens - self.merged


class Shape(NamedTuple):
    """What the closed forms need of one call of the denoiser.

    Attributes:
        width: d; head: width of one head; text: tokens that attention sees beside the video's.
        rotary: whether positions are rotations of queries and keys.
        batch: samples in a call.
        value_bytes: of an activation (bytes).
    """

    width: int
    head: int
    text: int
    layers: int
    rotary: bool
    batch: int
    value_bytes: int


class TokenMerging(Intervention):
    """Self-attention on fewer video tokens."""

    kind: ClassVar[str] = "token-merging"
    call_order: ClassVar[int | None] = 3
    not_after: ClassVar[Mapping[str, str]] = {"compile": "the blocks would be compiled already"}

    method: Literal["3d", "attnbin"] = Field(
        "3d",
        description="destinations: one of each cell of the video, or of each bin of as many tokens by norm",
    )
    mode: Literal["hidden", "kv", "q"] = Field(
        "hidden",
        description="what is merged: attention's input (its output is unmerged), keys and values, or queries",
    )
    ratio: float = Field(ge=0, le=1, description="share of the sources that is merged: r = ⌊ratio · n_src⌋")
    stride: tuple[Stride, Stride, Stride] = Field(description="frames, rows and columns of a cell")
    align: int = Field(
        1,
        ge=1,
        description="merge a few tokens more, so that the merged length, text included, divides by it: "
        "attention is faster where 128 does",
    )
    every: int = Field(1, ge=1, description="merge in every n-th block, from the first on")
    last_block: int | None = Field(
        None, ge=0, description="last block that may merge; null: the model's last"
    )
    match_every: int = Field(1, ge=1, description="steps that one matching serves")
    metric: Literal["hidden", "head-mean"] = Field(
        "hidden",
        description="what is matched: attention's input, or the mean over the heads of what is merged",
    )
    size_bias: bool = Field(
        False,
        description="mode kv: add the logarithm of a cluster's size to its scores, as if its tokens were all "
        "there; FlashAttention takes no such bias",
    )
    seed: int = Field(0, ge=0, description="of the draw of destinations")

    def sizes(self, grid: Grid, text: int) -> Sizes:
        """How many tokens of a video of ``grid`` are destinations, and how many are merged.

        ``text``: tokens that attention sees beside them.
        """
        tokens = prod(grid)
        if self.method == "3d":
            found = prod(ceil(size / step) for size, step in zip(grid, self.stride, strict=True))
        else:
            found = ceil(tokens / prod(self.stride))
        sources = tokens - found
        merged = int(self.ratio * sources)
        aligned = merged + (tokens - merged + text) % self.align
        return Sizes(tokens, found, aligned if merged and aligned <= sources else merged)

    def blocks(self, layers: int) -> range:
        """Indices of the blocks that merge, of a model of ``layers`` blocks."""
        end = layers if self.last_block is None else min(self.last_block + 1, layers)
        return range(0, end, self.every)

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        """Refuse other architectures, contradicting settings, and sizes with nothing to merge."""
        self._check_architecture(model)
        if self.size_bias and self.mode != "kv":
            raise self.refused(
                f"size_bias: mode {self.mode} has no use for it", "set `mode: kv`, or leave it out"
            )
        c = configuration
        grid = token_grid(model, c.height, c.width, c.num_frames)
        if not self.sizes(grid, text_tokens(model)).merged:
            raise self.refused(
                f"{c.height}x{c.width}, {c.num_frames} frames: no token would be merged",
                "use a larger ratio, stride or size",
            )

    def apply(self, target: Target) -> Change:
        """Put merging processors into the blocks.

        Raises:
            UserError: another architecture, or attention that another intervention has replaced.
        """
        from t2v_energy.interventions.token_attention import install

        self._check_architecture(target.model)
        return install(self, target)

    def _check_architecture(self, model: ModelFile) -> None:
        if model.architecture not in FORMS:
            raise self.refused(
                f"{model.key} is of the architecture {model.architecture!r}", f"it fits {' and '.join(FORMS)}"
            )

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """Attention, dense products (with those of the matching) and traffic, with / without."""
        model, c, features = work.model, work.configuration, work.features
        shape = _shape(model)
        sizes = self.sizes(token_grid(model, c.height, c.width, c.num_frames), shape.text)
        calls = model.passes_per_step * c.num_inference_steps
        matchings = model.passes_per_step * ceil(c.num_inference_steps / self.match_every)
        added = {
            "attention": calls * self.attention_flop_added(shape, sizes),
            "dense": calls * self.projection_flop_added(shape, sizes)
            + matchings * self.matching_flop(shape, sizes),
            "traffic": calls * self.traffic_bytes_added(shape, sizes)
            + matchings * self.matching_bytes(shape, sizes),
        }
        attention = float(features.attention_flop[0] + features.attention_narrow_flop[0])
        dense, traffic = float(features.dense_flop[0]), float(features.traffic_bytes[0])
        return {
            "attention": 1 + added["attention"] / attention,
            "dense": 1 + added["dense"] / dense,
            "traffic": 1 + added["traffic"] / traffic,
        }

    def changed_calls(self, work: Work, calls: Sequence[Call]) -> Sequence[Call]:
        """Self-attention on fewer tokens wherever it runs, and a matching where none that is kept serves."""
        model, c = work.model, work.configuration
        shape = _shape(model)
        sizes = self.sizes(token_grid(model, c.height, c.width, c.num_frames), shape.text)
        merging = Part(
            self.attention_flop_added(shape, sizes),
            self.projection_flop_added(shape, sizes),
            self.traffic_bytes_added(shape, sizes),
            0.0,
        )
        matching = Part(0.0, self.matching_flop(shape, sizes), self.matching_bytes(shape, sizes), 0.0)
        matched: dict[str, Call] = {}
        found = []
        for call in calls:
            if call.blocks and "attn1" not in call.replayed:
                earlier = matched.get(call.branch)
                serves = (
                    earlier is not None
                    and call.step - earlier.step < self.match_every
                    and earlier.samples == call.samples
                )
                if not serves:
                    matched[call.branch] = call
                    call = call.with_added(matching)
                call = call.with_added(merging)
            found.append(call)
        return found

    def attention_flop_added(self, shape: Shape, sizes: Sizes) -> int:
        """QKᵀ and PV of one call, with less without (negative): blocks · B · 4 d (q k - n²)."""
        n, fewer = sizes.tokens + shape.text, sizes.kept + shape.text
        queries = n if self.mode == "kv" else fewer
        keys = n if self.mode == "q" else fewer
        saved = product_flop(n, n, shape.width) - product_flop(queries, keys, shape.width)
        return -self._block_calls(shape) * saved

    def projection_flop_added(self, shape: Shape, sizes: Sizes) -> int:
        """Projections of one call, with less without (negative).

        Mode hidden projects r tokens fewer four times; mode q unmerges after the output's projection.
        """
        projections = {"hidden": 4, "kv": 0, "q": 1}[self.mode]
        return -self._block_calls(shape) * linear_flop(sizes.merged, shape.width, projections * shape.width)

    def matching_flop(self, shape: Shape, sizes: Sizes) -> int:
        """Products of all tokens with all destinations, all blocks of a call that matches.

        The destinations' own rows are computed as well and not used: leaving them out would copy the others.
        """
        if not sizes.merged:
            return 0
        return self._block_calls(shape) * linear_flop(
            sizes.tokens, self._matched_width(shape), sizes.destinations
        )

    def traffic_bytes_added(self, shape: Shape, sizes: Sizes) -> int:
        """Bytes of merging and unmerging in one call, less those of the kernels that see fewer tokens."""
        if not sizes.merged:
            return 0
        d, b = shape.width, shape.value_bytes
        added = (2 if self.mode == "kv" else 1) * merge_bytes(sizes, d, b)
        if self.mode != "kv":
            added += 2 * b * sizes.tokens * d  # unmerging: as many rows read as written
        if self.mode == "hidden":
            added -= sizes.merged * attention_bytes(shape)
            # the kept tokens' cosines and sines
            added += shape.rotary * 2 * 2 * FLOAT32_BYTES * sizes.kept * shape.head
        else:
            added += self._own_attention_bytes(shape, sizes)
        return self._block_calls(shape) * added

    def _own_attention_bytes(self, shape: Shape, sizes: Sizes) -> int:
        """What our attention of CogVideoX moves more (or less) than diffusers': one sample of a block."""
        if not shape.text:
            return 0
        rotations = 2 * (rotary_bytes(shape.value_bytes) - cogvideox_rotary_bytes(shape.value_bytes))
        joined = (2 if self.mode == "kv" else 1) * 2 * shape.value_bytes * (sizes.kept + shape.text)
        return shape.width * (joined + shape.rotary * rotations * sizes.tokens)

    def matching_bytes(self, shape: Shape, sizes: Sizes) -> int:
        """Bytes of matching in all blocks of a call that matches; index arithmetic is left out."""
        if not sizes.merged:
            return 0
        b, m = shape.value_bytes, self._matched_width(shape)
        each = b * sizes.tokens * m  # norms
        if self.metric == "head-mean":
            each += b * sizes.tokens * (shape.width + m)
        # destinations: gathered, to float32, normalised (their norms, then a division), and back
        each += sizes.destinations * m * (2 * b + 2 * conversion_bytes(b) + 3 * FLOAT32_BYTES)
        each += b * sizes.tokens * sizes.destinations  # the scores, read for the largest
        return self._block_calls(shape) * each

    def _block_calls(self, shape: Shape) -> int:
        return len(self.blocks(shape.layers)) * shape.batch

    def _matched_width(self, shape: Shape) -> int:
        return shape.head if self.metric == "head-mean" else shape.width


def token_grid(model: ModelFile, height: int, width: int, num_frames: int) -> Grid:
    """Video tokens that the denoiser sees; raises :class:`UserError` for a size that it cannot run."""
    frames, rows, columns = latents(model, height, width, num_frames)[0]
    config = model.components["transformer"].config
    down, across = FORMS[model.architecture].patch_sides(config)
    deep = wan.settings(config)["patch_size"][0] if model.architecture == "wan" else 1
    return frames // deep, rows // down, columns // across


def text_tokens(model: ModelFile) -> int:
    """Text tokens that self-attention sees beside the video's."""
    return model.tokenizer.max_length if model.architecture == "cogvideox" else 0


def _shape(model: ModelFile) -> Shape:
    part = model.components["transformer"]
    form = FORMS[model.architecture]
    complete, joint = form.settings(part.config), model.architecture == "cogvideox"
    return Shape(
        width=form.width(part.config),
        head=complete["attention_head_dim"],
        text=text_tokens(model),
        layers=complete["num_layers"],
        rotary=not joint or bool(part.config.get("use_rotary_positional_embeddings")),
        batch=model.batch_per_pass,
        value_bytes=FLOAT32_BYTES if part.dtype == "float32" else 2,
    )


def merge_bytes(sizes: Sizes, width: int, value_bytes: int) -> int:
    """Bytes of merging one tensor of one sample.

    The kept rows are gathered (2 b L' d).  Destinations are gathered, to float32, divided, back, and put in
    their places; merged rows are gathered, to float32, and added to them.
    """
    b, f = value_bytes, FLOAT32_BYTES
    destination = 2 * b + conversion_bytes(b) + 2 * f + conversion_bytes(b) + 2 * b
    merged = 2 * b + conversion_bytes(b) + (f + 2 * f)
    return width * (2 * b * sizes.kept + destination * sizes.destinations + merged * sizes.merged)


def attention_bytes(shape: Shape) -> int:
    """Bytes that diffusers' self-attention moves for each token beside its products, as it runs eagerly.

    Norms of queries and keys, rotations, and in CogVideoX the copy that joins text and video.
    """
    b, joint = shape.value_bytes, bool(shape.text)
    rotation = cogvideox_rotary_bytes(b) if joint else rotary_bytes(b)
    return shape.width * (2 * 2 * b + shape.rotary * 2 * rotation + joint * 2 * b)


def conversion_bytes(value_bytes: int) -> int:
    """Converting one value to float32, or back."""
    return 0 if value_bytes == FLOAT32_BYTES else value_bytes + FLOAT32_BYTES


def rotary_bytes(value_bytes: int) -> int:
    """Rotating one value, halves apart: four products in float32, two sums of them, two strided stores."""
    b, f = value_bytes, FLOAT32_BYTES
    return (2 * b + 2 * f) + 3 * f + (f + b)


def cogvideox_rotary_bytes(value_bytes: int) -> int:
    """The same in diffusers' CogVideoX: the partner negated and stacked, both to float32, two products,
    their sum, back, and stored beside the text."""
    b, f = value_bytes, FLOAT32_BYTES
    return b + 2 * b + 3 * conversion_bytes(b) + 2 * 2 * f + 3 * f + 2 * b
