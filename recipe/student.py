"""Fine-tune on extractive question answering: `python -m recipe.student --windows FOLDER --output_dir DIR`.

From all-MiniLM-L6-v2, or any model in the form of BERT or RoBERTa; see recipe.training for what all trainings share.
"""

from dataclasses import dataclass

from recipe.data import base_model, load_tokenizer
from recipe.training import SpanArguments, SpanTrainer, SpanTrainingArguments, load_model, parse, train


@dataclass
class StudentTrainingArguments(SpanTrainingArguments):
    learning_rate: float = 1.5e-4
    num_train_epochs: float = 2
    eval_strategy: str = "steps"
    eval_steps: float = 500
    save_steps: float = 100
    logging_steps: float = 50


def main():
    arguments, training = parse(SpanArguments, StudentTrainingArguments)
    folder = arguments.model or base_model()
    train(SpanTrainer, load_model(folder), load_tokenizer(folder), arguments, training)


if __name__ == "__main__":
    main()
