"""How each architecture calls its denoiser: from a model file and a latent to the closed forms' arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from t2v_energy.errors import UserError
from t2v_energy.work import animatediff, cogvideox, contentv, ltx, mochi, wan

if TYPE_CHECKING:  # the formulas do not need the configuration's machinery, only its fields
    from t2v_energy.config import ModelFile

Latent = tuple[int, int, int]
"""Frames, rows and columns."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser, all samples of its batch (with guidance, a call may have two).

    Attributes:
        flop: FLOP by operator.
        tokens: sequence length of each sample.
        attention_flop: QKᵀ and PV alone (FLOP).
    """

    flop: Mapping[str, int]
    tokens: int
    attention_flop: int

    def times(self, count: int) -> Call:
        """``count`` of them."""
        flop = {operator: count * n for operator, n in self.flop.items()}
        return Call(flop, self.tokens, count * self.attention_flop)


class Denoiser(Protocol):
    """What an architecture says of its denoiser."""

    part: ClassVar[str]
    """Its name among the model file's components."""

    def patch_sides(self, model: ModelFile) -> tuple[int, int]:
        """Rows and columns of the latent that cannot be cut."""

    def call(self, model: ModelFile, latent: Latent, prompt_tokens: int | None) -> Call:
        """One call on ``latent`` with the batch that the model file says; see :func:`valid_tokens`."""

    def sample_bytes(self, model: ModelFile, latent: Latent, bytes_per_value: int) -> int:
        """Rough peak of live activations of one sample of the batch (bytes)."""


class Stream(Protocol):
    """Closed forms of a transformer that treats all samples alike; ``config`` is its component's."""

    def patch_sides(self, config: Mapping[str, Any]) -> tuple[int, int]: ...

    def token_count(self, config: Mapping[str, Any], frames: int, rows: int, columns: int) -> int: ...

    def forward_flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> dict[str, int]: ...

    def attention_product_flop(self, config: Mapping[str, Any], tokens: int, text_tokens: int) -> int: ...

    def activation_bytes(self, config: Mapping[str, Any], tokens: int, bytes_per_value: int) -> int: ...


@dataclass(frozen=True)
class Transformer:
    """A denoiser whose text is one sequence with the video (``joint``), or is attended to by the video.

    ``tokenizers`` are those whose lengths add up to the text's: of Stable Diffusion 3's three, the two of
    CLIP share their tokens, which are as wide as both together, and T5's come after them.
    """

    form: Stream
    joint: bool
    tokenizers: tuple[str, ...] = ("tokenizer",)
    part: ClassVar[str] = "transformer"

    def patch_sides(self, model: ModelFile) -> tuple[int, int]:
        return self.form.patch_sides(model.components[self.part].config)

    def call(self, model: ModelFile, latent: Latent, prompt_tokens: int | None) -> Call:
        config, text_tokens = model.components[self.part].config, self._text_tokens(model)
        tokens = self.form.token_count(config, *latent)
        flop = self.form.forward_flop(config, tokens, text_tokens)
        products = self.form.attention_product_flop(config, tokens, text_tokens)
        return Call(flop, tokens, products).times(model.batch_per_pass)

    def sample_bytes(self, model: ModelFile, latent: Latent, bytes_per_value: int) -> int:
        config = model.components[self.part].config
        tokens = self.form.token_count(config, *latent) + self.joint * self._text_tokens(model)
        return self.form.activation_bytes(config, tokens, bytes_per_value)

    def _text_tokens(self, model: ModelFile) -> int:
        return sum(padded_tokens(model, name) for name in self.tokenizers)


@dataclass(frozen=True)
class Mochi:
    """A denoiser that drops what is padding: its work depends on the prompt."""

    part: ClassVar[str] = "transformer"

    def patch_sides(self, model: ModelFile) -> tuple[int, int]:
        return mochi.patch_sides(model.components[self.part].config)

    def call(self, model: ModelFile, latent: Latent, prompt_tokens: int | None) -> Call:
        config, valid = model.components[self.part].config, valid_tokens(model, prompt_tokens)
        tokens = mochi.token_count(config, *latent)
        flop = mochi.forward_flop(config, tokens, model.tokenizer.max_length, valid)
        return Call(flop, tokens, mochi.attention_product_flop(config, tokens, valid))

    def sample_bytes(self, model: ModelFile, latent: Latent, bytes_per_value: int) -> int:
        config = model.components[self.part].config
        tokens = mochi.token_count(config, *latent) + model.tokenizer.max_length
        return mochi.activation_bytes(config, tokens, bytes_per_value)


@dataclass(frozen=True)
class UNet:
    """A U-Net with motion modules; its latent is not cut into patches."""

    part: ClassVar[str] = "unet"

    def patch_sides(self, model: ModelFile) -> tuple[int, int]:
        return 1, 1

    def call(self, model: ModelFile, latent: Latent, prompt_tokens: int | None) -> Call:
        animatediff.motion_settings(model.components["motion_adapter"].config)  # is it one that is counted?
        config, text_tokens = model.components[self.part].config, model.tokenizer.max_length
        flop = animatediff.forward_flop(config, *latent, text_tokens)
        products = animatediff.attention_product_flop(config, *latent, text_tokens)
        _, rows, columns = latent
        return Call(flop, rows * columns, products).times(model.batch_per_pass)

    def sample_bytes(self, model: ModelFile, latent: Latent, bytes_per_value: int) -> int:
        return animatediff.activation_bytes(model.components[self.part].config, *latent, bytes_per_value)


DENOISERS: Mapping[str, Denoiser] = {
    "wan": Transformer(wan, joint=False),
    "cogvideox": Transformer(cogvideox, joint=True),
    "ltx": Transformer(ltx, joint=False),
    "mochi": Mochi(),
    "animatediff": UNet(),
    "contentv": Transformer(contentv, joint=True, tokenizers=("tokenizer", "tokenizer_3")),
}


def denoiser(model: ModelFile) -> Denoiser:
    """What the model's architecture says of its denoiser.

    Raises:
        UserError: no closed form for the architecture.
    """
    try:
        return DENOISERS[model.architecture]
    except KeyError:
        raise UserError(
            f"there is no count of operations for the architecture {model.architecture!r}",
            where=f"config/models/{model.key}.yaml, architecture",
            remedy=f"use {', '.join(DENOISERS)}, or add its closed form to workflow/t2v_energy/work/",
        ) from None


def padded_tokens(model: ModelFile, tokenizer: str) -> int:
    """Tokens that ``tokenizer`` pads prompts to; raises :class:`UserError` where the file does not say."""
    if tokenizer not in model.tokenizers:
        raise UserError(
            f"the length of {tokenizer} is not given",
            where=f"config/models/{model.key}.yaml, other_tokenizers",
            remedy=f"give {tokenizer}: {{vocab_size: …, max_length: …}}",
        )
    return model.tokenizers[tokenizer].max_length


def valid_tokens(model: ModelFile, prompt_tokens: int | None) -> list[int]:
    """Text tokens that are no padding, of each sample of a call: the negative prompt's, then the prompt's.

    An unknown prompt (None) counts as one that fills the padded length; so does a negative prompt, but for
    the empty one, which is its end token.

    Raises:
        UserError: ``prompt_tokens`` below one or above the padded length.
    """
    padded = model.tokenizer.max_length
    if prompt_tokens is not None and not 1 <= prompt_tokens <= padded:
        raise UserError(
            f"prompt_tokens is {prompt_tokens}; {model.key} pads and cuts prompts to {padded} tokens",
            remedy=f"give 1 to {padded}",
        )
    prompt = padded if prompt_tokens is None else prompt_tokens
    negative = padded if model.negative_prompt else 1
    return [negative, prompt][-model.batch_per_pass :]
