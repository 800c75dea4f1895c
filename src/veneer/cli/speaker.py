"""A loaded model that answers messages: what ``chat`` and ``generate`` share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.adapters import AdaptedModel
    from veneer.data import Conversation
    from veneer.generate import Generation, Memory
    from veneer.models import Base


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the names are those of ``veneer.generate``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch_size: int = 32


class Speaker:
    """A model with its tokenizer, its chat template and its stop tokens.

    Attributes:
        has_adapter: False for a base.
        system: the system message of every row that the run was trained on; None where there is none such.
        single_turn: the run was trained on conversations of one answer each.
    """

    def __init__(
        self,
        model: Base | AdaptedModel,
        base: Base,
        chat_template: str | None,
        system: str | None = None,
        single_turn: bool = False,
    ) -> None:
        self.model, self.base, self.chat_template = model, base, chat_template
        self.has_adapter = model is not base
        self.system, self.single_turn = system, single_turn

    def render(self, conversation: Conversation) -> list[int]:
        """Token ids of the conversation up to its last assistant turn, with the template's opening of an answer.

        Raises:
            DataError: the template refuses the conversation.
        """
        from veneer.data import render_prompt

        return render_prompt(conversation, self.base.tokenizer, self.chat_template).prompt_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without any template."""
        ids: list[int] = self.base.tokenizer(text)["input_ids"]
        return ids

    def answer(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        adapter: bool = True,
        on_text: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        memory: Memory | None = None,
    ) -> list[Generation]:
        """Answers in the order of ``prompts``.

        Args:
            adapter: False turns the adapter off, which is the base.
            on_text: gets the text of a single answer as it comes.
            progress: gets the number of answers done, and of all.
            memory: of a single conversation, so that what was said before is not computed again.
        """
        from veneer.data import stop_token_ids
        from veneer.generate import default_stop_ids, generate

        stops = default_stop_ids(self.base.module, self.base.tokenizer)
        if self.chat_template is not None:
            stops |= stop_token_ids(self.base.tokenizer, self.chat_template)
        off = contextlib.nullcontext() if adapter or not self.has_adapter else self.model.disabled()  # type: ignore[union-attr]  # has_adapter
        with off:
            return generate(
                self.model,
                prompts,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                stop=sampling.stop,
                batch_size=sampling.batch_size,
                stop_token_ids=stops,
                on_text=on_text,
                progress=progress,
                memory=memory,
            )


def open_speaker(spec: str, *, dtype: str, device: str, base: str | None, allow_base_mismatch: bool) -> Speaker:
    """Loads what ``spec`` stands for; a run brings the chat template and system message it was trained with.

    Raises:
        VeneerError: as ``load_model``.
    """
    from veneer.adapters import AdaptedModel
    from veneer.models import Base
    from veneer.run import is_run, load_model, open_run

    model = load_model(spec, dtype=dtype, device=device, base=base, allow_base_mismatch=allow_base_mismatch)
    if not isinstance(model, AdaptedModel):
        return Speaker(model, model, None)
    assert isinstance(model.base, Base)  # load_model puts adapters on what load_base returned
    if not is_run(spec):
        return Speaker(model, model.base, None)
    run = open_run(spec)
    rows = run.info.get("data", {}).get("train") or {}
    system, single_turn = rows.get("system"), bool(rows.get("single_turn"))
    return Speaker(model, model.base, run.recipe.data.chat_template, system, single_turn)
