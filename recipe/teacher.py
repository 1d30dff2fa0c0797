"""Fine-tune the teacher, all-mpnet-base-v2: `python -m recipe.teacher --base FOLDER --windows FOLDER --output_dir DIR`.

See recipe.training for what all trainings share.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, MPNetForQuestionAnswering

from recipe.data import base_model, load_tokenizer
from recipe.training import SpanArguments, SpanTrainer, SpanTrainingArguments, parse, train

# MPNet's tokens that have another name in BERT's vocabulary.
SPECIAL_TOKENS = {"[CLS]": "<s>", "[SEP]": "</s>", "[PAD]": "<pad>", "[MASK]": "<mask>"}


class Teacher(MPNetForQuestionAnswering):
    """MPNet that reads BERT's tokens, so that what it answers carries over to a BERT token by token.

    Its word embeddings stand in the order of BERT's ids. A pair is `[CLS] question [SEP] context [SEP]`, as in BERT;
    MPNet's has one token more between the two, `<s> question </s></s> context </s>`, which is put in and taken out
    within.
    """

    def forward(self, input_ids, attention_mask, question_length):
        """
        Args:
            input_ids (int64 `(batch, sequence)`), attention_mask (`(batch, sequence)`): BERT's, padded on the right.
            question_length (int64 `(batch,)`): tokens up to the first [SEP], itself included.

        Returns:
            `QuestionAnsweringModelOutput` with start_logits and end_logits, `(batch, sequence)`.
        """
        here = torch.arange(input_ids.shape[1] + 1, device=input_ids.device)
        question_length = question_length[:, None]
        read = here - (here >= question_length).long()  # the first [SEP] twice
        outputs = super().forward(input_ids.gather(1, read), attention_mask.gather(1, read))
        kept = here[:-1] + (here[:-1] >= question_length).long()
        for name in ("start_logits", "end_logits"):
            outputs[name] = outputs[name].gather(1, kept)
        return outputs


def untrained_teacher(folder, tokenizer, **config_fields):
    """[`Teacher`] of the MPNet in `folder`, under a new span head; `tokenizer` is BERT's, `config_fields` go on top of
    the folder's configuration.

    Raises:
        ValueError: a token of BERT's that MPNet does not have.
    """
    model = Teacher.from_pretrained(folder, attention_probs_dropout_prob=0.0, **config_fields)
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    names = {index: SPECIAL_TOKENS.get(token, token) for token, index in tokenizer.get_vocab().items()}
    missing = [name for name in names.values() if name not in theirs]
    if missing:
        raise ValueError(f"{folder} has no token {missing[0]!r}, which BERT's vocabulary has")
    rows = torch.tensor([theirs[names[index]] for index in range(len(names))])
    embeddings = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.data[rows], freeze=False)
    model.set_input_embeddings(embeddings)
    model.config.update({"vocab_size": len(names), "pad_token_id": tokenizer.pad_token_id})
    return model


class TeacherTrainer(SpanTrainer):
    def inputs_of(self, batch):
        return {name: batch[name] for name in ("input_ids", "attention_mask", "question_length")}


@dataclass(kw_only=True)
class TeacherArguments(SpanArguments):
    base: str = field(metadata={"help": "Folder of all-mpnet-base-v2, which recipe.mpnet unpacks."})
    layers: int = field(default=12, metadata={"help": "The lowest layers of it, which the teacher has."})


@dataclass
class TeacherTrainingArguments(SpanTrainingArguments):
    learning_rate: float = 3e-5
    num_train_epochs: float = 1
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 2
    per_device_eval_batch_size: int = 8
    eval_strategy: str = "steps"
    eval_steps: float = 100
    save_steps: float = 20
    logging_steps: float = 10


def main():
    arguments, training = parse(TeacherArguments, TeacherTrainingArguments)
    tokenizer = load_tokenizer(arguments.model or base_model())
    model = untrained_teacher(arguments.base, tokenizer, num_hidden_layers=arguments.layers)
    train(TeacherTrainer, model, tokenizer, arguments, training)


if __name__ == "__main__":
    main()
