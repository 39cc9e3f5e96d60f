"""Accuracy of a checkpoint on a file of questions, decoded greedily by transformers.

    python models/tiny/training/evaluate.py models/tiny models/tiny/heldout/questions.jsonl

The product's own measurement is `edgevl eval tiny --vqa FILE`; this one needs no engine of it.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image

from checkpoint import load, to_pixels
from edgevl.evaluate.vqa import is_right, read_questions
from prompts import image_part, user_part
from samples import tiles_of
from tokenizer import END_OF_TURN

LONGEST_ANSWER = 128  # tokens


def main() -> None:
    """Print each wrong answer, then the accuracy of each family in each language."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one short question at a time gives more threads nothing to do
    model, tokenizer = load(arguments.model)
    end = tokenizer.token_to_id(END_OF_TURN)
    counts: dict[str, list[bool]] = defaultdict(list)
    for question in read_questions(arguments.questions):
        tiles = tiles_of(Image.open(question.image).convert("RGB"))
        prompt = tokenizer.encode(user_part(image_part(len(tiles)) + question.question)).ids
        written = model.generate(
            input_ids=torch.tensor([prompt]),
            pixel_values=to_pixels(tiles),
            do_sample=False,
            max_new_tokens=LONGEST_ANSWER,
            eos_token_id=end,
            pad_token_id=end,
        )
        ids = [i for i in written[0, len(prompt) :].tolist() if i != end]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        right = is_right(text, question.answers)
        language = "en" if question.question.isascii() else "zh"
        for key in (question.family, f"{question.family} {language}"):
            counts[key].append(right)
        if not right:
            print(f"{question.image.name}: {question.question} {question.answers[0]} -> {text}")
    for key, outcomes in sorted(counts.items()):
        print(f"{key:18} {sum(outcomes):4}/{len(outcomes)} {sum(outcomes) / len(outcomes):.3f}")


if __name__ == "__main__":
    main()
