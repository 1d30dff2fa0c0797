"""Answers widened to whole strings, and ended with their field: spans of hand-worked texts, and of any text."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, tiny_config
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering, QuaLAMiniLMQuestionAnsweringOutput
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from qualaminilm.spans_qualaminilm import whole_string
from recipe.data import load_tokenizer

FORM = "Card of Ada\nBlood type: AB-\nAllergies: penicillin, peanuts\n\nDoctor: Eze"
WRAPPED = "Applicant: Nordhavn Blade Systems A/S. Inventors: Birgitte\nWessel, Chukwuma Eze. Filed in 2022."


@pytest.mark.parametrize(
    "context, span, expected",
    [
        ("Write to refunds@shoponline.com.", "@shoponline.com", "refunds@shoponline.com"),
        ("Mail maria.keller@gmail.com, or call.", "keller@gmail.com", "maria.keller@gmail.com"),
        ("mailto:a.b@x.com;c@y.com", "b@x", "a.b@x.com"),
        ("a@x.com,b@x.com", "x.com,b", "a@x.com,b@x.com"),
        ("a@x.com,b@x.com", "b", "b@x.com"),
        ("<maria@x.com>", "maria", "maria@x.com"),
        ("写信给maria@x.com。谢谢", "x.com", "maria@x.com"),
        ("a\u00a0maria@x.com\u00a0b", "x.com", "maria@x.com"),
        ("send it to @maria now", "maria", "@maria"),
        ("Get https://support.acme.com/drivers/v2.3.", "https://support", "https://support.acme.com/drivers/v2.3"),
        ("(see https://acme.com/a?b=c&d=e).", "see https", "see https://acme.com/a?b=c&d=e"),
        ("here:http://acme.com/a", "acme", "http://acme.com/a"),
        ("https://en.wikipedia.org/wiki/Turku_(city).", "Turku", "https://en.wikipedia.org/wiki/Turku_(city)"),
        ("[label](https://x.com/a_b)", "x", "https://x.com/a_b"),
        ("www.acme.com/help?", "acme", "www.acme.com/help"),
        ("saved report_final-v2.docx today", "final-v2.docx", "report_final-v2.docx"),
        ("**report_v2.pdf**", "v2", "report_v2.pdf"),
        (r"in C:\Users\x_y.txt.", "Users", r"C:\Users\x_y.txt"),
        ("in /r/leather, daily", "leather", "/r/leather"),
        ("The password is Bl4ckBird!77.", "Bl4ckBird", "Bl4ckBird!77"),
        ("version v2.3 is out", "3", "v2.3"),
        ("It was -40 °C there", "40 °C", "-40 °C"),
        ("call +49 30 1234", "49 30", "+49 30"),
        ("costs $1,200.50 now", "200", "$1,200.50"),
        ("costs US$1,200.50 now", "200", "$1,200.50"),
        ("holds 40.5% of it", "40", "40.5%"),
        ("on 12/05/2024, he", "2024", "12/05/2024"),
        ("in the U.S. today", "S", "U.S"),
        ("AT&T's phone", "AT", "AT&T"),
        ("'report_v2.pdf'", "v2", "report_v2.pdf"),
        ("_report_v2.pdf_", "v2", "report_v2.pdf"),
        ("call obj.__init__() first", "init", "obj.__init__()"),
        ("in __init__.py, once", "init", "__init__.py"),
        ("the man called Jose\u0301 lives", "Jose", "Jose\u0301"),
        ("I \u2764\ufe0f it", "\u2764", "\u2764\ufe0f"),
        # Left alone:
        ("The capital is _Berlin_, they say", "Berlin", "Berlin"),
        ("It is __Berlin__.", "Berlin", "Berlin"),
        ("by _Maria Keller_ in 1990", "Maria Keller", "Maria Keller"),
        ("Name: ____Berlin____", "Berlin", "Berlin"),
        ("the _only_ reason", "only", "only"),
        ("That is the end.Next comes", "end", "end"),
        ("great!I love it", "great", "great"),
        ("It is BTU.Both have it", "Both", "Both"),
        ("and/or so", "or", "or"),
        ("from Tanzania/Kenya", "Kenya", "Kenya"),
        ("a 24-year-old man", "24", "24"),
        ("the war (1914-1918)", "1914", "1914"),
        ("open 10:30am", "30am", "30am"),
        ("that costs 1,200 in all", "200", "200"),
        ("O'Brien", "Brien", "Brien"),
        ("see example.com. The rest", ". The", ". The"),
        ("_" + "a" * 2000, "aa", "aa"),
        # Fields:
        (FORM, "AB-\nAllergies: penicillin, peanuts", "AB-"),
        (FORM, "Ada\nBlood type: AB-\nAllergies", "Ada\nBlood type: AB-"),
        (FORM, "type: AB-\nAllergies", "type: AB-"),
        (FORM, "Blood type: AB-\nAllergies", "Blood type: AB-\nAllergies"),
        (FORM, "penicillin, peanuts\n\nDoctor", "penicillin, peanuts"),
        (FORM.replace("\n", "\r\n"), "AB-\r\nAllergies", "AB-"),
        (FORM.replace("\n", "\n- "), "AB-\n- Allergies", "AB-"),
        ("Blood type: AB-\n", "\n", "\n"),
        ("Blood type: AB-\nHandle with care", "AB-\nHandle", "AB-"),
        ("Mail: a_b@x.com\nFax: none", "b@x.com\nFax", "a_b@x.com"),
        ("Address: 12 Long Street,\nTurku", "12 Long Street,\nTurku", "12 Long Street,\nTurku"),
        ("He said: we went home and\nthen to bed.", "home and\nthen to", "home and\nthen to"),
        (WRAPPED, "Birgitte\nWessel", "Birgitte\nWessel"),
        ("The tenant keeps the roof, the outer\nwalls and the pipe", "outer\nwalls", "outer\nwalls"),
    ],
)
def test_hand_worked_spans(context, span, expected):
    start = context.rindex(span)
    start, end = whole_string(context, start, start + len(span))
    assert context[start:end] == expected
    assert whole_string(context, start, end) == (start, end)


PIECES = st.sampled_from(
    [
        *"maria keller @ gmail.com :// https / _ . , : ; ! ? - + ( ) [ ] ' \" $ € & v2 3 40 1,200 AB U.S 東京".split(),
        *("\u00a0", " ", "  ", "\n", "\r\n", "Blood type: ", "\t"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=3), min_size=1, max_size=14).map("".join).filter(len)


@given(st.data())
def test_any_span_grows_to_blanks_or_is_cut_at_a_line_and_then_stays(data):
    context = data.draw(TEXTS)
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    first, last = whole_string(context, start, end)
    assert 0 <= first <= start and first < last <= len(context)
    if last < end:
        assert "\n" in context[start:end] and re.search(r":[ \t]", context[:last])
        assert re.match(r"\s*(\n|$)", context[last:])
    added = context[first:start] + context[end : max(end, last)]
    assert not re.search(r"\s", added)
    assert whole_string(context, first, last) == (first, last)


@given(
    st.lists(
        st.sampled_from("Berlin the naïve 1887 24-year-old end.Next and/or O'Neill 東京都, (yes) no. x! 10:30".split())
    ),
    st.data(),
)
def test_text_without_strings_stays_as_it_is(words, data):
    context = " ".join(["In", *words])
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    assert whole_string(context, start, end) == (start, end)


class Oracle(QuaLAMiniLMForQuestionAnswering):
    """Answers with the tokens of some ids, the earlier ones more surely."""

    def forward(self, input_ids, **kwargs):
        logits = torch.isin(input_ids, self.answer) * 9.0
        return QuaLAMiniLMQuestionAnsweringOutput(
            start_logits=logits - torch.arange(input_ids.shape[1]) * 0.1, end_logits=logits
        )


def test_the_pipeline_widens_answers_before_it_compares_them_and_not_without_align_to_words():
    config = tiny_config(vocab_size=30522, num_hidden_layers=1, max_position_embeddings=512)
    tokenizer = load_tokenizer(ROOT)
    model = Oracle(config).eval()
    model.answer = torch.tensor(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("gmail")))
    qa = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)
    call = {"question": "Where to?", "context": "Write to maria.keller@gmail.com, please."}
    whole = qa(**call)
    assert whole["answer"] == "maria.keller@gmail.com" == call["context"][whole["start"] : whole["end"]]
    narrow = qa(**call, align_to_words=False, top_k=2)
    assert all(answer["answer"] in "gmail" for answer in narrow)
    # Its score is that of all spans that became it.
    assert whole["score"] > sum(answer["score"] for answer in narrow) > 0.2
    ranked = [answer["answer"] for answer in qa(**call, top_k=5)]
    assert len(set(ranked)) == 5 and ranked[0] == "maria.keller@gmail.com"
