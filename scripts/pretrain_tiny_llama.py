"""Pre-trains the LLaMA that `lightning_peft` embeds for tests and offline examples.

The result is a real `LlamaForCausalLM` of about 0.85 M parameters with a byte-level tokenizer. It
knows two things, which is what makes fine-tuning and pruning measurable without a network:

* addition of three-digit numbers (``"042+917="`` -> ``"0959"``);
* copying one of the labels that a prompt lists (``"... kvot1/kvot2 ..."`` -> ``"kvot2"``), the
  induction that any pre-trained language model has; at the end also in a sentence
  (``"my final label would be kvot2"``), as a model that has been instructed would answer.

All data are drawn from the seed; nothing is downloaded. Usage::

    python scripts/pretrain_tiny_llama.py --output lightning_peft/assets/tiny_llama
"""

from __future__ import annotations

import argparse
import math
import os
import random
import string
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
BYTE_OFFSET = 3
MAX_OPERAND = 1000
HELD_OUT = 2000
LONGEST_PROMPT = 640
# The sentences of the last phase: one of each, in this order, and then the label. What the tasks
# under `configs` answer with, "the correct answer is", is left out, so that it has to be learnt.
SENTENCE = (
    ("the", "my", "our", "a", "this", "one", "that", "your"),
    ("correct", "right", "best", "final", "only", "proper", "likely", "chosen", "good", "true"),
    ("answer", "choice", "label", "result", "reply", "word", "pick", "name", "guess", "option"),
    ("is", "was", "will be", "would be", "must be", "seems", "reads"),
)
LEFT_OUT = "the correct answer is"


@dataclass(frozen=True)
class Phase:
    """One phase of the training, with an optimiser and a learning-rate schedule of its own.

    Attributes:
        steps: Optimiser steps.
        horizon: Steps that the schedules of the phase are laid out for; with more than it has,
            it ends before the learning rate has come down.
        peak: Peak learning rate.
        additions: Additions per step.
        copied: Tokens of copying per step. The batch shrinks as its prompts grow, so that steps
            cost about the same.
        unrelated: Share of the label lists that are unrelated words.
        echoes: Share of texts to repeat at the start, which fades over the first half.
        shuffled: Whether these are lists to repeat in another order.
        curriculum: Whether to begin with short prompts.
        sentences: Share of the labels that are named in a sentence.
        longest: Longest prompts, in bytes.
    """

    steps: int
    horizon: int
    peak: float
    additions: int
    copied: int
    unrelated: float
    echoes: float
    shuffled: bool = False
    curriculum: bool = False
    sentences: float = 0.0
    longest: int = LONGEST_PROMPT


@dataclass(frozen=True)
class ChoiceExample:
    """One prompt of the copying task.

    Attributes:
        prompt: The prompt, which lists the labels.
        labels: The listed labels.
        target: The label to name.
        induced: Span of the list that its first label predicts (empty for unrelated labels).
    """

    prompt: str
    labels: list[str]
    target: str
    induced: tuple[int, int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the byte-level tokenizer: three special tokens, then the 256 bytes in order."""
    # GPT-2's alphabet: bytes without a visible character are shown as code points from 256 on.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (chr(256 + index) for index in range(256))
    alphabet = [chr(byte) if byte in visible else next(hidden) for byte in range(256)]
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_model(vocabulary_size: int) -> LlamaForCausalLM:
    """Builds the untrained model; grouped-query attention makes k and v narrower than q."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def encode(text: str) -> list[int]:
    """Encodes text as the tokenizer would, without its overhead."""
    return [BYTE_OFFSET + byte for byte in text.encode()]


def encode_additions(pairs: np.ndarray) -> Tensor:
    """Writes operand pairs `(n, 2)` as token rows ``aaa+bbb=cccc</s>``."""
    left, right = pairs[:, 0], pairs[:, 1]
    zero = BYTE_OFFSET + ord("0")
    columns = [zero + left // power % 10 for power in (100, 10, 1)]
    columns.append(np.full_like(left, BYTE_OFFSET + ord("+")))
    columns += [zero + right // power % 10 for power in (100, 10, 1)]
    columns.append(np.full_like(left, BYTE_OFFSET + ord("=")))
    columns += [zero + (left + right) // power % 10 for power in (1000, 100, 10, 1)]
    columns.append(np.full_like(left, EOS))
    return torch.from_numpy(np.stack(columns, axis=1))


def hold_out(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws the pairs `(HELD_OUT, 2)` that no training sees, and the mask that tells them."""
    chosen = rng.choice(MAX_OPERAND**2, size=HELD_OUT, replace=False)
    held_out = np.zeros(MAX_OPERAND**2, dtype=bool)
    held_out[chosen] = True
    return np.stack([chosen // MAX_OPERAND, chosen % MAX_OPERAND], axis=1), held_out


def draw_pairs(rng: np.random.Generator, count: int, held_out: np.ndarray) -> np.ndarray:
    """Draws `count` operand pairs, none of which is held out.

    A quarter of them are biased towards digits that sum to nine: long carries are what is learnt
    last, and they are rare among uniform pairs.
    """
    pairs = rng.integers(0, MAX_OPERAND, size=(count + 32, 2))
    hard = rng.random(len(pairs)) < 0.25
    digits = pairs[:, :1] // np.array([100, 10, 1]) % 10
    nines = ((9 - digits) * np.array([100, 10, 1])).sum(axis=1)
    kept = rng.choice(np.array([1, 10, 100]), size=len(pairs))
    nudged = nines - nines // kept % 10 * kept + rng.integers(0, 10, size=len(pairs)) * kept
    pairs[:, 1] = np.where(hard, nudged, pairs[:, 1])
    allowed = ~held_out[pairs[:, 0] * MAX_OPERAND + pairs[:, 1]]
    return pairs[allowed][:count]


def word(rng: random.Random, shortest: int = 1, longest: int = 9) -> str:
    """Draws a word of random lowercase letters."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))


def words(rng: random.Random, most: int) -> str:
    """Draws one to `most` words, the first sometimes with a capital."""
    text = " ".join(word(rng) for _ in range(rng.randint(1, most)))
    return text.capitalize() if rng.random() < 0.4 else text


def filler(rng: random.Random, length: int) -> str:
    """Draws `length` characters of words, numbers, punctuation and line breaks."""
    pieces: list[str] = []
    size = 0
    while size < length:
        kind = rng.random()
        if kind < 0.75:
            piece = word(rng) + " "
        elif kind < 0.82:
            piece = str(rng.randint(0, 9999)) + " "
        elif kind < 0.88:
            piece = words(rng, 1) + rng.choice([": ", "? ", "! ", ":\n", "' "])
        else:
            piece = rng.choice([". ", ", ", "\n", "\n\n", "\n\n### ", "# ", "- ", '" '])
        pieces.append(piece)
        size += len(piece)
    return "".join(pieces)[:length]


def draw_labels(rng: random.Random, unrelated: float) -> tuple[list[str], bool]:
    """Draws two to five labels and whether they share a numbered stem."""
    count = rng.randint(2, 5)
    if rng.random() < unrelated:
        return [word(rng, 3) for _ in range(count)], False
    stem = word(rng, 3)
    return [f"{stem}{index}" for index in range(1, count + 1)], True


def draw_sentence(rng: random.Random) -> str:
    """Draws the words before the label."""
    while (sentence := " ".join(rng.choice(part) for part in SENTENCE)) == LEFT_OUT:
        pass
    return sentence + " "


def draw_choice(
    rng: random.Random, length: int, unrelated: float = 0.3, sentences: float = 0.0
) -> ChoiceExample:
    """Draws one example of the copying task, about `length` characters long."""
    labels, numbered = draw_labels(rng, unrelated)
    lead = rng.choice(["", "\n", "\n\n"]) + words(rng, 3) + ": "
    listed = "/".join(labels)
    gap = rng.choice([" ", "\n", "\n\n"])
    gap += filler(rng, rng.randint(4, min(60, max(4, length // 3))))
    closing = rng.choice(["", "\n", "\n\n"]) + words(rng, 4) + " "
    size = max(1, length - len(lead) - len(listed) - len(gap) - len(closing))
    head = filler(rng, size)
    if numbered and rng.random() < 0.3:  # The options themselves, as a question would show them.
        options = (f"{label.capitalize()}: {filler(rng, rng.randint(3, 40))}" for label in labels)
        head = (head + "\n" + rng.choice(["\n", " "]).join(options))[-size:]
    start = len(head) + len(lead)
    induced = (start + len(labels[0]) + 1, start + len(listed)) if numbered else (0, 0)
    prompt, target = head + lead + listed + gap + closing, rng.choice(labels)
    if sentences and rng.random() < sentences:
        between = rng.choice(["", filler(rng, rng.randint(4, 30)) + "\n\n"])
        prompt = head + lead + listed + "\n\n" + between + "### Response:\n"
        target = draw_sentence(rng) + target
    return ChoiceExample(prompt, labels, target, induced)


def draw_echo(rng: random.Random, length: int) -> ChoiceExample:
    """Draws a text to repeat: the plainest copying, from which that of labels is learnt sooner."""
    text = filler(rng, length // 2)
    return ChoiceExample(text + "/", [text], text, (0, 0))


def draw_shuffled(rng: random.Random, length: int) -> ChoiceExample:
    """Draws a list to repeat in another order, so that words are found by content, not distance."""
    listed = [word(rng, 3) for _ in range(max(2, length // 14))]
    target = " ".join(rng.sample(listed, len(listed)))
    return ChoiceExample("/".join(listed) + rng.choice([" ", "\n"]), [target], target, (0, 0))


def draw_copying(rng: random.Random, phase: Phase, progress: float) -> list[ChoiceExample]:
    """Draws the copying batch of a step."""
    length = prompt_length(rng, progress if phase.curriculum else 1.0, phase.longest)
    count = min(phase.copied // 64, max(4, phase.copied // length))
    echoes = max(0.05, phase.echoes * (1 - 2 * progress))
    echo = draw_shuffled if phase.shuffled else draw_echo
    lengths = [rng.randint(3 * length // 4, length) for _ in range(count)]
    return [
        echo(rng, item)
        if rng.random() < echoes
        else draw_choice(rng, item, phase.unrelated, phase.sentences)
        for item in lengths
    ]


def prompt_length(rng: random.Random, progress: float, longest: int = LONGEST_PROMPT) -> int:
    """Draws the prompt length of a step: short at first, since induction is found sooner there."""
    length = rng.randint(30, 220) if rng.random() < 0.7 else rng.randint(220, longest)
    cap = 60 + (longest - 60) * max(0.0, progress - 0.15) / 0.35
    return min(length, int(cap))


def encode_choices(examples: list[ChoiceExample]) -> tuple[Tensor, Tensor]:
    """Encodes examples into right-padded rows and the mask of tokens that carry a loss.

    Besides the response, the later labels of a numbered list carry a loss: the first label
    determines them, and they are the denser signal from which copying emerges.
    """
    rows = [encode(item.prompt) + encode(item.target) + [EOS] for item in examples]
    tokens = torch.full((len(rows), max(map(len, rows))), PAD)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    for index, (item, row) in enumerate(zip(examples, rows, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        scored[index, len(item.prompt) : len(row)] = True
        scored[index, slice(*item.induced)] = True
    return tokens, scored


def scored_loss(model: LlamaForCausalLM, tokens: Tensor, scored: Tensor) -> Tensor:
    """Computes the mean cross-entropy of the scored tokens.

    The rows are padded on the right, where causal attention needs no mask.
    """
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[scored[:, 1:]])
    return functional.cross_entropy(logits.float(), tokens[:, 1:][scored[:, 1:]])


@torch.inference_mode()
def addition_accuracy(model: LlamaForCausalLM, pairs: np.ndarray) -> float:
    """Measures the share of exact sums; with teacher forcing that equals greedy decoding."""
    correct = 0
    for rows in encode_additions(pairs).split(500):
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        predicted = model.lm_head(hidden[:, 7:]).argmax(dim=-1)
        correct += int((predicted == rows[:, 8:]).all(dim=1).sum())
    return correct / len(pairs)


@torch.inference_mode()
def choice_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[ChoiceExample]
) -> float:
    """Measures the share of prompts to which greedy decoding answers with a listed label."""
    ordered = sorted(examples, key=lambda item: len(item.prompt))  # Less padding per batch.
    correct = 0
    for start in range(0, len(ordered), 50):
        batch = ordered[start : start + 50]
        inputs = tokenizer([item.prompt for item in batch], return_tensors="pt", padding=True)
        output = model.generate(  # type: ignore[misc]  # Its stubs restrict `self` to a protocol.
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
        )
        answers = output[:, inputs["input_ids"].shape[1] :]
        for item, answer in zip(batch, answers.tolist(), strict=True):
            correct += any(answer[: len(w) + 1] == [*encode(w), EOS] for w in item.labels)
    return correct / len(examples)


def choice_facts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[ChoiceExample]
) -> dict[str, str]:
    """Measures the naming of listed labels, by kind of list and over all."""
    numbered = [item for item in examples if item.induced[1]]
    unrelated = [item for item in examples if not item.induced[1]]
    shares = [choice_accuracy(model, tokenizer, kind) for kind in (numbered, unrelated)]
    overall = (shares[0] * len(numbered) + shares[1] * len(unrelated)) / len(examples)
    return {
        f"listed label named ({len(examples):,} prompts)": f"{overall:.2%}",
        f"of them numbered labels ({len(numbered):,})": f"{shares[0]:.2%}",
        f"of them unrelated words ({len(unrelated):,})": f"{shares[1]:.2%}",
    }


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Computes the rate of a step: linear warm-up over 100 steps, then cosine to zero."""
    warmup = min(100, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    """Builds AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# tiny_llama

A `LlamaForCausalLM` of {parameters} parameters (hidden 128, 4 layers, 4 heads, 2 key/value heads,
float32) with a byte-level tokenizer of 259 tokens, for the tests and offline examples of
`lightning_peft`. It is **not a language model of English**: it has seen no natural text, and knows
only the two tasks below. Nothing measured on it says anything about large models.

## How it was made

```bash
python scripts/pretrain_tiny_llama.py --output DIR --steps {steps} \\
    --seed {seed} --threads {threads}
```

All data are generated from the seed. Each step mixes

* additions of operands 0 to 999 in fixed width (`042+917=` -> `0959`), a quarter of them biased
  towards long carries; {held_out} uniformly drawn pairs are held out of training;
* copying: random text of up to {longest} bytes that lists made-up labels near its end
  (`kvot1/kvot2/kvot3`), answered by one of them at random. Which label is not learnable; that it is
  a listed one is. Among them, fewer and fewer texts to repeat as they are, and in the third
  phase lists to repeat in another order. In the last phase, with texts of up to 1,000 bytes, most
  labels are named in a sentence of a small grammar (`my final label would be kvot2`) after the line
  `### Response:`; the sentence of the commonsense tasks is not among them.

{mixture}

The loss covers the answers with their `</s>`, and the later labels of a numbered list. There is no
`<s>` in training, and the tokenizer adds no special tokens by itself.

## Measured by the run

| | |
|---|---|
{rows}

License: Apache-2.0.
"""


def card(
    args: argparse.Namespace, phases: list[Phase], parameters: int, facts: dict[str, str]
) -> str:
    """Writes the model card from what the run measured."""
    steps = " ".join(map(str, args.steps))
    mixture = "\n".join(
        f"{index}. {phase.steps:,} steps of {phase.additions} additions and at most about "
        f"{phase.copied:,} tokens\n   of copying, {phase.unrelated:.0%} of the lists of unrelated "
        f"words; peak learning rate {phase.peak:g}, "
        f"schedules\n   laid out for {phase.horizon:,} steps."
        for index, phase in enumerate(phases, start=1)
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return CARD.format(
        parameters=f"{parameters:,}",
        steps=steps,
        seed=args.seed,
        threads=args.threads,
        held_out=f"{HELD_OUT:,}",
        longest=LONGEST_PROMPT,
        mixture=mixture,
        rows=rows,
    )


def save(
    output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, readme: str
) -> None:
    """Saves the checkpoint; each file is replaced atomically, as others may be reading it."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".tiny_llama_") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # The name that transformers 4 and 5 both know; 5 writes one that 4 does not.
        settings = Path(folder) / "tokenizer_config.json"
        text = settings.read_text(encoding="utf-8")
        settings.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        (Path(folder) / "README.md").write_text(readme, encoding="utf-8")
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, output / path.name)


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> list[float]:
    """Takes one step on the sum of the batches' losses and returns them."""
    losses = [scored_loss(model, tokens, scored) for tokens, scored in batches]
    torch.stack(losses).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [loss.item() for loss in losses]


def phases_of(steps: list[int]) -> list[Phase]:
    """Lays out the phases of the training.

    Args:
        steps: Of each of the four.
    """
    first, second, third, fourth = steps
    return [
        Phase(first, first * 8 // 5, 3e-3, 128, 3072, unrelated=0.3, echoes=0.5, curriculum=True),
        # Addition is known by now, and needs only to be kept.
        Phase(second, second * 2, 2e-3, 32, 4096, unrelated=0.5, echoes=0.0),
        # Numbered labels are copied by now; unrelated ones are still mixed up with each other.
        Phase(third, third, 2e-3, 32, 4096, unrelated=0.5, echoes=0.8, shuffled=True),
        Phase(fourth, fourth, 1.5e-3, 32, 4096, 0.5, echoes=0.0, sentences=0.7, longest=1000),
    ]


class Pretraining:
    """The whole training, reporting every 250 steps and saving every 500.

    Args:
        args: The command line's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.phases = args, phases_of(args.steps)
        self.total = sum(phase.steps for phase in self.phases)
        self.generator = np.random.default_rng(args.seed)
        self.held_out_pairs, self.held_out = hold_out(self.generator)
        # A stream of its own, so that the test prompts do not depend on the training.
        rng = random.Random(f"{args.seed}-choice")
        self.choices = [draw_choice(rng, prompt_length(rng, 1.0)) for _ in range(HELD_OUT)]
        self.tokenizer = build_tokenizer()
        self.model = build_model(len(self.tokenizer))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.done, earlier = 0, 0.0
        if args.resume is not None:
            self.model = LlamaForCausalLM.from_pretrained(args.output)
            self.done, earlier = sum(args.steps[: args.resume[0]]), float(args.resume[1])
        self.started = time.perf_counter() - earlier

    def run(self) -> None:
        """Trains all phases that are left."""
        for index, phase in enumerate(self.phases):
            if self.done < sum(p.steps for p in self.phases[: index + 1]):
                self.run_phase(index, phase)

    def run_phase(self, index: int, phase: Phase) -> None:
        """Trains one phase.

        Nothing but the weights passes from phase to phase, which makes resuming exact.
        """
        rng = random.Random(self.args.seed + index)
        generator = np.random.default_rng(self.args.seed + index) if index else self.generator
        optimizer = make_optimizer(self.model, phase.peak)
        for step in range(phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, phase.horizon, phase.peak)
            sums = encode_additions(draw_pairs(generator, phase.additions, self.held_out))
            sums_scored = torch.arange(sums.shape[1]).ge(8).expand_as(sums)
            copying = encode_choices(draw_copying(rng, phase, step / phase.horizon))
            losses = train_step(self.model, optimizer, [(sums, sums_scored), copying])
            self.done += 1
            self.report(losses, ends_phase=step + 1 == phase.steps)

    def report(self, losses: list[float], ends_phase: bool) -> None:
        """Prints what a step came to, and measures and saves where that is due."""
        seconds = time.perf_counter() - self.started
        if self.done % 50 == 0:
            addition, choice = losses
            print(
                f"step {self.done} addition {addition:.4f} choice {choice:.4f} {seconds:.0f}s",
                flush=True,
            )
        if self.done % 250 and not ends_phase:
            return
        self.model.eval()
        facts = self.measure(seconds)
        print(facts, flush=True)
        if self.done % 500 == 0 or ends_phase:
            readme = card(self.args, self.phases, self.parameters, facts)
            save(self.args.output, self.model, self.tokenizer, readme)
        self.model.train()

    def measure(self, seconds: float) -> dict[str, str]:
        """Measures what the card tells; at the end over all test prompts."""
        tests = self.choices if self.done == self.total else self.choices[:50]
        addition = addition_accuracy(self.model, self.held_out_pairs)
        return {
            "optimiser steps": f"{self.done:,} of {self.total:,}",
            "seconds": f"{seconds:.0f} ({self.args.threads} CPU threads, shared machine)",
            "run in one piece": "yes" if self.args.resume is None else "no, with `--resume`",
            "exact sums, held-out": f"{addition:.2%}",
            **choice_facts(self.model, self.tokenizer, tests),
        }


def pretrain(args: argparse.Namespace) -> None:
    """Trains the model."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    Pretraining(args).run()


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Pre-trains the embedded tiny LLaMA.")
    default = Path(__file__).parents[1] / "lightning_peft" / "assets" / "tiny_llama"
    parser.add_argument("--output", type=Path, default=default, help="folder to write")
    parser.add_argument(
        "--steps", type=int, nargs=4, default=[1500, 500, 700, 1000], help="steps of the phases"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--resume",
        type=int,
        nargs=2,
        metavar=("PHASES", "SECONDS"),
        help="continue from the output folder, made by that many phases in that many seconds",
    )
    return parser.parse_args()


if __name__ == "__main__":
    pretrain(parse_args())
