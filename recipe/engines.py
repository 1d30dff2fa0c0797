"""Do torch and ONNX Runtime answer alike? `python -m recipe.engines --data FILE ... --output results/engines.json`.

The same int8 weights round otherwise in each, and with the rounding a token may be dropped or not. Questions of the
validation split, drawn by a fixed seed, are answered by both at each preset.
"""

import argparse
from pathlib import Path

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import ROOT
from recipe.data import file_sha256, identities, load_tokenizer, read_sources, with_answers
from recipe.evaluate import answer_all, score
from recipe.results import describe_run, write_json
from recipe.test_sets import refuse_test_sets

ENGINES = ("torch", "onnxruntime")


def compare(texts, questions):
    """Of the two engines' `texts`, name -> a list: the share of questions that both answer with the same, and the F1 of
    each in percent."""
    alike = [len(set(answers)) == 1 for answers in zip(*texts.values(), strict=True)]
    return {"alike": sum(alike) / len(alike)} | {f"{name}_f1": score(questions, texts[name])["f1"] for name in texts}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("?")[0] + "?")
    parser.add_argument("--model", default=str(ROOT), help="folder of an int8 model and its graph (the shipped one)")
    parser.add_argument("--data", nargs="+", required=True, help="SQuAD JSON files whose validation split is asked")
    parser.add_argument("--questions", type=int, default=500, help="questions drawn of it (500)")
    parser.add_argument("--output", required=True, help="JSON results file to write")
    arguments = parser.parse_args()
    refuse_test_sets("--data", arguments.data)
    questions = with_answers(read_sources(arguments.data, "validation")).shuffle(seed=0)
    questions = questions.select(range(min(len(questions), arguments.questions)))
    tokenizer, pipelines = load_tokenizer(arguments.model), {}
    for engine in ENGINES:
        model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, engine=engine).eval()
        pipelines[engine] = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)
    presets = {}
    for preset in model.config.length_presets:
        texts = {engine: answer_all(pipelines[engine], questions, 1, preset)[0] for engine in ENGINES}
        presets[preset] = compare(texts, questions)
        print(f"{preset}: {presets[preset]}")
    write_json(
        arguments.output,
        {
            "questions": len(questions),
            "presets": presets,
            "data": identities(arguments.data),
            "weights_sha256": file_sha256(Path(arguments.model) / "model.safetensors"),
            **describe_run("recipe.engines"),
        },
    )
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
