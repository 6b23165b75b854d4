"""Context parallel: several GPUs share each call of the denoiser, each with a part of the video's tokens.

Ulysses (Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509), as diffusers has it: outside self-attention
every rank works on its own tokens; for self-attention an all-to-all gives each rank all tokens of its own
heads, and another one gives the tokens back.  Only the denoiser is shared.  Text encoder and VAE run on the
first GPU while the others wait, and draw what a waiting GPU draws.

The first rank is the process that measures; the others are processes that it starts
(:mod:`t2v_energy.interventions.context_ranks`), each on a GPU of its own.  The runner meters all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from t2v_energy.interventions.base import Change, Effect, Expected, Intervention, Target, Work, WorkClass

if TYPE_CHECKING:
    from t2v_energy.config import Configuration, ModelFile

ARCHITECTURES = ("wan",)
KERNELS = (None, "cudnn", "flash", "efficient", "math")
"""Attention kernels that the further ranks can be held to as well; SageAttention was not tried."""
EXCHANGES = 4
"""All-to-alls of a self-attention: queries, keys, values, and its results."""
COPIES = 5
"""Of these, rearranged in memory: each once before it is sent, the results once more when they have come."""
BYTES = 2
"""Of a number: the stream is in bfloat16."""
ALONE = "the further ranks run the denoiser as it was built, and would not have this change"


class ExpectedLink(Expected):
    """What no count gives, with the speed of the link between the GPUs."""

    link_GB_per_s: float = Field(
        gt=0, description="[GB/s] what a GPU can send to the others: the link's peak"
    )


class ContextParallel(Intervention):
    """Several GPUs share every call of the denoiser."""

    kind: ClassVar[str] = "context-parallel"
    lossless: ClassVar[bool] = True
    not_with: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "compile", "fp8", "int8", "fused-qkv", "layerwise-casting", "token-alignment", "token-merging",
            "pyramid-attention-broadcast", "magcache", "taylorseer",
        ),
        ALONE,
    )  # fmt: skip

    degree: int = Field(2, ge=2, description="GPUs that share a call; divides the heads and the tokens")
    expected: ExpectedLink = Field(description="speed of the link, and powers that no count of work gives")

    @property
    def further_boards(self) -> int:
        return self.degree - 1

    def check(self, model: ModelFile, configuration: Configuration) -> None:
        from t2v_energy.interventions.token_alignment import attended_tokens

        if model.architecture not in ARCHITECTURES:
            raise self.refused(
                f"how {model.architecture} is split is not in diffusers, or was not tried here",
                f"use a model of {', '.join(ARCHITECTURES)}",
            )
        if configuration.attention_kernel not in KERNELS:
            raise self.refused(
                f"attention_kernel {configuration.attention_kernel!r} was not tried on several ranks",
                "leave attention_kernel out",
            )
        heads = model.components[model.denoiser_part].config["num_attention_heads"]
        tokens = attended_tokens(model, configuration)
        for what, count in (("heads", heads), ("tokens", tokens)):
            if count % self.degree:
                raise self.refused(
                    f"{count} {what} do not divide by {self.degree}",
                    "set another `degree`, or another size" if what == "tokens" else "set another `degree`",
                )

    def apply(self, target: Target) -> Change:
        """Start the further ranks and share every call with them from now on.

        Raises:
            UserError: on a GPU, too few others are reserved for it; a rank does not come up; something else
                has changed the denoiser.
        """
        from t2v_energy.interventions.context_ranks import Ranks
        from t2v_energy.interventions.token_alignment import attended_tokens

        if target.device == "cuda" and len(target.further_boards) < self.further_boards:
            raise self.refused(
                f"it needs {self.degree} GPUs, and {1 + len(target.further_boards)} are at hand",
                "measure it on a host with more, or set a lower `degree`",
            )
        ranks = Ranks.started(target, self.degree)
        share = attended_tokens(target.model, target.configuration) // self.degree

        def evidence() -> Mapping[str, float]:
            calls = float(ranks.calls_of_each(share))
            return {
                "ranks": float(self.degree) if calls else 0.0,
                "calls_of_each_rank": calls,
                "tokens_of_each_rank": float(share) if calls else 0.0,
            }

        return Change(ranks.end, evidence)

    def work_ratios(self, work: Work) -> Mapping[WorkClass, float]:
        """Work of all ranks together: what each of them repeats, what is rearranged, and what is sent.

        A byte that is sent counts as the bytes of memory that take as long, by the peaks of both.  Arguments
        and results of calls are sent as well: below a hundredth of what attention exchanges, left out.
        """
        from t2v_energy.interventions.compiled import with_added_traffic

        values = _stream_values(work)
        sent = EXCHANGES * BYTES * values * (self.degree - 1) / self.degree
        rearranged = COPIES * 2 * BYTES * values
        slower = work.bandwidth_TB_per_s * 1000 / self.expected.link_GB_per_s
        dense = float(work.features.dense_flop[0])
        repeated = (self.degree - 1) * _repeated_flop(work)
        return {
            "dense": 1 + repeated / dense,
            **with_added_traffic(work, rearranged + sent * slower),
        }

    def effect(self, work: Work) -> Effect:
        """Each rank's part of the denoiser's work at the same time, at the power of as many boards."""
        shared: dict[WorkClass, float] = dict.fromkeys(("attention", "dense", "traffic"), float(self.degree))
        of_all = Effect(self.work_ratios(work), rate=shared, power=shared)
        return of_all.then(Effect(rate=self.expected.rate, power=self.expected.power))


def _stream_values(work: Work) -> float:
    """Values of the stream (tokens × width) that go through self-attention, over all layers and calls."""
    config = work.model.components[work.model.denoiser_part].config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = float(work.features.tokens[0]) * work.model.batch_per_pass
    return float(work.features.calls[0]) * config["num_layers"] * width * tokens


def _repeated_flop(work: Work) -> float:
    """Matrix products that every rank does in full: embeddings, and keys and values of the text."""
    from t2v_energy.work import wan

    config = work.model.components[work.model.denoiser_part].config
    text, width = work.model.longest_prompt, wan.width(config)
    counts = wan.forward_flop(config, int(work.features.tokens[0]), text)
    keys_and_values = config["num_layers"] * 4 * text * width**2
    return float(work.features.calls[0]) * (counts["embeddings"] + counts["timestep_mlp"] + keys_and_values)
