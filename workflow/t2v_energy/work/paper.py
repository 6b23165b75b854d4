"""The study's formulas and constants as printed (section 3, appendix A, tables 1, 5 and 6).

They describe "Wan2.1-T2V-1.3B" with N = 32, d = 2048, f = 4, which are the defaults of Wan's model class and
not the published checkpoint (30, 1536, 5.83): nothing here is corrected.  Where the text leaves a choice:

* Peak throughput.  Section 3.4 prints 989 TFLOP/s and table 5 "989×10^15 FLOP/s"; the former is meant.
* F_τ.  Equation 10 already holds the factor gS and section 3.4 multiplies by it again.  Table 1 lists F_τ
  without it, "to be multiplied by gS": it is counted once for each pass.
* Residual blocks of the VAE.  Table 6 has one row for each stage's residual blocks ("RBs"), and table 5
  counts 11 convolutions, its rows; the text says "three per stage", and "two residual 3×3×3 convolutions"
  in the middle.  A residual block has two convolutions, so the rows D1, D2 and D3 stand for six and the
  middle row for two; of a row whose channels change (D2, 192 → 384) only the first convolution takes the
  smaller number.  Reading every row once would give 1.2e14 FLOP in place of 4.2e14 for 81 frames of
  720×1280, against 1.8e17 for the whole video; the latency moves by less than 0.2 %.
* Sizes.  ⌈T/4⌉ and ⌈T/2⌉ are rounded up as table 6 prints them; ℓ, H/8 and W/8 are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

# Table 5
GUIDANCE_PASSES = 2  # g
LAYERS = 32  # N
WIDTH = 2048  # d
MLP_EXPANSION = 4  # f
TEXT_TOKENS = 512  # m
TEXT_PASSES = 2  # p_text
TEXT_WIDTH = 4096  # d_text
TEXT_LAYERS = 24  # L_text
TEXT_EXPANSION = 2.5  # f_text
TIMESTEP_WIDTH = 256  # d_τ
TEMPORAL_FACTOR = 4  # v_t
SPATIAL_FACTOR = 8  # v_s
PATCH = 2  # p_h, p_w
LATENT_CHANNELS = 16  # z
MIDDLE_CHANNELS = 384  # C_*
EFFICIENCY = 0.456  # µ
PEAK_FLOP_PER_S = 989e12  # Θ_peak
MAX_POWER_W = 700.0  # P_max

# Appendix A.8, see the module's text
MIDDLE_CONVOLUTIONS = 2
STAGE_CONVOLUTIONS = 3 * 2


def token_length(height: float, width: float, num_frames: int) -> float:
    """Token length ℓ = (1 + T/4)(H/16)(W/16), not rounded (eq. 1)."""
    side = SPATIAL_FACTOR * PATCH
    return (1 + num_frames / TEMPORAL_FACTOR) * (height / side) * (width / side)


def self_attention_flop(length: float) -> float:
    """F_self of one pass, projections included (eq. 3)."""
    return LAYERS * (8 * length * WIDTH**2 + 4 * length**2 * WIDTH)


def cross_attention_flop(length: float) -> float:
    """F_cross of one pass, projections included (eq. 5)."""
    text = TEXT_TOKENS
    return LAYERS * (4 * length * WIDTH**2 + 4 * text * WIDTH**2 + 4 * length * text * WIDTH)


def attention_product_flop(length: float) -> float:
    """The part of eqs. 3 and 5 that is QKᵀ and AV, one pass."""
    return LAYERS * 4 * length * (length + TEXT_TOKENS) * WIDTH


def mlp_flop(length: float) -> float:
    """F_mlp of one pass (eq. 6)."""
    return LAYERS * 4 * MLP_EXPANSION * length * WIDTH**2


def timestep_flop() -> float:
    """F_τ of one pass (table 1; eq. 10 without its gS)."""
    return 2 * TIMESTEP_WIDTH * WIDTH + 14 * WIDTH**2


def text_encoder_flop() -> float:
    """F_text of one video, both passes (eq. 9)."""
    m, d = TEXT_TOKENS, TEXT_WIDTH
    layer = 8 * m * d**2 + 4 * m**2 * d + 4 * TEXT_EXPANSION * m * d**2
    return TEXT_PASSES * TEXT_LAYERS * layer


@dataclass(frozen=True)
class PrintedConvolution:
    """One row of table 6, or a part of one: ``count`` convolutions over ``frames`` × ``pixels`` positions.

    ``row`` is the row's name as printed; where two rows have one name, a number follows.
    """

    row: str
    kernel: tuple[int, int, int]
    inputs: int
    outputs: int
    frames: int
    pixels: float
    count: int = 1

    @property
    def flop(self) -> float:
        """FLOP of one of them (eq. 11)."""
        taps = self.kernel[0] * self.kernel[1] * self.kernel[2]
        return 2 * taps * self.inputs * self.outputs * self.frames * self.pixels


def vae_convolutions(height: float, width: float, num_frames: int) -> tuple[PrintedConvolution, ...]:
    """The convolutions of table 6, in its order, with the counts that the module's text explains.

    The row "D2 (RBs)" gives two parts: the convolution that widens, and the others.
    """
    latent, half, full = ceil(num_frames / 4), ceil(num_frames / 2), num_frames
    eighth, quarter = height * width / 64, height * width / 16
    second, whole = height * width / 4, height * width
    z, c = LATENT_CHANNELS, MIDDLE_CHANNELS
    block, time, space = (3, 3, 3), (3, 1, 1), (1, 3, 3)
    rows = (
        ("D0", block, z, c, latent, eighth, 1),
        ("Middle (RBs)", block, c, c, latent, eighth, MIDDLE_CONVOLUTIONS),
        ("D1 (RBs)", block, c, c, latent, eighth, STAGE_CONVOLUTIONS),
        ("Up (time) 1", time, c, 2 * c, half, eighth, 1),
        ("Up (space) 1", space, c, c // 2, half, quarter, 1),
        ("D2 (RBs)", block, c // 2, c, half, quarter, 1),
        ("D2 (RBs)", block, c, c, half, quarter, STAGE_CONVOLUTIONS - 1),
        ("Up (time) 2", time, c, 2 * c, full, quarter, 1),
        ("Up (space) 2", space, c, c // 2, full, second, 1),
        ("D3 (RBs)", block, c // 2, c // 2, full, second, STAGE_CONVOLUTIONS),
        ("Up (space) 3", space, c // 2, c // 4, full, whole, 1),
        ("Head", block, c // 4, 3, full, whole, 1),
    )
    return tuple(PrintedConvolution(*row) for row in rows)


def vae_convolution_flop(height: float, width: float, num_frames: int) -> float:
    """F_VAE,conv of one video: eq. 11 over the rows of table 6."""
    return sum(row.count * row.flop for row in vae_convolutions(height, width, num_frames))


def vae_attention_flop(height: float, width: float, num_frames: int) -> float:
    """F_VAE,mid-attn of one video (eqs. 12 and 13): 2-D attention in each of ⌈T/4⌉ latent frames."""
    c, length = MIDDLE_CHANNELS, height * width / SPATIAL_FACTOR**2
    return ceil(num_frames / TEMPORAL_FACTOR) * (8 * c**2 * length + 4 * length**2 * c)


def latency_s(total_flop: float) -> float:
    """D_total = F_total / (µ Θ_peak), in seconds on the study's H100 (section 3.4)."""
    return total_flop / (EFFICIENCY * PEAK_FLOP_PER_S)


def energy_Wh(total_flop: float) -> float:
    """E_total = P_max · D_total, in watt-hours (section 3.5)."""
    return MAX_POWER_W * latency_s(total_flop) / 3600
