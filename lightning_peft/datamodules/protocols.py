"""What a benchmark pins beside its data: the protocol.

Templates, which tokens carry loss, length limits and decoding change results more than most methods
do. A :class:`Protocol` writes them down under one name, which is stamped into every result. Each
benchmark's file holds its own protocols; the texts that several of them share stand here.

Two rules hold for every protocol, and differ from the published code:

* A prompt over the limit is cut from the left and its response never; LLM-Adapters cuts from the
  right, so that a long prompt loses its answer.
* The limit holds for test prompts too, so that a model is asked in the form it was trained on; the
  published evaluators do not cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_peft.errors import UserError

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:"


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked and answered.

    Attributes:
        name: Under which it is chosen and stamped; ends in ``-ours`` where nothing was published.
        template: The prompt; ``{instruction}`` stands for the record's text.
        loss_on: ``response`` (and its EOS), or ``all`` for the prompt too.
        max_length: Limit in tokens: BOS, prompt, response and EOS together.
        max_new_tokens: Most tokens that are generated for an answer.
        num_beams: Beams; 1 is greedy or sampled, by ``temperature``.
        temperature: 0 decodes without sampling.
        stop: Texts at which generation ends, beside EOS.
        extraction: How an answer is found in an output, in words: part of the stamp.
    """

    name: str
    template: str
    loss_on: Literal["response", "all"]
    max_length: int
    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    extraction: str = "the whole output"

    def __str__(self) -> str:
        """Say in one line what is done, as a run prints it."""
        how = f"sampled at {self.temperature:g}" if self.temperature else "greedy"
        how = f"by {self.num_beams} beams" if self.num_beams > 1 else how
        stop = f", {len(self.stop)} stop texts" if self.stop else ""
        on = "the whole text" if self.loss_on == "all" else "the response"
        return (
            f"{self.name}: loss on {on}, {self.max_length} tokens; answers {how}, at most "
            f"{self.max_new_tokens} tokens{stop}; {self.extraction}"
        )

    def prompt(self, instruction: str) -> str:
        """Write the prompt for one instruction (which may hold braces).

        Raises:
            UserError: If the template has no place for it.
        """
        if "{instruction}" not in self.template:
            raise UserError(
                f"The template of the protocol {self.name!r} has no place for {{instruction}}: "
                f"{self.template!r}."
            )
        return self.template.replace("{instruction}", instruction)


@dataclass(frozen=True)
class PairProtocol:
    """How texts are put before a model.

    Attributes:
        name: Stamped into results; ends in ``-ours`` where pairs are joined by our template.
        template: ``{first}`` and ``{second}`` in our template, else None.
        max_length: Limit in tokens, special ones included.
    """

    name: str
    template: str | None
    max_length: int

    def __str__(self) -> str:
        """Say in one line what is done, as a run prints it."""
        how = "the tokenizer's own encoding" if self.template is None else repr(self.template)
        return f"{self.name}: {how}, {self.max_length} tokens"


def indented(template: str, spaces: int = 16) -> str:
    """Indent every line after the first, empty ones excepted, as LLM-Adapters does by accident.

    Its prompt is an indented triple-quoted string, so an instruction's own line breaks are not
    indented, and a template that ends in a line break ends in the spaces.
    """
    first, *rest = template.split("\n")
    *inner, last = (" " * spaces + line for line in rest)
    return "\n".join([first, *(line if line.strip() else "" for line in inner), last])
