import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from conftest import DATA, ROOT, TRANSFORMERS_5, tiny_config
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline

QUESTION = "Where do I live?"
CONTEXT = "My name is Wolfgang and I live in Berlin. It is nice here, really."
WORDS = "Berlin berlin BERLIN in the of Wolfgang unhappily ( ) , 1887 naïve 東京 to".split()


class MapStyle(torch.utils.data.Dataset):
    """Two items by its length, though `[]` never says so."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.item


needs_built_in = pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 removed the built-in pipeline")


@pytest.fixture(scope="module")
def shipped():
    """The shipped model in fp32, whose scores batches and windows do not change."""
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT).eval().dequantize()
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(ROOT, config=model.config))


@pytest.fixture(scope="module")
def qa(shipped):
    return QuestionAnsweringPipeline(model=shipped.model, tokenizer=shipped.tokenizer)


@pytest.fixture(scope="module")
def built_in(shipped):
    from transformers import QuestionAnsweringPipeline as BuiltIn

    return BuiltIn(model=shipped.model, tokenizer=shipped.tokenizer)


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


def brute_force_answers(qa, question, context, top_k, max_answer_len, max_seq_len, doc_stride, align_to_words):
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
    merged, singles, order = {}, {}, []
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
        for rank, (score, s, e) in enumerate(spans):
            first, last = offsets[s][0], offsets[e][1]
            if align_to_words:
                first = encoded.word_to_chars(i, encoded.token_to_word(i, s), 1).start
                last = encoded.word_to_chars(i, encoded.token_to_word(i, e), 1).end
            text = context[first:last].lower()
            order.append(text)
            if rank < (12 if align_to_words else 1):
                merged[text] = merged.get(text, 0) + score
            singles[text] = max(singles.get(text, 0), score)
    scores = singles | merged
    return sorted(scores.items(), key=lambda item: -item[1])[:top_k]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
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
                list(qa.preprocess(example, max_seq_len=around + room, doc_stride=stride))
            return
        found = [window["encoding"] for window in qa.preprocess(example, max_seq_len=around + room, doc_stride=stride)]
    finally:
        tokenizer.truncation_side = "right"
    assert len(found) == len(expected)
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
                assert mine.characters(i, i, align_to_words=True) == theirs.word_to_chars(word, 1)


def as_list(answers):
    return answers if isinstance(answers, list) else [answers]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
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
    found = as_list(pipe(question=QUESTION, context=context, batch_size=data.draw(st.integers(1, 3)), **parameters))
    expected = brute_force_answers(pipe, QUESTION, context, **parameters)
    assert [answer["score"] for answer in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    texts = [answer["answer"].lower() for answer in found]
    assert len(set(texts)) == len(texts) == len(expected)
    assert all(context[answer["start"] : answer["end"]] == answer["answer"] for answer in found)
    best = as_list(pipe(question=QUESTION, context=context, **parameters | {"top_k": 1}))
    assert best[0]["answer"] == found[0]["answer"]
    assert best[0]["score"] == pytest.approx(found[0]["score"], abs=1e-6)


def assert_same(found, expected):
    for mine, theirs in zip(as_list(found), as_list(expected), strict=True):
        assert (mine["answer"], mine["start"], mine["end"]) == (theirs["answer"], theirs["start"], theirs["end"])
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)


@needs_built_in
def test_300_validation_questions_are_answered_as_by_the_built_in(qa, built_in, validation_questions):
    chosen = random.Random(0).sample(range(len(validation_questions)), 300)
    rows = [validation_questions[i] for i in chosen]
    contexts = [row["context"] for row in rows]
    for i in range(0, 300, 10):  # long documents, which hold the answer somewhere
        contexts[i] = "\n\n".join([contexts[(i + 7) % 300], contexts[i], *contexts[i + 1 : i + 9]])
    questions = [row["question"] for row in rows]
    expected = built_in(question=questions, context=contexts)
    assert_same(qa(question=questions, context=contexts, length_config="full"), expected)
    assert_same(qa(question=questions[:60], context=contexts[:60], batch_size=8), expected[:60])
    impossible = {"handle_impossible_answer": True, "align_to_words": False, "max_answer_len": 30}
    assert_same(
        qa(question=questions[:60], context=contexts[:60], **impossible),
        built_in(question=questions[:60], context=contexts[:60], **impossible),
    )


@needs_built_in
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "call",
    [
        lambda qa, one: qa(QUESTION, CONTEXT),
        lambda qa, one: qa(question=QUESTION, context=CONTEXT),
        lambda qa, one: qa(question=[QUESTION, "Who?"], context=CONTEXT),
        lambda qa, one: qa(question=[QUESTION, "Who?"], context=[CONTEXT, CONTEXT]),
        lambda qa, one: qa(question=[QUESTION], context=CONTEXT),
        lambda qa, one: qa(question=[], context=[]),
        lambda qa, one: qa(one),
        lambda qa, one: qa([one]),
        lambda qa, one: qa([one, one]),
        lambda qa, one: qa({"question": [QUESTION], "context": [CONTEXT]}),
        lambda qa, one: qa({"question": [QUESTION, "Who?"], "context": [CONTEXT, CONTEXT]}),
        lambda qa, one: qa(data=one),
        lambda qa, one: qa(X=[one, one]),
        lambda qa, one: qa([qa.create_sample(QUESTION, CONTEXT)]),
        lambda qa, one: qa(qa.create_sample([QUESTION, "Who?"], [CONTEXT, CONTEXT])),
        lambda qa, one: list(qa(one for _ in range(3))),
        lambda qa, one: list(qa((one for _ in range(3)), batch_size=2)),
        lambda qa, one: qa(one, topk=2),
        lambda qa, one: qa(one, padding="max_length", max_seq_len=50),
        lambda qa, one: qa(one, max_seq_len=16, doc_stride=2),
        lambda qa, one: qa(one, handle_impossible_answer=True),
        lambda qa, one: qa(question="Who?", context="Berlin, Bonn, Berlin", align_to_words=False),
        lambda qa, one: qa(question="Who?", context="Berlin, Bonn, Berlin"),
        lambda qa, one: qa(one, something_unknown=1),
        # Errors:
        lambda qa, one: qa(),
        lambda qa, one: qa([]),
        lambda qa, one: qa(None),
        lambda qa, one: qa("text"),
        lambda qa, one: qa(question="", context=CONTEXT),
        lambda qa, one: qa(question=QUESTION, context=""),
        lambda qa, one: qa(question=None, context=CONTEXT),
        lambda qa, one: qa(question=QUESTION, context=None),
        lambda qa, one: qa({"question": None, "context": CONTEXT}),
        lambda qa, one: qa({"question": QUESTION, "context": None}),
        lambda qa, one: qa({"question": QUESTION}),
        lambda qa, one: qa(question=[""], context=CONTEXT),
        lambda qa, one: qa(question=[None], context=CONTEXT),
        lambda qa, one: qa(question=[QUESTION, "Who?"], context=[CONTEXT]),
        lambda qa, one: qa(question=QUESTION, context=[CONTEXT]),
        lambda qa, one: qa({"question": 5, "context": CONTEXT}),
        lambda qa, one: qa(one, top_k=0),
        lambda qa, one: qa(one, max_answer_len=0),
        lambda qa, one: qa(one, max_seq_len=10, doc_stride=20),
    ],
)
def test_every_form_of_call_does_what_the_built_in_does(qa, built_in, call):
    one = {"question": QUESTION, "context": CONTEXT}
    try:
        expected = call(built_in, one)
    except Exception as error:
        with pytest.raises(type(error)):
            call(qa, one)
    else:
        found = call(qa, one)
        assert type(found) is type(expected)
        assert_same(found, expected)


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
        ({}, {"length_config": "quick"}, "length_config is 'quick', which is no preset"),
        ({}, {"length_config": [5, 4]}, "length_config has 2 entries, the model has 6 layers"),
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
    question = "Where, " + "and I ask this once more, " * 40 + "do I live?"
    answer = qa(question=question, context=CONTEXT * 20)
    assert (CONTEXT * 20)[answer["start"] : answer["end"]] == answer["answer"]


def test_max_question_len_cuts_the_question(qa):
    assert_same(
        qa(question=QUESTION + " And why?", context=CONTEXT, max_question_len=5),
        qa(question=QUESTION, context=CONTEXT),
    )


def test_documents_longer_than_the_window_are_answered_anywhere(qa):
    filler = [f"On page {i} the clerk wrote that it had rained again and that nobody had come." for i in range(120)]
    for place in (0, 60, 119):
        sentences = [*filler[:place], "The secret password is swordfish.", *filler[place:]]
        context = " ".join(sentences)
        # Among the first three: scores are normalised within a window, so that one without the answer may bid higher.
        answers = qa(question="What is the secret password?", context=context, batch_size=4, top_k=3)
        assert {"swordfish": context.index("swordfish")}.items() <= {a["answer"]: a["start"] for a in answers}.items()
        assert all(context[answer["start"] : answer["end"]] == answer["answer"] for answer in answers)


def test_generators_are_read_as_they_are_answered(qa):
    read = []

    def questions():
        for i in range(5):
            read.append(i)
            yield {"question": QUESTION, "context": CONTEXT}

    answers = qa(questions())
    assert read == []
    next(answers)
    assert read == [0]
    assert len(list(answers)) == 4


def test_a_map_style_data_set_is_read_to_its_length(qa):
    one = {"question": QUESTION, "context": CONTEXT}
    assert list(qa(MapStyle(one))) == [qa(one)] * 2


def test_batches_do_not_change_answers(qa):
    contexts = [CONTEXT, CONTEXT * 30, "Berlin", CONTEXT * 3, CONTEXT * 25] * 2
    for length_config in ("full", "fast", [0.7, 0.6, 0.5, 0.5, 0.5, 0.5]):
        alone = [qa(question=QUESTION, context=context, length_config=length_config) for context in contexts]
        for batch_size in (2, 3, 64):
            together = qa(
                question=[QUESTION] * 10,
                context=contexts,
                batch_size=batch_size,
                length_config=length_config,
            )
            assert_same(together, alone)


def test_batches_do_not_change_int8_answers(shipped):
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT).eval()
    qa = QuestionAnsweringPipeline(model=model, tokenizer=shipped.tokenizer)
    contexts = [CONTEXT, CONTEXT * 30, "Berlin", CONTEXT * 3] * 2
    alone = [qa(question=QUESTION, context=context)["answer"] for context in contexts]
    together = qa(question=[QUESTION] * len(contexts), context=contexts, batch_size=3)
    assert [answer["answer"] for answer in together] == alone


def test_length_config_at_construction_and_at_the_call(shipped):
    tight = [12, 10, 8, 6, 4, 2]
    by_call = QuestionAnsweringPipeline(model=shipped.model, tokenizer=shipped.tokenizer)
    by_construction = QuestionAnsweringPipeline(
        model=shipped.model, tokenizer=shipped.tokenizer, length_config=tight, top_k=3
    )
    expected = by_call(question=QUESTION, context=CONTEXT, top_k=3, length_config=tight)
    assert by_construction(question=QUESTION, context=CONTEXT) == expected
    full = by_call(question=QUESTION, context=CONTEXT, top_k=3)
    assert full != expected
    assert by_construction(question=QUESTION, context=CONTEXT, length_config="full") == full


def test_the_repository_answers_through_transformers_pipeline():
    qa = pipeline("question-answering", model=str(ROOT), trust_remote_code=True, length_config="fast", device="cpu")
    assert type(qa).__name__ == "QuestionAnsweringPipeline" and type(qa).__module__.startswith("transformers_modules")
    assert qa(question=QUESTION, context=CONTEXT)["answer"] == "Berlin"


def test_the_most_local_length_config_wins(tmp_path):
    """Call over pipeline over load over configuration."""
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT, length_config=[20, 16, 12, 10, 8, 6])
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT, config=model.config).save_pretrained(tmp_path)
    scores = []
    for at_load, at_pipeline, at_call in (
        ({}, {}, {}),
        ({"length_config": [16, 12, 10, 8, 6, 4]}, {}, {}),
        ({"length_config": [16, 12, 10, 8, 6, 4]}, {"length_config": [12, 10, 8, 6, 4, 2]}, {}),
        ({"length_config": [16, 12, 10, 8, 6, 4]}, {"length_config": [12, 10, 8, 6, 4, 2]}, {"length_config": "full"}),
    ):
        qa = pipeline(
            "question-answering", model=str(tmp_path), trust_remote_code=True, model_kwargs=at_load, **at_pipeline
        )
        found = qa(question=QUESTION, context=CONTEXT, **at_call)["score"]
        winner = {**at_load, **at_pipeline, **at_call}.get("length_config", [20, 16, 12, 10, 8, 6])
        assert found == qa(question=QUESTION, context=CONTEXT, length_config=winner)["score"]
        scores.append(found)
    assert len(set(scores)) == 4


def test_threads_share_a_pipeline(qa):
    """Long questions make it measure them, which must not disturb another thread's truncation."""
    questions = ["Where, " + "and I ask again, " * i + "do I live?" for i in (0, 6, 30)]
    contexts = [CONTEXT * 20, CONTEXT, CONTEXT * 9]
    calls = [
        {"question": question, "context": context, "length_config": length_config}
        for question, context in zip(questions, contexts)
        for length_config in ("full", [20, 16, 12, 10, 8, 6])
    ]
    alone = [qa(**call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda call: qa(**call), calls * 3)) == alone * 3


def test_a_saved_pipeline_is_a_complete_repository(tmp_path):
    qa = pipeline("question-answering", model=str(ROOT), trust_remote_code=True)
    qa.save_pretrained(tmp_path)
    again = pipeline("question-answering", model=str(tmp_path), trust_remote_code=True)
    for length_config in ("full", "fast", [16, 12, 10, 8, 6, 4]):
        call = {"question": QUESTION, "context": CONTEXT * 8, "length_config": length_config}
        assert_same(again(**call), qa(**call))


@pytest.mark.skipif(not DATA.is_dir(), reason="no data")
def test_validation_answers_are_slices_of_their_contexts(qa, validation_questions):
    rows = validation_questions.select(range(0, len(validation_questions), 40))
    answers = qa(question=list(rows["question"]), context=list(rows["context"]), length_config="fast", batch_size=8)
    assert len(answers) == len(rows)
    for answer, context in zip(answers, rows["context"]):
        assert answer["answer"] and context[answer["start"] : answer["end"]] == answer["answer"]
        assert 0 <= answer["score"] <= 1.0001
