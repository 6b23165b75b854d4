"""Token merging: matching, merging and attention against slow references, and the work that they leave."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, prod
from typing import Any

import numpy as np
import pytest
import tiny
from t2v_energy.config import Configuration, ModelFile, load_model
from t2v_energy.errors import UserError
from t2v_energy.interventions import applied, catalogue, named
from t2v_energy.interventions.base import Target, Work
from t2v_energy.interventions.fused_qkv import FusedQkv
from t2v_energy.interventions.token_merging import (
    Shape,
    TokenMerging,
    merge_bytes,
    text_tokens,
    token_grid,
)
from t2v_energy.prediction.features import Point, features

torch = pytest.importorskip("torch")

from t2v_energy.interventions import token_attention, token_matching  # noqa: E402
from t2v_energy.interventions.block_stack import blocks_of  # noqa: E402

ROOT = tiny.ROOT
GRIDS = ((12, 30, 45), (4, 4, 4), (1, 7, 5), (13, 5, 11), (3, 1, 2))
STRIDES = ((1, 3, 3), (2, 3, 3), (4, 6, 9))
METHODS, MODES = ("3d", "attnbin"), ("hidden", "kv", "q")
MODELS = ("tiny-wan", "tiny-cogvideox", "tiny-cogvideox-rotary")

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_stride = pytest.mark.parametrize("stride", STRIDES, ids=str)
every_method = pytest.mark.parametrize("method", METHODS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_model = pytest.mark.parametrize("key", MODELS)


def merging(**changes: Any) -> TokenMerging:
    return TokenMerging.model_validate({"ratio": 0.5, "stride": (2, 3, 3), **changes})


def model(key: str) -> ModelFile:
    """A tiny model; ``-rotary`` is CogVideoX with rotary embeddings, as its 5b has them."""
    found = tiny.model(key.removesuffix("-rotary"))
    if not key.endswith("-rotary"):
        return found
    part = found.components["transformer"]
    config = {**part.config, "use_rotary_positional_embeddings": True}
    parts = {**found.components, "transformer": part.model_copy(update={"config": config})}
    return found.model_copy(update={"components": parts})


BUILT: dict[str, Any] = {}


def pipeline(key: str) -> Any:
    if not key.endswith("-rotary"):
        return tiny.pipeline(key)
    if key not in BUILT:
        from t2v_energy.models.build import build_pipeline

        BUILT[key] = build_pipeline(model(key), "random", "cpu", 0)
    return BUILT[key]


def target(key: str, **changes: Any) -> Target:
    return Target(pipeline(key), model(key), tiny.defaults(key.removesuffix("-rotary"), **changes))


def video(at: Target, steps: int | None = None) -> Any:
    """Latents of one generation; it is cut after ``steps`` as the runner cuts it."""
    c = at.configuration

    def after_step(running: Any, index: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        running._interrupt = index + 1 >= (steps or c.num_inference_steps)
        return {}

    return at.pipeline(
        prompt="a red fox",
        negative_prompt="",
        height=c.height,
        width=c.width,
        num_frames=c.num_frames,
        num_inference_steps=c.num_inference_steps,
        guidance_scale=c.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=after_step,
    ).frames.numpy()


@contextmanager
def changed(settings: TokenMerging, at: Target) -> Iterator[Any]:
    change = settings.apply(at)
    try:
        yield change.evidence
    finally:
        change.undo()


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- destinations ---------------------------------------------------------------------------------------


@every_grid
@every_stride
def test_each_cell_has_one_destination(grid: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
    sizes = merging(stride=stride).sizes(grid, 0)
    draw = random(3, sizes.destinations).sigmoid()
    found = token_matching.cell_destinations(grid, stride, draw).tolist()
    places = [np.unravel_index(token, grid) for token in found]
    cells = [tuple(int(p) // s for p, s in zip(place, stride, strict=True)) for place in places]
    assert cells == list(np.ndindex(*(ceil(g / s) for g, s in zip(grid, stride, strict=True))))


def test_every_token_of_a_cell_can_be_drawn_and_no_other() -> None:
    grid, stride = (3, 4, 5), (2, 3, 3)
    cells = merging(stride=stride).sizes(grid, 0).destinations
    draws = torch.cartesian_prod(*[torch.tensor([0.0, 0.2, 0.4, 0.6, 0.9, 1 - 2**-24])] * 3)
    found = {
        token
        for draw in draws
        for token in token_matching.cell_destinations(grid, stride, draw[:, None].expand(3, cells)).tolist()
    }
    assert found == set(range(prod(grid)))


@pytest.mark.parametrize("tokens", [90, 101, 7])
def test_each_bin_of_norms_has_one_destination(tokens: int) -> None:
    size, norms = 9, random(2, tokens).abs()
    draw = random(ceil(tokens / size), seed=1).sigmoid()
    found = token_matching.bin_destinations(norms, size, draw)
    for sample in range(2):
        rank = {
            token: place
            for place, token in enumerate(sorted(range(tokens), key=norms[sample].tolist().__getitem__))
        }
        assert [rank[token] // size for token in found[sample].tolist()] == list(range(ceil(tokens / size)))


def test_the_projects_grid_at_its_length() -> None:
    # 45 frames of 480 x 720 on CogVideoX-2b: its own counts are 16200 tokens and r of the sources
    grid = token_grid(load_model(ROOT, "cogvideox-2b"), 480, 720, 45)
    assert grid == (12, 30, 45)
    found = {(s, r): merging(stride=s, ratio=r).sizes(grid, 0) for s in STRIDES for r in (0.3, 0.5)}
    assert {key: tuple(sizes) for key, sizes in found.items()} == {
        ((1, 3, 3), 0.3): (16200, 1800, 4320),
        ((1, 3, 3), 0.5): (16200, 1800, 7200),
        ((2, 3, 3), 0.3): (16200, 900, 4590),
        ((2, 3, 3), 0.5): (16200, 900, 7650),
        ((4, 6, 9), 0.3): (16200, 75, 4837),
        ((4, 6, 9), 0.5): (16200, 75, 8062),
    }


@every_method
@pytest.mark.parametrize("text", [0, 226])
def test_the_merged_length_can_be_aligned(method: str, text: int) -> None:
    grid, free, aligned = (12, 30, 45), merging(method=method), merging(method=method, align=128)
    merged = aligned.sizes(grid, text).merged
    assert (prod(grid) - merged + text) % 128 == 0
    assert 0 <= merged - free.sizes(grid, text).merged < 128
    # nothing is merged for the length's sake alone, nor a destination
    assert merging(ratio=0.0, align=128).sizes(grid, text).merged == 0
    every = merging(method=method, ratio=1.0, align=128).sizes(grid, text)
    assert every.merged == every.tokens - every.destinations


# --- matching -------------------------------------------------------------------------------------------


def dense_match(metric: Any, destinations: Any, count: int) -> list[tuple[dict[int, int], set[int]]]:
    """Of each sample: the nearest destination of each token, and the ``count`` sources nearest to theirs."""
    found = []
    for values, chosen in zip(metric.double().numpy(), destinations.tolist(), strict=True):
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        cosine = unit @ unit[chosen].T
        nearest = {token: chosen[place] for token, place in enumerate(cosine.argmax(1))}
        sources = sorted(set(range(len(values))) - set(chosen), key=lambda token: -cosine[token].max())
        found.append((nearest, set(sources[:count])))
    return found


def owners(merge: Any, tokens: int) -> list[list[int]]:
    """Of each sample, the row that each token gets its result from."""
    rows = torch.arange(merge.batch * merge.kept, dtype=torch.float64).reshape(merge.batch, merge.kept, 1)
    return merge.unmerge(rows)[..., 0].long().sub(torch.arange(merge.batch)[:, None] * merge.kept).tolist()


@pytest.mark.parametrize("scores", [1, 500, 2**24])
@pytest.mark.parametrize("count", [0, 1, 40, 180])
def test_matching_is_that_of_a_dense_reference(scores: int, count: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(token_matching, "SCORES", scores)
    metric, tokens = random(2, 200, 12) * torch.linspace(0.1, 3, 200)[:, None], 200
    destinations = torch.stack([torch.arange(0, 200, 10), torch.arange(5, 200, 10)])
    merge = token_matching.match(metric, destinations, count)
    for sample, (nearest, sources) in enumerate(dense_match(metric, destinations, count)):
        kept = [token for token in range(tokens) if token not in sources]  # in their order
        assert merge.kept_tokens[sample].tolist() == kept
        expected = [kept.index(nearest[token] if token in sources else token) for token in range(tokens)]
        assert owners(merge, tokens)[sample] == expected


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Most values of a tensor that an operator returns."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    most = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            most[0] = max([most[0], *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
            return result

    with Watch():
        yield most


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_grows_with_the_square_of_the_tokens(method: str, monkeypatch: Any) -> None:
    grid, stride, limit = (8, 30, 20), (1, 3, 3), 40_000
    monkeypatch.setattr(token_matching, "SCORES", limit)
    settings = merging(stride=stride, method=method)
    sizes, metric = settings.sizes(grid, 0), random(1, prod(grid), 8)
    with largest_tensor() as most:
        draw = torch.rand(3, sizes.destinations)
        if method == "3d":
            destinations = token_matching.cell_destinations(grid, stride, draw)[None]
        else:
            destinations = token_matching.bin_destinations(token_matching.row_norms(metric), 9, draw[0])
        merge = token_matching.match(metric, destinations, sizes.merged)
        merge.unmerge(merge.merge(metric))
    assert most[0] <= max(limit, metric.numel())
    assert sizes.tokens * sizes.destinations > 50 * most[0]
    # and with a limit that all scores fit in, they are computed at once: the limit is what bounds them
    monkeypatch.setattr(token_matching, "SCORES", 2**24)
    with largest_tensor() as most:
        token_matching.match(metric, destinations, sizes.merged)
    assert most[0] == sizes.tokens * ceil(sizes.destinations / 8) * 8


# --- merging --------------------------------------------------------------------------------------------


def some_merge(count: int = 40, tokens: int = 60, batch: int = 2) -> Any:
    destinations = torch.stack([torch.arange(sample, tokens, 12) for sample in range(batch)])
    return token_matching.match(random(batch, tokens, 6), destinations, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_means_of_their_tokens_and_unmerged_ones_come_back_exactly(dtype: Any) -> None:
    merge, values = some_merge(), random(2, 60, 7, seed=3).to(dtype)
    merged = merge.merge(values)
    assert (merged.dtype, merged.shape) == (dtype, (2, 20, 7))
    alone = 0
    for sample, rows in enumerate(owners(merge, 60)):
        for row in range(20):
            members = [token for token in range(60) if rows[token] == row]
            assert merge.sizes()[sample, row] == len(members) > 0
            mean = values[sample, members].double().mean(0)
            torch.testing.assert_close(merged[sample, row], mean.to(dtype))
            if len(members) == 1:
                alone += 1
                assert torch.equal(merge.unmerge(merged)[sample, members[0]], values[sample, members[0]])
    assert alone > 20


def test_merging_none_changes_nothing_not_even_the_order() -> None:
    merge, values = some_merge(0), random(2, 60, 7, seed=3)
    assert torch.equal(merge.merge(values), values)
    assert torch.equal(merge.unmerge(values), values)


def test_every_source_may_be_merged() -> None:
    merge, values = some_merge(55), random(2, 60, 7, seed=3)
    assert merge.merge(values).shape == (2, 5, 7)
    weights = merge.sizes()[..., None]
    torch.testing.assert_close((merge.merge(values) * weights).sum(1), values.sum(1))


# --- attention ------------------------------------------------------------------------------------------


def complex_rotation(values: Any, tables: Any) -> Any:
    """(n, H, head) turned by the angles of (n, head) tables."""
    if tables is None:
        return values
    turn = torch.complex(tables[0][:, 0::2], tables[1][:, 0::2])[:, None]
    pairs = torch.view_as_complex(values.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def slow_attention(  # one sample, everything materialised, in loops
    attn: Any, settings: TokenMerging, hidden: Any, text: Any, tables: Any, destinations: list[int]
) -> tuple[Any, Any]:
    heads, tokens = attn.heads, len(hidden)

    def projected(layer: Any, norm: Any, values: Any) -> Any:
        flat = values @ layer.weight.T + layer.bias
        if norm is not None and norm.weight.numel() == flat.shape[-1]:  # Wan's norms span the heads
            flat = flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
        split = flat.unflatten(-1, (heads, -1))
        if norm is not None and norm.weight.numel() == split.shape[-1]:
            centred = split - split.mean(-1, keepdim=True)
            unit = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + norm.eps)
            split = unit * norm.weight + norm.bias
        return split

    def all_of(values: Any, positions: Any) -> tuple[Any, Any, Any]:
        q, k = projected(attn.to_q, attn.norm_q, values), projected(attn.to_k, attn.norm_k, values)
        q, k = complex_rotation(q, positions), complex_rotation(k, positions)
        return q, k, projected(attn.to_v, None, values)

    full = all_of(hidden, tables)
    metric = hidden
    if settings.metric == "head-mean":
        source = {"hidden": hidden.unflatten(-1, (heads, -1)), "kv": full[1], "q": full[0]}
        metric = source[settings.mode].mean(1)
    count = int(settings.ratio * (tokens - len(destinations)))
    [(nearest, sources)] = dense_match(metric[None], torch.tensor([destinations]), count)
    kept = [token for token in range(tokens) if token not in sources]
    groups = [[token, *(s for s in sorted(sources) if nearest[s] == token)] for token in kept]

    def means(values: Any) -> Any:
        return torch.stack([values[group].mean(0) for group in groups])

    q, k, v = full
    if settings.mode == "hidden":
        positions = None if tables is None else tuple(table[kept] for table in tables)
        q, k, v = all_of(means(hidden), positions)
    elif settings.mode == "kv":
        k, v = means(k), means(v)
    else:
        q = means(q)
    if text is not None:
        q, k, v = (torch.cat(pair) for pair in zip(all_of(text, None), (q, k, v), strict=True))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if settings.size_bias:
        sizes = [1.0] * (len(k) - len(groups)) + [float(len(group)) for group in groups]
        scores = scores + torch.tensor(sizes).log()
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    out = out @ attn.to_out[0].weight.T + attn.to_out[0].bias
    text_out, video_out = (None, out) if text is None else out.split([len(text), len(out) - len(text)])
    if settings.mode == "kv":
        return video_out, text_out
    row = {token: place for place, group in enumerate(groups) for token in group}
    return torch.stack([video_out[row[token]] for token in range(tokens)]), text_out


VARIANTS = [{"mode": mode} | other for mode in MODES for other in ({}, {"metric": "head-mean"})]


@every_model
@every_method
@pytest.mark.parametrize("variant", [*VARIANTS, {"mode": "kv", "size_bias": True}], ids=str)
def test_attention_is_that_of_a_slow_reference(key: str, method: str, variant: dict[str, Any]) -> None:
    settings = merging(method=method, **variant)
    at, grid, wan = target(key), (3, 4, 5), key == "tiny-wan"
    tokens, batch = prod(grid), 1 if wan else 2
    attn = blocks_of(at.denoiser)[1].attn1
    hidden, text = (
        random(batch, tokens, attn.to_q.in_features),
        random(batch, 6, attn.to_q.in_features, seed=1),
    )
    tables = None
    if wan or key.endswith("rotary"):
        angles = random(tokens, attn.to_q.out_features // attn.heads // 2, seed=2).repeat_interleave(2, -1)
        tables = (angles.cos(), angles.sin())
    with changed(settings, at) as evidence, torch.no_grad():
        processor = attn.processor
        processor.generation.grid = grid
        if wan:
            shaped = tuple(table[None, :, None] for table in tables or ())
            video, words = attn(hidden, None, None, shaped), None
        else:
            video, words = attn(hidden, text, image_rotary_emb=tables)
        sizes = settings.sizes(grid, 0)
        draw = processor._draws(
            0, 1, (3, sizes.destinations) if method == "3d" else (sizes.destinations,), hidden.device
        )
        if method == "3d":
            destinations = token_matching.cell_destinations(grid, settings.stride, draw).expand(batch, -1)
        else:
            destinations = token_matching.bin_destinations(hidden.norm(dim=-1), prod(settings.stride), draw)
        for sample in range(batch):
            expected, words_expected = slow_attention(
                attn,
                settings,
                hidden[sample],
                None if wan else text[sample],
                tables,
                destinations[sample].tolist(),
            )
            torch.testing.assert_close(video[sample], expected, rtol=1e-4, atol=1e-5)
            if words is not None:
                torch.testing.assert_close(words[sample], words_expected, rtol=1e-4, atol=1e-5)
        assert evidence() == {
            "tokens_merged": batch * sizes.merged,
            "blocks_merged": 1,
            "matchings_made": 1,
        }


def test_rotation_is_diffusers_own() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    angles = random(30, 4).repeat_interleave(2, -1)
    values = random(2, 30, 3, 8, seed=1).to(torch.bfloat16)
    expected = apply_rotary_emb(values.transpose(1, 2), (angles.cos(), angles.sin())).transpose(1, 2)
    tables = (table[None, :, None] for table in (angles.cos(), angles.sin()))
    assert torch.equal(token_attention.rotated(values, *tables), expected)


@every_model
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_half_precision_stays_half_and_near(key: str, variant: dict[str, Any]) -> None:
    settings, at, grid = merging(match_every=2, **variant), target(key), (3, 4, 5)
    attn = blocks_of(at.denoiser)[0].attn1
    tokens, width, wan = prod(grid), attn.to_q.in_features, key == "tiny-wan"
    hidden, text = random(2, tokens, width), random(2, 6, width, seed=1)
    angles = random(tokens, width // attn.heads // 2, seed=2).repeat_interleave(2, -1)
    tables = (angles.cos(), angles.sin())

    def attend(module: Any, dtype: Any) -> tuple[Any, ...]:
        if wan:
            shaped = tuple(table[None, :, None] for table in tables)
            return (module(hidden.to(dtype), None, None, shaped),)
        rotary = tables if key.endswith("rotary") else None
        return tuple(module(hidden.to(dtype), text.to(dtype), image_rotary_emb=rotary))

    with changed(settings, at), torch.no_grad():
        attn.processor.generation.grid = grid
        whole = attend(attn, torch.float32)
        copied = copy.deepcopy(attn).to(torch.bfloat16)
        half = attend(copied, torch.bfloat16)  # by the same matching, which serves two steps
        copied.processor._matched.clear()
        again = attend(copied, torch.bfloat16)  # by its own
    for one, other, own in zip(half, whole, again, strict=True):
        assert one.dtype == own.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.02 * other.norm()
        assert (own.float() - other).norm() < 0.5 * other.norm()


# --- whole generations ----------------------------------------------------------------------------------


@every_model
@every_mode
def test_a_ratio_of_zero_is_bit_identical_and_says_that_nothing_changed(key: str, mode: str) -> None:
    at = target(key, num_inference_steps=2)
    before = video(at)
    with changed(merging(ratio=0.0, mode=mode), at) as evidence:
        assert np.array_equal(video(at), before)
    assert not any(evidence().values())


@every_model
@every_mode
def test_merging_changes_the_video_and_undoing_it_leaves_no_trace(key: str, mode: str) -> None:
    at = target(key, num_inference_steps=2)
    before, attributes = video(at), set(vars(at.pipeline.scheduler))
    processors = dict(at.denoiser.attn_processors)
    with changed(merging(mode=mode), at):
        first, again = video(at), video(at)
    assert not np.array_equal(first, before)
    assert np.array_equal(first, again)  # each generation draws alike
    assert np.array_equal(video(at), before)
    assert at.denoiser.attn_processors == processors
    assert set(vars(at.pipeline.scheduler)) == attributes
    assert not at.denoiser._forward_pre_hooks


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
@pytest.mark.parametrize("size", [(1, 64, 64), (5, 48, 80), (13, 32, 112), (17, 80, 32)], ids=str)
@every_method
def test_any_number_of_frames_and_any_side(key: str, size: tuple[int, int, int], method: str) -> None:
    frames, height, width = size
    at = target(key, num_frames=frames, height=height, width=width, num_inference_steps=1)
    settings = merging(stride=(4, 6, 9), method=method)
    settings.check(at.model, at.configuration)
    sizes = settings.sizes(token_grid(at.model, height, width, frames), text_tokens(at.model))
    with changed(settings, at) as evidence:
        assert np.isfinite(video(at)).all()
    calls = at.model.passes_per_step * 2  # two blocks
    assert evidence() == {
        "tokens_merged": calls * at.model.batch_per_pass * sizes.merged,
        "blocks_merged": calls,
        "matchings_made": calls,
    }


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
def test_a_matching_serves_as_many_steps_as_asked_in_each_branch(key: str) -> None:
    at = target(key, num_inference_steps=5)
    with changed(merging(match_every=3), at) as evidence:
        whole = video(at)
        passes = at.model.passes_per_step
        assert evidence()["matchings_made"] == passes * 2 * 2  # at steps 0 and 3, two blocks
        assert evidence()["blocks_merged"] == passes * 2 * 5
        video(at, steps=2)  # cut: what it leaves behind is of another generation
        assert evidence()["matchings_made"] == passes * 2 * 3
        assert np.array_equal(video(at), whole)
    with changed(merging(), at):
        assert not np.array_equal(video(at), whole)


def test_a_matching_is_of_its_branch_alone() -> None:
    at = target("tiny-wan", num_inference_steps=2)
    with changed(merging(match_every=2), at):
        video(at)
        matched = at.denoiser.blocks[0].attn1.processor._matched
    assert set(matched) == {"cond", "uncond"}
    assert matched["cond"][2] is not matched["uncond"][2]


def test_blocks_are_chosen() -> None:
    assert list(merging(every=2).blocks(30)) == list(range(0, 30, 2))
    assert list(merging(last_block=27).blocks(30)) == list(range(28))
    assert list(merging(last_block=27).blocks(3)) == [0, 1, 2]
    at = target("tiny-wan", num_inference_steps=1)
    with changed(merging(every=2), at) as evidence:
        video(at)
    assert evidence()["blocks_merged"] == at.model.passes_per_step


def test_other_seeds_draw_other_destinations() -> None:
    at = target("tiny-wan", num_inference_steps=1)
    videos = []
    for seed in (0, 1):
        with changed(merging(seed=seed), at):
            videos.append(video(at))
    assert not np.array_equal(*videos)


# --- work -----------------------------------------------------------------------------------------------


def work(at: Target) -> Work:
    c = at.configuration
    point = Point(c.model, c.height, c.width, c.num_frames, c.num_inference_steps)
    return Work(at.model, c, features(ROOT, [point]))


def counted_flop(at: Target) -> int:
    """FLOP of one generation's denoiser calls, its attention made of matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    total, forward = 0, at.denoiser.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            result = forward(*args, **kwargs)
        total += counter.get_total_flops()
        return result

    at.denoiser.forward = count
    try:
        video(at)
    finally:
        del at.denoiser.forward
    return total


@every_model
@every_mode
@pytest.mark.parametrize(
    ("method", "other"),
    [
        ("3d", {}),
        ("attnbin", {"every": 2, "align": 16}),
        ("3d", {"match_every": 2, "metric": "head-mean"}),
    ],
    ids=str,
)
def test_flop_are_exactly_those_that_are_counted(
    key: str, mode: str, method: str, other: dict[str, Any]
) -> None:
    at = target(key, num_inference_steps=3, num_frames=13, height=64, width=48)
    settings, without = merging(mode=mode, method=method, **other), work(at)
    f = without.features
    attention = float((f.attention_flop + f.attention_narrow_flop)[0])
    dense = float(f.dense_flop[0])
    ratios = settings.work_ratios(without)
    with changed(settings, at):
        seen = counted_flop(at)
    assert seen == round(ratios["attention"] * attention + ratios["dense"] * dense)
    assert ratios["attention"] < 1


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
def test_the_baseline_that_ratios_are_of_is_what_is_counted(key: str) -> None:
    at = target(key, num_inference_steps=1)
    f = work(at).features
    assert counted_flop(at) == (f.attention_flop + f.attention_narrow_flop + f.dense_flop)[0]


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
def test_nothing_merged_is_no_change_of_work(key: str) -> None:
    ratios = merging(ratio=0.0).work_ratios(work(target(key)))
    assert dict(ratios) == {"attention": 1, "dense": 1, "traffic": 1}


@contextmanager
def bytes_moved() -> Iterator[list[int]]:
    """Bytes of floating-point values that operators read and write; of gathers, those of the rows moved.

    Matrix products count none, but their results are read by what comes next.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    moved = [0]

    def size(*values: Any) -> int:
        floats = (x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.is_floating_point())
        return sum(x.numel() * x.element_size() for x in floats)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if func.is_view or name in ("mm", "empty", "new_empty", "detach", "_unsafe_view"):
                return result
            if name == "index_select":
                moved[0] += 2 * size(result)
            elif name == "index_add_":  # the rows that are added, and theirs, read and written
                moved[0] += 3 * size(args[3])
            elif name == "index_copy_":
                moved[0] += 2 * size(args[3])
            elif name == "max":
                moved[0] += size(args[0])
            elif name.endswith("_"):  # in place: its operands, and its result
                moved[0] += size(args) + size(args[0])
            else:
                moved[0] += size(args, result)
            return result

    with Count():
        yield moved


@pytest.mark.parametrize("metric", ["hidden", "head-mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_matching_and_merging_are_those_of_the_operators(metric: str, dtype: Any) -> None:
    grid, heads, width, b = (4, 12, 12), 4, 256, dtype.itemsize
    settings = merging(metric=metric)
    sizes = settings.sizes(grid, 0)
    shape = Shape(width, width // heads, 0, 1, False, 1, b)
    values = random(1, sizes.tokens, width).to(dtype)
    cells = token_matching.cell_destinations(grid, settings.stride, torch.rand(3, sizes.destinations))[None]
    with bytes_moved() as moved:
        metric_values = values.unflatten(2, (heads, -1)).mean(2) if metric == "head-mean" else values
        norms = token_matching.row_norms(metric_values)
        merge = token_matching.match(metric_values, cells, sizes.merged, norms)
    # besides what is counted, some values a token: scores and norms
    assert moved[0] == pytest.approx(
        settings.matching_bytes(shape, sizes), rel=0.1 if metric == "hidden" else 0.3
    )
    assert moved[0] > settings.matching_bytes(shape, sizes)
    with bytes_moved() as moved:
        merged = merge.merge(values)
    assert moved[0] == pytest.approx(merge_bytes(sizes, width, b), rel=0.01)
    with bytes_moved() as moved:
        merge.unmerge(merged)
    assert moved[0] == 2 * b * sizes.tokens * width


@pytest.mark.parametrize("key", ["wan2.1-t2v-1.3b", "cogvideox-2b", "cogvideox-5b"])
def test_bytes_of_the_models_own_attention_are_those_of_a_trace(key: str) -> None:
    from t2v_energy.interventions.token_merging import _shape, attention_bytes
    from t2v_energy.work import trace, traffic_trace

    model = load_model(ROOT, key)
    shape, text = _shape(model), 0 if key.startswith("wan") else 8
    denoiser = traffic_trace._cast(trace.build_on_meta(model.components["transformer"]), torch.bfloat16)
    attn = blocks_of(denoiser)[0].attn1

    def moved(tokens: int) -> float:
        like = {"device": "meta", "dtype": torch.bfloat16}
        hidden = torch.empty(1, tokens, shape.width, **like)
        if not text:
            table = torch.empty(1, tokens, 1, shape.head, device="meta")
            return traffic_trace.counted(lambda: attn(hidden, None, None, (table, table))).bytes
        words = torch.empty(1, text, shape.width, **like)
        table = torch.empty(tokens, shape.head, device="meta")
        positions = (table, table) if shape.rotary else None
        return traffic_trace.counted(lambda: attn(hidden, words, image_rotary_emb=positions)).bytes

    each = (moved(3000) - moved(1000)) / 2000
    # The trace also counts what a stored tensor held before, tables, and a copy that a GPU's result spares.
    assert 0.65 * each < attention_bytes(shape) < each


# --- refusals, stacks, catalogue -------------------------------------------------------------------------


def refusal(settings: TokenMerging, key: str, **changes: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        settings.check(tiny.model(key), tiny.defaults(key, **changes))
    assert caught.value.where == "interventions"
    assert caught.value.remedy
    return caught.value


def test_what_does_not_fit_is_refused() -> None:
    assert "architecture 'mochi'" in refusal(merging(), "tiny-mochi").what
    assert "no token would be merged" in refusal(merging(ratio=0.0), "tiny-wan").what
    small = refusal(merging(stride=(1, 1, 1)), "tiny-wan", num_frames=1)  # every token is a destination
    assert "64x64, 1 frames" in small.what
    assert "mode q has no use" in refusal(merging(mode="q", size_bias=True), "tiny-wan").what
    with pytest.raises(UserError, match="architecture 'mochi'"):
        merging().apply(Target(None, tiny.model("tiny-mochi"), tiny.defaults("tiny-mochi")))


@pytest.mark.parametrize(
    "wrong", [{"ratio": 1.1}, {"stride": (0, 3, 3)}, {"method": "2d"}, {"every": 0}], ids=str
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        merging(**wrong)


def test_a_mask_is_refused() -> None:
    at = target("tiny-wan")
    with changed(merging(), at):
        attn = at.denoiser.blocks[0].attn1
        attn.processor.generation.grid = (3, 4, 4)
        with pytest.raises(UserError, match="has a mask"):
            attn(random(1, 48, 48), None, torch.ones(1, 48), None)


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
def test_twice_is_refused_and_leaves_the_first(key: str) -> None:
    at = target(key)
    with changed(merging(), at):
        first = dict(at.denoiser.attn_processors)
        with pytest.raises(UserError, match="merged already"):
            merging(every=2).apply(at)
        assert at.denoiser.attn_processors == first


def test_own_attention_does_not_push_another_intervention_out() -> None:
    at = target("tiny-wan", num_inference_steps=1)
    attn = at.denoiser.blocks[1].attn1
    original, calls = attn.processor, []

    class Other:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

    attn.set_processor(Other())
    try:
        with pytest.raises(UserError, match="mode kv replaces Other"):
            merging(mode="kv").apply(at)
        with changed(merging(), at):  # mode hidden goes on using it
            video(at)
        assert len(calls) == at.model.passes_per_step
    finally:
        attn.set_processor(original)


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
@every_mode
def test_fused_projections_give_the_same(key: str, mode: str) -> None:
    at = target(key, num_inference_steps=1)
    with changed(merging(mode=mode), at):
        separate = video(at)
    # diffusers' own undoing leaves its joined layers behind
    with changed(FusedQkv(), at), changed(merging(mode=mode), at) as evidence:
        fused = video(at)
    assert evidence()["tokens_merged"]
    np.testing.assert_allclose(fused, separate, rtol=1e-3, atol=1e-4)


def test_the_attention_backend_can_still_be_set() -> None:
    at = target("tiny-wan", num_inference_steps=1)
    attn = at.denoiser.blocks[0].attn1
    original = attn.processor
    with changed(merging(mode="kv"), at):
        at.denoiser.set_attention_backend("native")
        assert original._attention_backend == "native"
        video(at)
        at.denoiser.reset_attention_backend()
    assert original._attention_backend is None


def test_guidance_that_stops_leaves_the_matchings_of_their_branch() -> None:
    at = target("tiny-wan", num_inference_steps=4)
    without = Target(at.pipeline, at.model, at.configuration.model_copy(update={"guidance_scale": 1.0}))
    with changed(merging(match_every=2), at) as evidence:
        video(without)  # one call a step
    assert evidence() == {
        "tokens_merged": evidence()["tokens_merged"],
        "blocks_merged": 8,
        "matchings_made": 4,
    }


@pytest.mark.parametrize("key", ["tiny-wan", "tiny-cogvideox"])
@pytest.mark.parametrize("first", ["token-merging", "magcache"])
def test_it_works_with_blocks_that_are_skipped(key: str, first: str) -> None:
    from t2v_energy.interventions.taylorseer import TaylorSeer

    at = target(key, num_inference_steps=6)
    pair = [merging(match_every=2), TaylorSeer(interval=2, order=1, first_steps=1)]
    before = video(at)
    changes = [each.apply(at) for each in (pair if first == "token-merging" else pair[::-1])]
    both = video(at)
    found = {name: value for change in changes for name, value in change.evidence().items()}
    for change in reversed(changes):
        change.undo()
    assert 0 < found["blocks_merged"] < 6 * 2 * at.model.passes_per_step
    assert not np.array_equal(both, before)
    assert np.array_equal(video(at), before)


def test_compiled_blocks_break_their_graphs_for_it() -> None:
    from t2v_energy.interventions.compiled import Compile, _is_plain

    at = target("tiny-wan")
    blocks = blocks_of(at.denoiser)
    with changed(merging(every=2), at):
        assert [_is_plain(block) for block in blocks] == [False, True]
    assert all(map(_is_plain, blocks))
    with changed(Compile(), at), pytest.raises(UserError, match="compiled already") as caught:  # type: ignore[arg-type]
        merging().apply(at)
    assert caught.value.remedy == "list it before the compilation"


def test_needs_no_torch_before_it_is_applied() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers')));"
        f"sys.path.insert(0, {str(ROOT / 'workflow')!r});"
        "from pathlib import Path; from t2v_energy.interventions import catalogue;"
        f"print(sum(name.startswith('tome-') for name in catalogue(Path({str(ROOT)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 24


def name_of(settings: TokenMerging) -> str:
    """The name that the catalogue gives to settings."""
    blocks = (
        "alt" if settings.every == 2 else "all" if settings.last_block is None else f"to{settings.last_block}"
    )
    parts = [
        "tome",
        settings.method,
        *([settings.mode] if settings.mode != "hidden" else []),
        f"r{settings.ratio * 100:.0f}",
        "s" + "x".join(map(str, settings.stride)),
        blocks,
        *([f"k{settings.match_every}"] if settings.match_every > 1 else []),
        *(["hm"] if settings.metric == "head-mean" else []),
        *([f"a{settings.align}"] if settings.align > 1 else []),
    ]
    return "-".join(parts)


def test_names_say_the_settings_and_the_projects_grid_is_whole() -> None:
    entries = {k: v for k, v in catalogue(ROOT).items() if isinstance(v, TokenMerging)}
    assert {name: name_of(settings) for name, settings in entries.items()} == {n: n for n in entries}
    grid = {
        name_of(merging(method=method, ratio=ratio, stride=stride, **blocks))
        for method in METHODS
        for ratio in (0.3, 0.5)
        for stride in STRIDES
        for blocks in ({"every": 2}, {"last_block": 27})
    }
    assert len(grid) == 24
    assert grid <= set(entries)


def test_the_experiment_measures_the_grid_beside_baselines() -> None:
    import yaml

    text = (ROOT / "config" / "experiments" / "token-merging.yaml").read_text(encoding="utf-8")
    listed: dict[str, list[str]] = {}
    for entry in yaml.safe_load(text)["vary"]:
        names = entry.get("interventions", [])
        listed.setdefault(entry["model"], []).extend(names or ["baseline"])
        c = Configuration(
            **{name: entry[name] for name in ("model", "height", "width", "num_frames")},
            num_inference_steps=50,
            guidance_scale=6.0,
        )
        for known in named(ROOT, names, "the experiment"):
            known.intervention.check(load_model(ROOT, entry["model"]), c)
    grid = [name for name in catalogue(ROOT) if name.startswith("tome-") and name.endswith(("alt", "to27"))]
    assert len(grid) == 24
    assert set(grid) <= set(listed["cogvideox-2b"])
    assert all(names.count("baseline") == 1 and len(set(names)) == len(names) for names in listed.values())


def test_it_is_applied_through_the_catalogue() -> None:
    at = target("tiny-cogvideox", num_inference_steps=1)
    with applied(named(ROOT, ["tome-3d-r50-s2x3x3-all"], "test"), at) as now:
        video(at)
        now.check()
        assert now.evidence()["tome-3d-r50-s2x3x3-all"]["tokens_merged"] > 0
