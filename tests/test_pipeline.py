import csv
import json
import math
import random
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from conftest import ROOT, TRANSFORMERS_5, tiny_config
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from qualaminilm.spans_qualaminilm import whole_string
from recipe.data import load_tokenizer

QUESTION = "Where do I live?"
CONTEXT = "My name is Wolfgang and I live in Berlin. It is nice here, really."
ONE = {"question": QUESTION, "context": CONTEXT}
DROPPING = [0.9, 0.6, 0.3]  # a length_config of the tiny model
WORDS = "Berlin berlin live where do in the of Wolfgang unhappily ( ) , 1887 naïve 東京 to".split()


class MapStyle(torch.utils.data.Dataset):
    """Two items by its length, though `[]` never says so."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ONE


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield ONE


needs_built_in = pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 removed the built-in pipeline")


def tiny_model(**sizes):
    """Random, and sure of itself: its logits are far from each other."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30522, "max_position_embeddings": 512, "significance": "learned"} | sizes
    model = QuaLAMiniLMForQuestionAnswering(tiny_config(**sizes)).eval()
    torch.nn.init.normal_(model.bert.embeddings.word_embeddings.weight)
    torch.nn.init.normal_(model.qa_outputs.weight)
    return model


@pytest.fixture(scope="module")
def qa():
    return QuestionAnsweringPipeline(model=tiny_model(), tokenizer=load_tokenizer(ROOT))


@pytest.fixture(scope="module")
def built_in(qa):
    from transformers import QuestionAnsweringPipeline as BuiltIn

    return BuiltIn(model=qa.model, tokenizer=qa.tokenizer)


@pytest.fixture(scope="module")
def roberta_qa():
    """A pipeline around a random RoBERTa with a byte-level tokenizer trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([QUESTION, CONTEXT, " ".join(WORDS)], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=120,
    )
    torch.manual_seed(3)
    model = QuaLAMiniLMForQuestionAnswering(
        tiny_config(embedding_type="roberta", vocab_size=300, max_position_embeddings=130)
    )
    return QuestionAnsweringPipeline(model=model.eval(), tokenizer=fast)


def brute_force_answers(qa, question, context, top_k, max_answer_len, max_seq_len, doc_stride, align_to_words=True):
    """Every span of every window in plain loops; scores as the pipeline's documentation defines them."""
    encoded = qa.tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_seq_len,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    whole = qa.tokenizer(context, add_special_tokens=False)  # a window's edge cuts words
    shared = []  # words of the question, a set a window
    for i, ids in enumerate(encoded["input_ids"]):
        asked, read = ({t for t, of in zip(ids, encoded.sequence_ids(i)) if of == text} for text in (0, 1))
        shared.append({t for t in asked & read if any(map(str.isalnum, qa.tokenizer.decode([t])))})
    rarity = {t: (len(shared) + 1) / (sum(t in each for each in shared) + 0.5) for t in set().union(*shared)}
    spoken = [math.prod(rarity[t] for t in each) for each in shared]
    evidence, all_evidence = {}, 1
    for i, offsets in enumerate(encoded["offset_mapping"]):
        inputs = {name: torch.tensor([encoded[name][i]]) for name in qa.tokenizer.model_input_names}
        with torch.no_grad():
            outputs = qa.model(**inputs)
        tokens = [t for t, sequence in enumerate(encoded.sequence_ids(i)) if sequence == 1]
        if not tokens:
            continue
        start, end = (
            dict(zip([0, *tokens], logits[0, [0, *tokens]].double().softmax(0).tolist()))
            for logits in (outputs.start_logits, outputs.end_logits)
        )
        spans = [(start[s] * end[e], s, e) for s in tokens for e in tokens if s <= e < s + max_answer_len]
        spans.sort(key=lambda span: -span[0])
        merged, singles = {}, {}
        for rank, (score, s, e) in enumerate(spans):
            first, last = offsets[s][0], offsets[e][1]
            if align_to_words:
                first = whole.word_to_chars(0, encoded.token_to_word(i, s)).start
                last = whole.word_to_chars(0, encoded.token_to_word(i, e)).end
            text = context[first:last].lower()
            if not text.strip():  # tokens of RoBERTa's
                continue
            if rank < (12 if align_to_words else 1):
                merged[text] = merged.get(text, 0) + score
            singles[text] = max(singles.get(text, 0), score)
        null, weight = start[0] * end[0], spoken[i] / max(spoken)
        all_evidence += weight * (1 / null - 1)
        for text, score in (singles | merged).items():
            evidence[text] = max(evidence.get(text, 0), weight * score / null)
    scores = {text: each / all_evidence for text, each in evidence.items()}
    return sorted(scores.items(), key=lambda item: -item[1])[:top_k]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_windows_are_those_that_the_tokenizer_makes(request, family, data):
    qa = request.getfixturevalue("qa" if family == "bert" else "roberta_qa")
    pieces = st.sampled_from([*WORDS, "\n", "[SEP]", "</s>", "e\u0301", "\x00", "👩\u200d🚀"]) | st.text(max_size=4)
    question = data.draw(st.lists(pieces, min_size=1, max_size=4).map(" ".join).filter(len))
    context = data.draw(st.lists(pieces, min_size=1, max_size=60).map(data.draw(st.sampled_from(["", " "])).join))
    room = data.draw(st.integers(1, 30))
    around = len(qa.tokenizer(question, add_special_tokens=False)["input_ids"])
    around += qa.tokenizer.num_special_tokens_to_add(pair=True)
    assume(around + room <= 120)  # the RoBERTa's positions
    stride, side = data.draw(st.integers(0, room - 1)), data.draw(st.sampled_from(["right", "left"]))
    tokenizer = qa.tokenizer
    tokenizer.truncation_side = side
    try:
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=around + room,
            stride=stride,
            return_overflowing_tokens=True,
        )
        expected = [each for each in encoded.encodings if 1 in each.sequence_ids]
        example = {"question": question, "context": context}
        if not expected:
            with pytest.raises(ValueError):
                qa.preprocess(example, max_seq_len=around + room, doc_stride=stride)
            return
        found = qa.preprocess(example, max_seq_len=around + room, doc_stride=stride)
    finally:
        tokenizer.truncation_side = "right"
    assert len(found) == len(expected)
    whole = tokenizer(context, add_special_tokens=False)  # a window's edge cuts words
    for mine, theirs in zip(found, expected):
        inputs = mine.model_inputs()
        assert inputs["input_ids"].tolist() == theirs.ids
        assert inputs["token_type_ids"].tolist() == theirs.type_ids
        assert inputs["attention_mask"].tolist() == theirs.attention_mask
        tokens = [i for i, sequence in enumerate(theirs.sequence_ids) if sequence == 1]
        assert mine.scored().tolist() == [0, *tokens]
        for i, token in enumerate(tokens):
            assert mine.characters(i, i, align_to_words=False) == theirs.offsets[token]
            word = theirs.token_to_word(token)
            if word is not None:
                assert mine.characters(i, i, align_to_words=True) == whole.word_to_chars(0, word)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_answers_equal_a_brute_force_search(family, qa, roberta_qa, data):
    pipe = qa if family == "bert" else roberta_qa
    context = " ".join(data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=50)))
    parameters = {
        "top_k": data.draw(st.integers(1, 40)),
        "max_answer_len": data.draw(st.integers(1, 20)),
        "max_seq_len": data.draw(st.integers(40, 100)),
        "doc_stride": data.draw(st.integers(0, 12)),
        "align_to_words": data.draw(st.booleans()),
    }
    found = pipe(question=QUESTION, context=context, batch_size=data.draw(st.integers(1, 3)), **parameters)
    found = found if parameters["top_k"] > 1 else [found]
    expected = brute_force_answers(pipe, QUESTION, context, **parameters)
    assert [answer["score"] for answer in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    texts = [answer["answer"].lower() for answer in found]
    assert len(set(texts)) == len(texts) == len(expected)
    assert all(context[answer["start"] : answer["end"]] == answer["answer"] for answer in found)
    best = pipe(question=QUESTION, context=context, **parameters | {"top_k": 1})
    assert best["answer"] == found[0]["answer"]
    assert best["score"] == pytest.approx(found[0]["score"], abs=1e-6)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, list):
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
    else:
        assert [found[name] for name in ("answer", "start", "end")] == [
            expected[name] for name in ("answer", "start", "end")
        ]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)


def holds_no_string(context):
    """Whether no answer out of it is widened or cut."""
    words = re.finditer(r"\w+", context)
    return "\n" not in context and all(whole_string(context, *word.span()) == word.span() for word in words)


@needs_built_in
def test_validation_questions_are_answered_as_by_the_built_in(qa, built_in, validation_questions):
    drawn = validation_questions.shuffle(seed=0).select(range(300))
    rows = [row for row in drawn if holds_no_string(row["context"]) and len(qa.preprocess(row, max_seq_len=300)) == 1]
    rows = rows[:60]
    assert len(rows) == 60
    contexts, questions = ([row[name] for row in rows] for name in ("context", "question"))
    for parameters in (
        {},
        {"handle_impossible_answer": True, "align_to_words": False, "max_answer_len": 30},
        {"max_seq_len": 300, "doc_stride": 50},
    ):
        expected = built_in(question=questions, context=contexts, **parameters)
        assert_same(qa(question=questions, context=contexts, batch_size=8, **parameters), expected)


@needs_built_in
def test_texts_of_one_window_have_no_answer_where_the_built_in_finds_none(qa, built_in):
    draw, found = random.Random(0), []
    for _ in range(60):
        context = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        asked = {"question": QUESTION, "context": context, "handle_impossible_answer": True}
        found.append(qa(**asked))
        assert_same(found[-1], built_in(**asked))
    assert 2 < sum(answer["answer"] == "" for answer in found) < 58


@needs_built_in
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "call",
    [
        lambda qa: qa(QUESTION, CONTEXT),
        lambda qa: qa(question=QUESTION, context=CONTEXT),
        lambda qa: qa(question=[QUESTION, "Who?"], context=CONTEXT),
        lambda qa: qa(question=[QUESTION, "Who?"], context=[CONTEXT, CONTEXT]),
        lambda qa: qa(question=[], context=[]),
        lambda qa: qa(ONE),
        lambda qa: qa([ONE, ONE]),
        lambda qa: qa((ONE, ONE)),
        lambda qa: qa(ONE, ONE),
        lambda qa: qa({"question": [QUESTION], "context": [CONTEXT]}),
        lambda qa: qa({"question": [QUESTION, "Who?"], "context": [CONTEXT, CONTEXT]}),
        lambda qa: qa(data=ONE),
        lambda qa: qa(X=[ONE, ONE]),
        lambda qa: qa(qa.create_sample([QUESTION, "Who?"], [CONTEXT, CONTEXT])),
        lambda qa: list(qa(ONE for _ in range(3))),
        lambda qa: list(qa((ONE for _ in range(3)), batch_size=2)),
        lambda qa: list(qa(ONE for _ in range(1))),
        lambda qa: qa(ONE, topk=2),
        lambda qa: qa(ONE, padding="max_length", max_seq_len=50),
        lambda qa: qa(ONE, max_seq_len=30, doc_stride=2),
        lambda qa: qa(ONE, handle_impossible_answer=True),
        lambda qa: qa(ONE, num_workers=0),
        lambda qa: qa(question="Who?", context="Berlin, Bonn, Berlin", align_to_words=False),
        lambda qa: qa(question="Who?", context="Berlin, Bonn, Berlin"),
        # Errors:
        lambda qa: qa(),
        lambda qa: qa([]),
        lambda qa: qa(None),
        lambda qa: qa("text"),
        lambda qa: qa(question="", context=CONTEXT),
        lambda qa: qa(question=QUESTION, context=""),
        lambda qa: qa(question=None, context=CONTEXT),
        lambda qa: qa(question=QUESTION, context=None),
        lambda qa: qa({"question": None, "context": CONTEXT}),
        lambda qa: qa({"question": QUESTION, "context": None}),
        lambda qa: qa({"question": QUESTION}),
        lambda qa: qa(question=[""], context=CONTEXT),
        lambda qa: qa(question=[None], context=CONTEXT),
        lambda qa: qa(question=[QUESTION, "Who?"], context=[CONTEXT]),
        lambda qa: qa(question=QUESTION, context=[CONTEXT]),
        lambda qa: qa({"question": 5, "context": CONTEXT}),
        lambda qa: qa(ONE, top_k=0),
        lambda qa: qa(ONE, max_answer_len=0),
        lambda qa: qa(ONE, max_seq_len=10, doc_stride=20),
    ],
)
def test_every_form_of_call_does_what_the_built_in_does(qa, built_in, call):
    try:
        expected = call(built_in)
    except Exception as error:
        with pytest.raises(type(error)):
            call(qa)
    else:
        assert_same(call(qa), expected)


@needs_built_in
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "call",
    [
        lambda qa: qa(question=[QUESTION], context=CONTEXT),
        lambda qa: qa([ONE]),
        lambda qa: qa((ONE,)),
        lambda qa: qa([qa.create_sample(QUESTION, CONTEXT)]),
        lambda qa: qa(data=[ONE]),
    ],
)
def test_where_the_built_in_gives_what_is_in_a_list_of_one_the_list_is_given(qa, built_in, call):
    assert_same(call(qa), [call(built_in)])


@pytest.mark.parametrize("top_k", [1, 5])
def test_the_shape_of_a_result_follows_from_the_call(qa, top_k):
    for context in ("Turku", CONTEXT):
        single = {"question": QUESTION, "context": context}
        alone = qa(**single, top_k=top_k)
        assert type(alone) is (dict if top_k == 1 else list)
        assert qa(single, top_k=top_k) == qa(QUESTION, context, top_k=top_k) == alone
        squad_example = SimpleNamespace(question_text=QUESTION, context_text=context)
        assert qa(squad_example, top_k=top_k) == alone
        for n in (0, 1, 3):  # whose sums in one batch may round otherwise
            for found in (
                qa([single] * n, top_k=top_k),
                qa((single,) * n, top_k=top_k),
                qa(question=(QUESTION,) * n, context=context, top_k=top_k),
                qa({"question": [QUESTION] * n, "context": [context] * n}, top_k=top_k),
                list(qa(iter([single] * n), top_k=top_k)),
            ):
                assert_same(found, [alone] * n)


def test_the_last_batch_of_a_data_set_may_have_one_row(qa):
    rows = datasets.Dataset.from_list([ONE] * 5)
    answer = qa(ONE)["answer"]

    def answers(batch):
        found = qa(question=batch["question"], context=batch["context"])
        return {"answer": [each["answer"] for each in found]}

    assert list(rows.map(answers, batched=True, batch_size=2, new_fingerprint="a")["answer"]) == [answer] * 5
    one_by_one = rows.map(lambda row: {"answer": qa(row)["answer"]}, new_fingerprint="b")
    assert list(one_by_one["answer"]) == [answer] * 5


@pytest.mark.parametrize(
    "name, near",
    [
        ("lenght_config", "length_config"),
        ("max_answer_length", "max_answer_len"),
        ("topk_", "top_k"),
        ("quesiton", "question"),
        ("threshold", "no_answer_threshold"),
        ("voice", None),
    ],
)
def test_unknown_arguments_are_named(qa, name, near):
    complaint = f"unknown argument '{name}'" + (f": did you mean '{near}'" if near else r"\. Accepted: align_to_words")
    with pytest.raises(ValueError, match=complaint):
        qa(ONE, **{name: 2})
    with pytest.raises(ValueError, match=complaint):
        qa((ONE for _ in range(2)), **{name: 2})
    with pytest.raises(ValueError, match=complaint):
        QuestionAnsweringPipeline(model=qa.model, tokenizer=qa.tokenizer, **{name: 2})


def test_what_transformers_hands_on_is_no_unknown_argument(tmp_path):
    qa = QuestionAnsweringPipeline(model=tiny_model(), tokenizer=load_tokenizer(ROOT), framework="pt", modelcard=None)
    qa.save_pretrained(tmp_path)
    arguments = {"local_files_only": True, "framework": "pt", "device": "cpu", "batch_size": 2, "num_workers": 0}
    again = pipeline("question-answering", str(tmp_path), trust_remote_code=True, **arguments, top_k=2)
    assert len(again(ONE)) == 2
    with pytest.raises(ValueError, match="unknown argument 'lenght_config': did you mean 'length_config'"):
        pipeline("question-answering", str(tmp_path), trust_remote_code=True, lenght_config="fast")


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ({"question": "Where?", "context": "  "}, "`context` holds no text"),
        ({"question": " ", "context": CONTEXT}, "`question` is nothing but white space"),
        ({"question": "Where?", "context": None}, "`context` cannot be None"),
        ({"question": "Where?"}, "You need to provide a dictionary"),
        ({"question": "Where?", "context": "\ud800"}, "`context` is not valid Unicode"),
        (5, "5 is no dict"),
    ],
)
def test_a_bad_row_is_named_before_the_model_runs_and_in_a_stream_after_those_before_it(
    qa, monkeypatch, bad, complaint
):
    rows = [ONE] * 3 + [bad] + [ONE]
    for batch_size in (1, 2, 8):
        answers = qa(iter(rows), batch_size=batch_size)
        assert_same([next(answers) for _ in range(3)], [qa(ONE)] * 3)
        with pytest.raises((ValueError, KeyError), match=f"row 3: {complaint}"):
            next(answers)
        assert list(answers) == []
    if isinstance(bad, dict):
        with pytest.raises((ValueError, KeyError), match=complaint) as alone:
            qa(bad)
        assert "row" not in str(alone.value)
    monkeypatch.setattr(qa, "model", None)
    with pytest.raises((ValueError, KeyError), match=f"row 3: {complaint}") as error:
        qa(rows)
    assert error.value.answers == []


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(
    "late", [{"question": "why " * 400, "context": CONTEXT}, {"question": "Where?", "context": "\u200b"}]
)
def test_what_the_tokenizer_sees_names_its_row_and_carries_the_answers_before_it(qa, late, batch_size):
    rows = [ONE, ONE, late, ONE]
    with pytest.raises(ValueError, match="row 2: `(question|context)` ") as error:
        qa(rows, batch_size=batch_size)
    assert_same(error.value.answers, [qa(ONE)] * 2)
    answers = qa(iter(rows), batch_size=batch_size)
    assert_same([next(answers), next(answers)], [qa(ONE)] * 2)
    with pytest.raises(ValueError, match="row 2: "):
        next(answers)


def test_errors_of_others_pass_after_the_answers_before_them(qa):
    def rows(error):
        yield ONE
        raise error

    answers = qa(rows(RuntimeError("disk full")), batch_size=4)
    assert next(answers)["answer"]
    with pytest.raises(RuntimeError, match="^disk full$"):
        next(answers)
    with pytest.raises(KeyboardInterrupt):
        next(qa(rows(KeyboardInterrupt()), batch_size=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_one_clear_error(qa, monkeypatch, value):
    calm = qa.model

    class Wild:
        config = calm.config

        def __call__(self, **inputs):
            outputs = calm(**inputs)
            if inputs["input_ids"].shape[1] > 60:
                outputs.start_logits[-1, 30] = value
            return outputs

    monkeypatch.setattr(qa, "model", Wild())
    long = {"question": QUESTION, "context": CONTEXT * 5}
    with pytest.raises(ValueError, match="^row 1: the model's logits are not finite") as error:
        qa([ONE, long])
    assert len(error.value.answers) == 1
    with pytest.raises(ValueError, match="^the model's logits are not finite"):
        qa(**long)


def test_token_types_are_fed_whatever_the_tokenizer_says_of_them(qa):
    assert json.loads((ROOT / "tokenizer_config.json").read_text())["model_input_names"] == [
        "input_ids",
        "token_type_ids",
        "attention_mask",
    ]
    silent = AutoTokenizer.from_pretrained(
        ROOT, config=qa.model.config, model_input_names=["input_ids", "attention_mask"]
    )
    assert silent.model_input_names == ["input_ids", "attention_mask"]
    assert QuestionAnsweringPipeline(model=qa.model, tokenizer=silent)(ONE) == qa(ONE)
    roberta = QuestionAnsweringPipeline(model=tiny_model(embedding_type="roberta"), tokenizer=silent)
    ((_, score),) = brute_force_answers(roberta, **ONE, top_k=1, max_answer_len=15, max_seq_len=64, doc_stride=8)
    assert roberta(ONE)["score"] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    "text, parameters, complaint",
    [
        ({"context": "\ud800 is a lone surrogate"}, {}, "`context` is not valid Unicode text"),
        ({"question": "what is \udfff?"}, {}, "`question` is not valid Unicode text"),
        ({"context": " \n\t "}, {}, "`context` holds no text"),
        ({"question": " \n\u2003 "}, {}, "`question` is nothing but white space"),
        (
            {"context": CONTEXT * 20},
            {"max_seq_len": 40, "doc_stride": 33},
            r"`doc_stride` \(33\) is not smaller than the 32",
        ),
        ({}, {"max_seq_len": 8}, "`question` is 5 tokens long, which leaves no room"),
        ({}, {"doc_stride": -1}, "doc_stride parameter"),
        ({}, {"doc_stride": 1.5}, "doc_stride parameter"),
        ({}, {"top_k": True}, "top_k parameter"),
        ({}, {"batch_size": 0}, "batch_size parameter"),
        ({}, {"batch_size": "4"}, "batch_size parameter"),
        ({}, {"top_k": "3"}, "top_k parameter"),
        ({}, {"max_seq_len": 0}, "max_seq_len parameter"),
        ({}, {"max_question_len": 0}, "max_question_len parameter"),
        ({}, {"no_answer_threshold": "high"}, "no_answer_threshold is 'high', expected a number"),
        ({}, {"length_config": "quick"}, "length_config is 'quick', which is no preset"),
        ({}, {"length_config": [5, 4]}, "length_config has 2 entries, the model has 3 layers"),
        ({"context": CONTEXT * 60}, {"max_seq_len": 600}, "600 tokens long, the model has positions for 512"),
    ],
)
def test_what_tokenizers_or_the_model_choke_on_is_a_value_error(qa, text, parameters, complaint):
    with pytest.raises(ValueError, match=complaint):
        qa(**{"question": QUESTION, "context": CONTEXT} | text, **parameters)


def test_a_stride_that_no_window_needs_is_no_error(qa):
    expected = qa(question=QUESTION, context=CONTEXT)
    assert_same(qa(question=QUESTION, context=CONTEXT, max_seq_len=50, doc_stride=45), expected)


def test_a_question_that_fills_half_the_window_is_answered_over_smaller_strides(qa):
    call = {"question": "Where, " + "and I ask this once more, " * 40 + "do I live?", "context": CONTEXT * 20}
    room = 384 - qa.tokenizer.num_special_tokens_to_add(pair=True) - len(qa.tokenizer.tokenize(call["question"]))
    assert room < 128
    assert qa(**call) == qa(**call, doc_stride=room // 2)
    with pytest.raises(ValueError, match=r"`doc_stride` \(128\) is not smaller"):
        qa(**call, doc_stride=128)


def test_max_question_len_cuts_the_question(qa):
    assert_same(
        qa(question=QUESTION + " And why?", context=CONTEXT, max_question_len=5),
        qa(question=QUESTION, context=CONTEXT),
    )


def test_any_iterable_is_read_as_it_is_answered(qa):
    read = []

    def rows():
        for i in range(5):
            read.append(i)
            yield ONE

    lines = (f'"{row["question"]}","{row["context"]}"' for row in rows())
    for questions in (
        rows(),
        map(dict, rows()),
        (row for (row,) in zip(rows())),
        csv.DictReader(lines, fieldnames=["question", "context"]),
    ):
        read.clear()
        answers = qa(questions)
        assert read == []
        assert next(answers) == qa(ONE)
        assert read == [0]
        assert list(answers) == [qa(ONE)] * 4
    endless = qa(Endless())
    assert next(endless) == next(endless) == qa(ONE)


def test_data_sets_are_streams(qa):
    rows = datasets.Dataset.from_list([ONE | {"id": i} for i in range(3)])
    for questions in (rows, rows.to_iterable_dataset()):
        answers = qa(questions)
        assert iter(answers) is answers
        assert list(answers) == [qa(ONE)] * 3
    answers = qa(MapStyle())
    assert iter(answers) is answers and list(answers) == [qa(ONE)] * 2


def test_batches_do_not_change_answers(qa):
    contexts = [CONTEXT, CONTEXT * 30, "Berlin", CONTEXT * 3, CONTEXT * 25] * 2
    for length_config in ("full", DROPPING, [30, 20, 10]):
        alone = [qa(question=QUESTION, context=context, length_config=length_config) for context in contexts]
        for batch_size in (2, 3, 64):
            together = qa(
                question=[QUESTION] * 10,
                context=contexts,
                batch_size=batch_size,
                length_config=length_config,
            )
            assert_same(together, alone)


def test_length_config_at_construction_and_at_the_call(qa):
    tight = [12, 8, 2]
    by_construction = QuestionAnsweringPipeline(model=qa.model, tokenizer=qa.tokenizer, length_config=tight, top_k=3)
    expected = qa(ONE, top_k=3, length_config=tight)
    assert by_construction(ONE) == expected
    full = qa(ONE, top_k=3)
    assert full != expected
    assert by_construction(ONE, length_config="full") == full


def test_thresholds_and_calibration_of_the_configuration_count_and_those_of_the_call_more(tmp_path):
    """After they went through config.json."""
    bound = 30.0  # far above this model's evidence
    model = tiny_model(no_answer_threshold=bound, answerable_calibration=[0.0625, -1.0])
    QuestionAnsweringPipeline(model=model, tokenizer=load_tokenizer(ROOT)).save_pretrained(tmp_path)
    qa = pipeline("question-answering", model=str(tmp_path), trust_remote_code=True, return_answerable=True)
    assert qa(ONE)["answer"] and qa(ONE, handle_impossible_answer=True)["answer"] == ""
    low = qa(ONE, handle_impossible_answer=True, no_answer_threshold=-bound)
    assert low == qa(ONE)
    plain = QuestionAnsweringPipeline(model=tiny_model(), tokenizer=load_tokenizer(ROOT), return_answerable=True)(ONE)
    evidence = math.log(plain["answerable"] / (1 - plain["answerable"]))
    assert low["answerable"] == pytest.approx(1 / (1 + math.exp(1 - 0.0625 * evidence)))


@pytest.mark.parametrize(
    "field, value",
    [
        ("no_answer_threshold", float("nan")),
        ("no_answer_threshold", float("inf")),
        ("no_answer_threshold", True),
        ("no_answer_threshold", "0"),
        ("answerable_calibration", 1.0),
        ("answerable_calibration", [1.0]),
        ("answerable_calibration", [1.0, None]),
        ("answerable_calibration", [0.0, 1.0]),
    ],
)
def test_thresholds_and_calibration_that_are_none_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*, expected None or a"):
        tiny_config(**{field: value})


def test_the_repository_answers_through_transformers_pipeline():
    qa = pipeline("question-answering", model=str(ROOT), trust_remote_code=True, length_config="fast", device="cpu")
    assert type(qa).__name__ == "QuestionAnsweringPipeline" and type(qa).__module__.startswith("transformers_modules")
    assert qa(question=QUESTION, context=CONTEXT)["answer"] == "Berlin"


def test_the_most_local_length_config_wins(tmp_path):
    """Call over pipeline over load over configuration."""
    at_config, at_load, at_pipeline, at_call = [20, 12, 6], [16, 10, 4], [12, 8, 2], "full"
    QuestionAnsweringPipeline(tiny_model(length_config=at_config), load_tokenizer(ROOT)).save_pretrained(tmp_path)
    scores = []
    for told in ([], [at_load], [at_load, at_pipeline], [at_load, at_pipeline, at_call]):
        load, of_pipeline, call = ({"length_config": told[i]} if i < len(told) else {} for i in range(3))
        qa = pipeline(
            "question-answering", model=str(tmp_path), trust_remote_code=True, model_kwargs=load, **of_pipeline
        )
        found = qa(ONE, **call)["score"]
        assert found == qa(ONE, length_config=[at_config, *told][-1])["score"]
        scores.append(found)
    assert len(set(scores)) == 4


def test_a_saved_pipeline_is_a_complete_repository(qa, tmp_path):
    qa.save_pretrained(tmp_path)
    again = pipeline("question-answering", model=str(tmp_path), trust_remote_code=True)
    assert type(again).__module__.startswith("transformers_modules")
    for length_config in ("full", DROPPING):
        call = {"question": QUESTION, "context": CONTEXT * 8, "length_config": length_config}
        assert_same(again(**call), qa(**call))
