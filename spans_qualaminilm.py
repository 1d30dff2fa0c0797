"""Which spans of a text answer, how surely, and where they end: not in the middle of an address or a number."""

import heapq
import itertools
import math
import re
import unicodedata

import numpy as np

# Among this many best spans of a window the built-in pipeline merges the scores of spans of one text: widening spans to
# whole words makes some alike.
MERGED_SPANS = {True: 12, False: 1}  # by align_to_words
# A run stands between blanks, or quotes, brackets and letters that no address or file name has:
# those from Thai to Khmer, dashes, arrows, everything from Chinese on. The euro and the minus sign are in it.
RUN = re.compile(r'[^\s"<>\[\]{}|;`\u0e00-\u1dff\u2000-\u20ab\u20ad-\u2211\u2213-\U0010ffff]*')
# In a run, what its string begins after or ends before: lists and labels, but `1,200` and `host:80`.
PARTING = re.compile(r"(?<![0-9]),|,(?![0-9])|(?<=[^\W\d_]):(?=[^\W\d_])")
LONGEST_RUN = 1000  # characters
NAME = re.compile(r"__[a-z]")  # of Python's own
# What runs are strings, left as they are but for their ends; see `whole_string`.
STRING = re.compile(
    rf"@|://|[^\W_]_+[^\W_]|^{NAME.pattern}|\._"
    r"|[^\W_][#$%&*^~][^\W_]"
    r"|[^\W_]\+[0-9]"
    r"|[0-9]\.[0-9]|[^\W_]\.[a-z]|[A-Z]\.[A-Z](?![a-z])"
    r"|[0-9]/[0-9]|[A-Z]/[A-Z](?![a-z])|/.*/|^[.~]*/"
    r"|^[-+\u2212\u00b1]\.?[0-9]"
    r"|^(?=.*[0-9]).*[^\W_]![^\W_]"
)
SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*$")  # of an address, before its ://
COUNTRY = re.compile(r"[A-Z]{1,3}(?=[$\u00a3\u20ac][0-9])")  # the US of `US$5`
FIELD = re.compile(r"[^\w\n]*(?P<field>\w[^:\n]{0,39}):[ \t]+\S")  # a line that begins so is `field: value`
WRAPPED = 50  # characters, from which on a line may be one of several that are one paragraph


def ranked(context, windows, logits, max_answer_len, align_to_words):
    """The answers of all windows of one text, best first; they may repeat, from the second time on with less.

    In a window, a text's probability is the sum of p(start) p(end) of those of its spans that are among the window's 12
    best (the best alone without `align_to_words`), of its best span alone if none is. Its evidence is that, over the
    window's null: p(start) p(end) of [CLS]. Times the window's weight, see [`weights_of`], that is what counts among
    the windows, see [`shares`].

    Args: as of [`Reading.best`].

    Returns:
        An iterator of the logarithm of the evidence, that of the score, that of the score if the evidence were 1, start
        and end (characters of the context).

    Raises:
        ValueError: logits that are not finite.
    """
    spans = [
        WindowSpans(context, window, of_window, max_answer_len, align_to_words)
        for window, of_window in zip(windows, logits, strict=True)
    ]
    log_shares, log_nulls = shares(np.array([each.evidence_of_all for each in spans]), weights_of(windows))

    def of_window(spans, log_share, log_null):
        for log_evidence, log_probability, start, end in spans.ranked():
            yield log_evidence, log_probability + log_share, log_null, start, end

    return heapq.merge(*map(of_window, spans, log_shares, log_nulls), key=lambda answer: -answer[1])


def weights_of(windows):
    """How much the question's words speak for each window of a text: float64 (windows,), a logarithm, 0 where most.

    A token of them that `found` of n windows hold speaks for these by log((n + 1) / (found + 1/2)), whatever their
    length and however often they hold it: the inverse document frequency of BM25 (Robertson and Zaragoza, 2009; this
    form is Lucene's), with windows as documents.
    """
    weights = np.zeros(len(windows))
    asked = windows[0].question_ids
    # Added token by token, so that windows which hold the same weigh the same to the last bit.
    for stands in np.array([np.isin(asked, window.tokens.ids[window.span]) for window in windows]).T:
        weights[stands] += math.log((len(windows) + 1) / (stands.sum() + 0.5))
    return weights - weights.max()


def shares(evidence, weights):
    """What a window's probabilities count in the whole text: with those of the other windows, and 1/Z that there is no
    answer, they make one.

    Args:
        evidence: float64 (windows,), the logarithm of each one's 1/null, 0 or more.
        weights: float64 (windows,), the logarithm of what each one's evidence is multiplied by, the greatest 0.

    Returns:
        float64 (windows,), the logarithm of (weight/null)/Z, with Z = 1 + the sum over windows of weight (1/null - 1);
        and that of weight/Z, what evidence of 1 counts in the window.
    """
    of_all = evidence + weights
    most = of_all.max()
    # Z without its factor exp(most): of all that is raised, nothing is above 0.
    rest = math.log(math.exp(-most) + np.sum(np.exp(of_all - most) * -np.expm1(-evidence)))
    return of_all - most - rest, weights - most - rest


class WindowSpans:
    """The answer spans of one window, over its context tokens, and against its null, [CLS].

    Attributes:
        size (`int`): how many spans there are.
        evidence_of_all (`float`): the logarithm of 1/null, that of the sum of all evidence where the null's own is 1.
    """

    def __init__(self, context, window, logits, max_answer_len, align_to_words):
        if not np.isfinite(logits).all():
            raise ValueError(
                "the model's logits are not finite: are its weights damaged, or too large for their dtype?"
            )
        self.context, self.window, self.align_to_words = context, window, align_to_words
        logits = logits.astype(np.float64)
        most = logits.max(-1, keepdims=True)
        sums = np.log(np.exp(logits - most).sum(-1, keepdims=True))
        self.evidence_of_all = float((most + sums - logits[:, :1]).sum())
        self.starts, self.ends = (logits - most - sums)[:, 1:]
        self.longest = min(max_answer_len, len(self.ends))
        self.size = len(self.ends) * self.longest - self.longest * (self.longest - 1) // 2

    def ranked(self):
        """Yields the window's answers, best first: the logarithms of their evidence and of their probability, start and
        end (characters of the context). Texts may repeat, from the second time on with less."""
        merged_spans = MERGED_SPANS[bool(self.align_to_words)]
        merged = {}
        for log_probability, start, end in self.spans(0, merged_spans):
            text = self.context[start:end].lower()
            known, *place = merged.get(text, (-math.inf, start, end))
            merged[text] = (float(np.logaddexp(known, log_probability)), *place)
        # None of the others has more than any of these.
        best = sorted(merged.values(), key=lambda answer: -answer[0])
        for log_probability, start, end in itertools.chain(best, self.spans(merged_spans, self.size)):
            yield log_probability + self.evidence_of_all, log_probability, start, end

    def spans(self, first, last):
        """Yields the logarithm of the probability, start and end of the spans from rank `first` to before rank `last`,
        best first; ties go to the earlier span."""
        last = min(last, self.size)
        while first < last:
            # A long text has many windows, of whose spans few are ever asked for.
            until = min(last, max(2 * first, 16))
            for log_probability, start, end in self._of_rank(first, until):
                start, end = self.window.characters(start, end, self.align_to_words)
                text = self.context[start:end]
                if not text.strip():  # byte-level tokens may hold nothing but blanks
                    continue
                if self.align_to_words:
                    start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
                    start, end = whole_string(self.context, start, end)
                yield log_probability, start, end
            first = until

    def _of_rank(self, first, last):
        """Spans from rank `first` to before rank `last`: a list of log probability, first and last token."""
        # Row i holds the spans that start at context token i; those past the last token do not exist.
        reach = np.concatenate((self.ends, np.full(self.longest - 1, -np.inf)))
        scores = self.starts[:, None] + np.lib.stride_tricks.sliding_window_view(reach, self.longest)
        scores = scores.ravel()
        top = np.flatnonzero(scores >= np.partition(scores, -last)[-last])
        top = top[np.argsort(-scores[top], kind="stable")][first:last]
        return [
            (float(scores[flat]), flat // self.longest, flat // self.longest + flat % self.longest)
            for flat in top.tolist()
        ]


def whole_string(context, start, end):
    """The answer `context[start:end]`, ended with its field, then widened to whole strings: (start, end).

    A run is what stands between blanks (more exactly: `RUN`), without quotes, brackets and closing punctuation at its
    ends. Where the answer's first or last character stands in a run that is a string, the answer begins or ends with
    it; elsewhere it stays as it is, so that plain words are never joined. A run is a string if it holds

    - @, ://, or _ between letters or digits, after a dot, or twice at its beginning. Not those of `_stress_`;
    - a dot before a digit, after one; before a small letter, after any letter or digit; or between capitals. Not that
      of `end.Next`, a full stop whose blank is missing;
    - a slash between digits or capitals, at its beginning, or a second one. Not that of `and/or`;
    - one of # $ % & * ^ ~ between letters or digits, a + before a digit, a ! between such where it also has a digit;
    - a sign at its beginning, before a number.

    A hyphen makes no string: people mean the 24 of `24-year-old` and the 1914 of `1914-1918` as often as the whole.

    An answer ends with the line of the form `field: value` whose end it would run over, unless it begins with that
    line's field, or the next line goes on with the value: it is no field itself, and begins with a small letter, or
    the first ends with a comma or the like, or is so long (`WRAPPED`) that it was wrapped.

    To its last letter belong the accents that follow it, which no token of decomposed text holds.

    Args:
        context (`str`); start, end (`int`): characters of it, `start < end`.
    """
    end = end_of_field(context, start, end)
    start, end = min(start, string_around(context, start)[0]), max(end, string_around(context, end - 1)[1])
    while end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return start, end


def string_around(context, place):
    """Where the string that the character at `place` is part of starts and ends; that character alone if it is of
    none."""
    alone = place, place + 1
    start = place - RUN.match(context[max(0, place - LONGEST_RUN) : place][::-1]).end()
    end = place + RUN.match(context[place : place + LONGEST_RUN]).end()
    if end - start >= LONGEST_RUN:
        return alone
    partings = [start + parting.start() for parting in PARTING.finditer(context[start:end])]
    start = max([start, *(parting + 1 for parting in partings if parting < place)])
    end = min([end, *(parting for parting in partings if parting >= place)])
    run = context[start:end]
    while run:
        unmatched = run.count("(") != run.count(")")
        if run[0] in "'*:=" or (run[0] == "(" and (unmatched or run[-1] == ")")):
            start += 1
        elif run[-1] in ".,:!?'*" or (run[-1] == ")" and unmatched):
            end -= 1
        elif run.endswith("'s"):
            end -= 2
        elif run[0] == run[-1] == "_" and not NAME.match(run):
            start, end = start + 1, end - 1
        else:
            break
        run = context[start:end]
    if "://" in run:
        scheme = SCHEME.search(run[: run.index("://")])
        start += scheme.start() if scheme else 0
    else:
        country = COUNTRY.match(run)
        start += country.end() if country else 0
    return (start, end) if start <= place < end and STRING.search(run) else alone


def end_of_field(context, start, end):
    """Where the answer `context[start:end]` ends so that it does not run over the end of a field; see
    [`whole_string`]."""
    start += len(context[start:end]) - len(context[start:end].lstrip())
    stop = context.find("\n", start, end)
    if stop < 0:
        return end
    first = context.rfind("\n", 0, start) + 1
    while stop >= 0:
        line = context[first:stop].rstrip()
        following = context[stop + 1 : stop + 1 + WRAPPED]
        field = FIELD.match(line)
        if field and start not in range(first, first + field.start("field") + 1) and not goes_on(line, following):
            return first + len(line)
        first, stop = stop + 1, context.find("\n", stop + 1, end)
    return end


def goes_on(line, following):
    """Whether a paragraph's line goes on in what follows it."""
    following = following.split("\n")[0].strip()
    if not following or FIELD.match(following):
        return False
    return following[0].islower() or line[-1] in ",/&(" or len(line) >= WRAPPED
