"""Train the embedded reasoner (`stepsal.load("mini")`) from scratch on the chain task.

    python scripts/train_mini.py --out data/mini

Three choices make look-up, the slow part of this task, quick to learn:

* Positional initialisation. Qwen2 has biases on queries and keys; under RoPE, a pair of biases alone is a fixed
  relative-position kernel. Three heads of each of the first two layers start out looking 1, 2 and 3 tokens back, which
  is the first half of an induction circuit (compare mimetic initialisation, Trockman & Kolter 2023). Training is free
  to change them.
* A curriculum: chains of at most 4 definitions at first, one more every `--grow-every` steps up to `--max-size`.
* Muon for the weight matrices, AdamW for embeddings, norms and biases, in small batches.

Problems are drawn with seeds from `TRAIN_SEEDS` upwards; everything measured elsewhere uses seeds far below.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stepsal.tasks import chain

TRAIN_SEEDS = 1_000_000_000
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|><think>' + message['content'] + '<|endoftext|>' }}{% else %}"
    "{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
MAX_POSITIONS = 1024


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the task's text: one token per word, number and sign; any other text as bytes."""
    problems = [chain.sample(TRAIN_SEEDS - 1 - i) for i in range(4000)]
    corpus = [p.question + p.solution() for p in problems]
    corpus += [f" {n}" for n in range(100)] * 2
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocab_size: int, seed: int) -> Qwen2ForCausalLM:
    """A random Qwen2 with positionally initialised heads; at most 3 M parameters."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            use_sliding_window=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    for layer in model.model.layers[:2]:
        _look_back(layer.self_attn, offsets=(1, 2, 3, None))
    return model


@torch.no_grad()
def _look_back(attn: nn.Module, offsets: tuple[int | None, ...], strength: float = 6.0, n_freq: int = 6) -> None:
    """Set the q and k biases so that query head h attends `offsets[h]` positions back (None: leave it alone)."""
    d_head = attn.head_dim
    theta = 10_000.0 ** (-torch.arange(n_freq) * 2 / d_head)  # the fastest rotations [n_freq]
    q_bias = attn.q_proj.bias.view(-1, 2, d_head // 2)  # [head, half, freq]
    k_bias = attn.k_proj.bias.view(-1, 2, d_head // 2)
    k_bias[:, 0, :n_freq] = strength
    for head, offset in enumerate(offsets):
        if offset is not None:
            q_bias[head, 0, :n_freq] = strength * torch.cos(theta * offset)
            q_bias[head, 1, :n_freq] = -strength * torch.sin(theta * offset)


class Sampler:
    """Batches of training problems no larger than `self.size` definitions."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens_per_batch: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_batch = tokens_per_batch
        self.rng = random.Random(seed)
        self.next_seed = TRAIN_SEEDS
        self.size = 2

    def batch(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels (-100 outside the response), each [batch, pos]; one problem shape per batch."""
        length = self.rng.randint(1, self.size)
        distractors = self.rng.randint(1, (length + 2) // 2 + 1)
        n = max(8, self.tokens_per_batch // (30 * length + 20))
        prompts, responses = [], []
        for _ in range(n):
            problem = chain.sample(self.next_seed, length, distractors)
            prompts.append(f"<|endoftext|><|user|>{problem.question}<|assistant|><think>")
            responses.append(problem.solution(self.next_seed) + "<|endoftext|>")
            self.next_seed += 1
        prompt_ids = self.tokenizer(prompts)["input_ids"]
        response_ids = self.tokenizer(responses)["input_ids"]
        width = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
        ids = torch.zeros(n, width, dtype=torch.long)
        labels = torch.full((n, width), -100)
        for i, (p, r) in enumerate(zip(prompt_ids, response_ids, strict=True)):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        return ids, labels


def main() -> None:
    """Train, and write the model and its tokenizer into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--steps", type=int, default=11_000)
    parser.add_argument("--batch-tokens", type=int, default=3000)
    parser.add_argument("--max-size", type=int, default=8, help="largest chain length trained on")
    parser.add_argument("--grow-every", type=int, default=800, help="steps between steps of the curriculum")
    parser.add_argument("--lr", type=float, default=0.01, help="peak learning rate of Muon; AdamW's is a fifth of it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters, {device}", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr / 5, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    sampler = Sampler(tokenizer, args.batch_tokens, args.seed)
    start, n_tokens, average = time.time(), 0, math.nan
    for step in range(args.steps):
        sampler.size = min(args.max_size, 4 + step // args.grow_every)
        # linear warm-up over 100 steps, constant, linear decay to zero over the last 45 %
        scale = min(1.0, (step + 1) / 100, (args.steps - step) / (0.45 * args.steps))
        ids, labels = (x.to(device) for x in sampler.batch())
        hidden = model.model(ids).last_hidden_state[:, :-1]  # [batch, pos, d_model]
        in_response = labels[:, 1:] != -100
        loss = nn.functional.cross_entropy(model.lm_head(hidden[in_response]), labels[:, 1:][in_response])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        n_tokens += ids.numel()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0:
            seconds = time.time() - start
            print(
                f"step {step:6d}  size {sampler.size}  loss {average:.4f}  {n_tokens / 1e6:6.2f} M tokens  "
                f"{n_tokens / seconds:6.0f}/s  {seconds / 60:5.1f} min",
                flush=True,
            )
        if step % 500 == 499 or step == args.steps - 1:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
