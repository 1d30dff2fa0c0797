"""What the teacher answers on every training window, kept on disk: `python -m recipe.answers --teacher FOLDER --windows
FOLDER --output_dir DIR`.

Of each window the likeliest starts and ends, and [CLS], with their log-probabilities in half precision. Windows are
answered in parts, each kept as soon as it is done: a run that was stopped goes on when the same command is given again.
"""

import argparse
from pathlib import Path

import datasets
import torch
from torch.nn import functional as F
from tqdm import tqdm

from recipe.results import whole_folder
from recipe.teacher import Teacher
from recipe.training import WindowCollator, has_bf16, span_logits
from recipe.windows import TRAIN

LIKELIEST = 32
PART = 4096  # windows
FEATURES = datasets.Features(
    {
        f"{name}_{kind}": datasets.List(datasets.Value(dtype))
        for name in ("start", "end")
        for kind, dtype in (("tokens", "uint16"), ("log_probabilities", "float16"))
    }
)


def answers(teacher, rows, batch_size):
    """The teacher's answers on `rows`, of a table of windows: a list of dicts with the columns of `FEATURES`."""
    collator = WindowCollator(teacher.config.pad_token_id)
    device, found = teacher.device, []
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    for first in range(0, len(order), batch_size):
        batch = collator([rows[i] for i in order[first : first + batch_size]])
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "question_length")}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=has_bf16()):
            outputs = teacher(**inputs)
        log_probabilities = span_logits(outputs, inputs["attention_mask"]).log_softmax(-1)
        found += likeliest(log_probabilities, batch["attention_mask"].sum(-1).tolist())
    return [answer for _, answer in sorted(zip(order, found), key=lambda pair: pair[0])]


def likeliest(log_probabilities, lengths):
    """What is kept of windows of `lengths` tokens: of log-probabilities, float32 (batch, 2, sequence), [CLS]'s and the
    greatest others."""
    others, tokens = log_probabilities[..., 1:].topk(min(LIKELIEST, log_probabilities.shape[-1] - 1))
    kept = torch.cat((log_probabilities[..., :1], others), -1).half().cpu().numpy()
    tokens = F.pad(tokens + 1, (1, 0)).cpu().numpy()
    return [
        {
            f"{name}_{kind}": part[i, which, : 1 + min(LIKELIEST, length - 1)]
            for which, name in enumerate(("start", "end"))
            for kind, part in (("tokens", tokens), ("log_probabilities", kept))
        }
        for i, length in enumerate(lengths)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--teacher", required=True, help="folder that recipe.teacher wrote")
    parser.add_argument("--windows", type=Path, required=True, help="folder that recipe.windows wrote")
    parser.add_argument("--batch_size", type=int, default=16, help="windows a batch (%(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; parts are kept beside it")
    arguments = parser.parse_args()
    teacher = Teacher.from_pretrained(arguments.teacher).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    rows = datasets.load_from_disk(arguments.windows / TRAIN)
    parts = arguments.output_dir.with_name(f"{arguments.output_dir.name}.parts")
    firsts = range(0, len(rows), PART)
    for first in tqdm(firsts, desc="Answering", unit="part"):
        if not (parts / str(first)).exists():
            of_part = list(rows.select(range(first, min(first + PART, len(rows)))))
            with whole_folder(parts / str(first)) as unfinished:
                table = datasets.Dataset.from_list(answers(teacher, of_part, arguments.batch_size), features=FEATURES)
                table.save_to_disk(unfinished)
    with whole_folder(arguments.output_dir) as unfinished:
        datasets.concatenate_datasets([datasets.load_from_disk(parts / str(first)) for first in firsts]).save_to_disk(
            unfinished
        )
    print(f"Wrote the teacher's answers on {len(rows)} windows to {arguments.output_dir}")


if __name__ == "__main__":
    main()
