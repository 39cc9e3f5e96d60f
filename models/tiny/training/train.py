"""Trains the tiny model.

    python models/tiny/training/train.py --out models/tiny --work DIR
        [--from CHECKPOINT [--at STEP]] [--resume]

`--work` keeps the resumable state; `--out` receives the checkpoint every few minutes. `--from` goes
on from weights alone, at the step `--at`, from which on there is JSON unless told otherwise, and
leaves the vision tower as it is; to resume that, give both. One process with one thread a core: at
this size that trains a quarter faster than one process with two threads.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import InternVLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import tokenizer as tiny_tokenizer
from checkpoint import load, new_model, save, to_pixels
from questions import FAMILIES, LANGUAGES
from samples import Batch, Stream, collate, family_question, single
from scenes import FIRST_MIDDLE, PATCH_CLASSES, Style
from schedule import JSON_FROM, STEPS, difficulty, rate

PROCESSES = 2
BATCH = 16  # conversations a process and step; 32 in the first 17,050 steps
# Without instructions for it, bfloat16 is twenty times slower than float32 (torch 2.13).
BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
MUON_RATE, ADAM_RATE = 4e-3, 2e-3
PATCH_LOSS = 0.5  # of the heads against the answers
BOX_LOSS = 8.0  # of the boxes against the patches
HEAD_ALONE = 200  # steps in which a new head learns from a trained model, and it not from the head
MOST_LOOKED = 30_000  # tiles whose features are kept, 37 kB each
REPORT_EVERY = 50  # steps
VALIDATE_EVERY = 400
SAVE_EVERY_S = 240


class Trainer(torch.nn.Module):
    """The model and, for training alone, three heads.

    Of the vision tower's patches, one names what a patch shows and one tells the box of the shape
    whose middle a patch is. Of the text model's last hidden state, one tells the box that is
    being written: a number to regress on is found sooner than its digits.
    """

    def __init__(self, model: InternVLForConditionalGeneration, sees: bool = True) -> None:
        """Take a model; unless it `sees`, its vision tower is not trained."""
        super().__init__()
        model.model.vision_tower.requires_grad_(sees)
        self.sees = sees
        self.model = model
        hidden_size = model.config.vision_config.hidden_size
        self.patch_head = torch.nn.Linear(hidden_size, PATCH_CLASSES)
        self.box_head = torch.nn.Linear(hidden_size, 4)
        self.said_head = torch.nn.Linear(model.config.text_config.hidden_size, 4)
        self._seen: list[torch.Tensor] = []
        model.model.vision_tower.register_forward_hook(
            lambda _module, _inputs, output: self._seen.append(output.last_hidden_state)
        )
        weight = torch.ones(PATCH_CLASSES)
        weight[0] = 0.15  # most patches show nothing
        weight[FIRST_MIDDLE:] = 3.0  # and few are the middle of a shape
        self.register_buffer("_class_weight", weight, persistent=False)
        self.head_alone = False
        if not sees:
            tower = model.model.vision_tower
            self._look, self._looked = tower.forward, {}  # float16 [1 + P, H] by a tile's hash
            tower.forward = lambda *_tiles, **_more: BaseModelOutput(self._features)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The text model's last hidden state [B, T, H]."""
        pixels = to_pixels(batch.tiles) if len(batch.tiles) else None
        if len(batch.tiles) and not self.sees:
            self._features = self._recalled(batch.tiles, pixels)
        return self.model.model(
            input_ids=batch.ids, pixel_values=pixels, use_cache=False
        ).last_hidden_state

    @torch.no_grad()
    def _recalled(self, tiles: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """What a tower that does not learn makes of tiles; most of them come again soon."""
        keys = [hash(tile.numpy().tobytes()) for tile in tiles]
        if new := [place for place, key in enumerate(keys) if key not in self._looked]:
            for place, each in zip(new, self._look(pixels[new]).last_hidden_state, strict=True):
                self._looked[keys[place]] = each.half()
        features = torch.stack([self._looked[key] for key in keys]).float()
        for key in list(self._looked)[: max(0, len(self._looked) - MOST_LOOKED)]:
            del self._looked[key]
        return features

    def logits(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens to be written, float32 [tokens, V]."""
        return self.model.lm_head(hidden[:, :-1][batch.weights[:, 1:] > 0]).float()

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the answers, and loss of the three heads."""
        self._seen.clear()
        hidden = self.hidden(batch)
        logits = self.logits(batch, hidden)
        weights = batch.weights[:, 1:]
        wanted = weights > 0
        each = functional.cross_entropy(logits, batch.ids[:, 1:][wanted], reduction="none")
        answers = (each * weights[wanted]).sum() / weights.sum()
        if not self._seen:
            return answers, answers.new_zeros(())
        shown = answers.new_zeros(())
        if self.sees:
            patches = self._seen[0][:, 1:]
            shown = functional.cross_entropy(
                self.patch_head(patches).float().flatten(0, 1),
                batch.classes.flatten().long(),
                weight=self._class_weight,
            )
        if self.sees and len(batch.boxes):
            tiles, middles = batch.middles.T
            boxes = self.box_head(patches[tiles, middles]).float()
            shown = shown + BOX_LOSS * functional.l1_loss(boxes, batch.boxes)
        if len(batch.said):
            rows, places = batch.places.T
            hidden = hidden.detach() if self.head_alone else hidden
            said = self.said_head(hidden[rows, places]).float()
            shown = shown + BOX_LOSS * functional.l1_loss(said, batch.said)
        return answers, shown


def _orthogonal(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Muon's Newton-Schulz iteration in float32; torch has it in bfloat16 alone.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def optimizers(trainer: Trainer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all that is an embedding or a vector."""
    matrices, others = [], []
    for name, parameter in trainer.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = "layer" in name or "projector.linear" in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    if not BF16:
        torch.optim._muon._zeropower_via_newtonschulz = _orthogonal
    return [
        torch.optim.Muon(
            matrices, lr=MUON_RATE, weight_decay=0.03, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=ADAM_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def validation_batches(tokenizer: Tokenizer) -> dict[str, list[Batch]]:
    """64 questions a family about pictures that training does not draw."""
    rng = random.Random("validation")
    return {
        family: [
            collate(
                [
                    single(
                        tokenizer,
                        *family_question(rng, Style(1.0, heldout=True), family, LANGUAGES[i % 2]),
                    )
                    for i in range(64)
                ]
            )
        ]
        for family in FAMILIES
    }


@torch.no_grad()
def validate(trainer: Trainer, batches: dict[str, list[Batch]]) -> dict[str, float]:
    """Share of answers of which every token is the likeliest: what greedy decoding would write.

    For boxes the share of right tokens, since a near miss is right.
    """
    shares = {}
    for family, parts in batches.items():
        right = total = 0
        for batch in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=BF16):
                best = trainer.logits(batch, trainer.hidden(batch)).argmax(-1)
            rows, columns = torch.nonzero(batch.weights[:, 1:] > 0, as_tuple=True)
            hits = best == batch.ids[rows, columns + 1]
            if family == "shape_locate":
                right, total = right + int(hits.sum()), total + len(hits)
            else:
                missed = torch.zeros(len(batch.ids), dtype=torch.bool)
                missed[rows[~hits]] = True
                right, total = right + int((~missed).sum()), total + len(batch.ids)
        shares[family] = round(right / total, 3)
    return shares


def _average_gradients(trainer: Trainer) -> None:
    gradients = [p.grad for p in trainer.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= PROCESSES
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _log(**values: object) -> None:
    print(json.dumps(values), flush=True)


def train(process: int, arguments: argparse.Namespace) -> None:
    """One of the training processes; the first also validates, saves and reports."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{arguments.work.resolve()}/rendezvous",
        rank=process,
        world_size=PROCESSES,
    )
    tokenizer = Tokenizer.from_file(str(arguments.work / "tokenizer.json"))
    step, seconds = 0, 0.0
    model = new_model(tokenizer)
    if arguments.start:
        model, step = load(arguments.start)[0].train(), arguments.at
    if not BF16:  # in bfloat16 the plain attention trains twice as fast as the fused one
        model.set_attn_implementation("sdpa")
    trainer = Trainer(model, sees=arguments.start is None)
    for parameter in trainer.parameters():  # a batch without pictures gives some no gradient
        parameter.grad = torch.zeros_like(parameter)
    both = optimizers(trainer)
    base_rates = [[group["lr"] for group in o.param_groups] for o in both]
    state_file = arguments.work / "state.pt"
    if arguments.resume:
        state = torch.load(state_file, weights_only=True)
        trainer.load_state_dict(state["trainer"])
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]

    drawn_for = torch.tensor(step).share_memory_()  # the step, told to the worker that draws
    stream = Stream(tokenizer, BATCH, f"step {step}", process, drawn_for)
    batches = iter(
        torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=16)
    )
    held = validation_batches(tokenizer) if process == 0 else {}
    started, last_save = time.monotonic() - seconds, time.monotonic()
    recent: list[tuple[float, float]] = []

    def keep() -> None:
        beside = state_file.with_suffix(".partial")
        torch.save(
            {
                "trainer": trainer.state_dict(),
                "step": step,
                "optimizers": [o.state_dict() for o in both],
                "seconds": time.monotonic() - started,
            },
            beside,
        )
        beside.rename(state_file)
        save(trainer.model, tokenizer, arguments.out)

    while step < arguments.steps:
        batch = next(batches)
        for optimizer, bases in zip(both, base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * rate(step)
        drawn_for.fill_(step)
        trainer.head_alone = not trainer.sees and step < arguments.at + HEAD_ALONE
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=BF16):
            answers, shown = trainer.loss(batch)
        (answers + PATCH_LOSS * shown).backward()
        _average_gradients(trainer)
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        step += 1
        if process:
            continue
        recent.append((answers.item(), shown.item()))
        if step % REPORT_EVERY == 0:
            losses = [round(sum(column) / len(recent), 4) for column in zip(*recent, strict=True)]
            _log(
                step=step,
                seconds=round(time.monotonic() - started),
                answers=losses[0],
                patches=losses[1],
                difficulty=round(difficulty(step), 2),
            )
            recent.clear()
        if step % VALIDATE_EVERY == 0:
            _log(step=step, validation=validate(trainer, held))
        if time.monotonic() - last_save > SAVE_EVERY_S:
            keep()
            last_save = time.monotonic()
    if process == 0:
        keep()


def main() -> None:
    """Start the training processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder of the resumable state")
    parser.add_argument("--from", dest="start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--at", type=int, default=JSON_FROM, help="step of that checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--steps", type=int, default=STEPS, help="stop before the schedule does")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "rendezvous").unlink(missing_ok=True)
    if not (arguments.work / "tokenizer.json").exists():
        if arguments.start:
            shutil.copy(arguments.start / "tokenizer.json", arguments.work)
        else:
            tiny_tokenizer.build().save(str(arguments.work / "tokenizer.json"))
    # Keep freed memory: handing it back after every tensor costs a quarter of the time. Of the
    # largest tensors, of long batches, it would pile up.
    os.environ |= {
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TRIM_THRESHOLD_": "2147483648",
        "MALLOC_TOP_PAD_": "268435456",
    }
    torch.multiprocessing.spawn(train, (arguments,), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
