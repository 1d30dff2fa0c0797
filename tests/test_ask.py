"""Text out of files, and answers out of these: each kind of file, and each that cannot be read."""

import json
import sys

import matplotlib
import pytest
from matplotlib.figure import Figure
from pypdf import PdfReader, PdfWriter

from conftest import once
from recipe import ask, documents

pytestmark = once
MAIL = """From: Ana Lima <ana@lima.example>
To: Ben Okoro <ben@okoro.example>
Subject: =?utf-8?q?The_caf=C3=A9?=
Content-Type: text/html; charset=utf-8

<p>We meet at <b>noon</b>.</p><style>p {}</style><p>Ana</p>
"""


def pdf(path, *pages):
    """A PDF with a line of text a page; `None` is a page with a picture alone."""
    from matplotlib.backends.backend_pdf import PdfPages

    with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(path) as file:
        for line in pages:
            figure = Figure()
            if line is None:
                figure.figimage([[0.0, 1.0], [1.0, 0.0]])
            else:
                figure.text(0.1, 0.5, line)
            file.savefig(figure)
    return path


def encrypted(path, source, password, algorithm):
    writer = PdfWriter(clone_from=PdfReader(source))
    writer.encrypt(password, owner_password="owner", algorithm=algorithm)
    writer.write(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a b é.txt").write_text("The ship Aurora was built in Turku in 1912.\nIt had three masts.", "utf-8")
    (tmp_path / "page.html").write_text("<title>Ferry</title><p>A ticket costs <a>12 euros</a>.<br>Pay on board.</p>")
    (tmp_path / "mail.eml").write_text(MAIL)
    (tmp_path / ".hidden").write_text("The ship Aurora was built in Oslo.")
    pdf(tmp_path / "two.pdf", "Chapter one tells nothing.", "The lighthouse is kept by Anselm Brodie.")
    (tmp_path / "corrupt.pdf").write_bytes(b"%PDF-1.4\nnonsense")
    pdf(tmp_path / "scan.pdf", None)
    for name, password, algorithm in (("locked", "secret", "RC4-128"), ("sealed", "secret", "AES-256")):
        encrypted(tmp_path / f"{name}.pdf", tmp_path / "two.pdf", password, algorithm)
    (tmp_path / "signs.txt").write_text("\ue001\ue002 \u200b\ufffd", "utf-8")
    (tmp_path / "torn.html").write_text("<![torn <p>markup</p>")
    (tmp_path / "bytes.txt").write_bytes(bytes(range(1, 256)))
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\0\0")
    (tmp_path / "empty.md").write_text(" \n")
    with (tmp_path / "huge.log").open("wb") as file:
        file.truncate(300_000_000)
    return tmp_path


def test_texts_are_what_the_files_show(folder):
    def read(name):
        return documents.texts(folder / name)

    assert read("a b é.txt")[0][1].startswith("The ship Aurora")
    assert read("page.html") == [(None, "Ferry\nA ticket costs 12 euros.\nPay on board.")]
    mail = "From: Ana Lima <ana@lima.example>\nTo: Ben Okoro <ben@okoro.example>\nSubject: The café"
    assert read("mail.eml") == [(None, mail + "\n\nWe meet at noon.\nAna")]
    (first, _), (second, text) = read("two.pdf")
    assert (first, second) == (1, 2) and "kept by Anselm Brodie" in text
    (folder / "utf16.txt").write_text("Grüße", "utf-16")
    (folder / "latin.txt").write_bytes("Grüße".encode("cp1252"))
    assert read("utf16.txt") == read("latin.txt") == [(None, "Grüße")]
    encrypted(folder / "open.pdf", folder / "two.pdf", "", "AES-256")
    assert read("open.pdf") == read("two.pdf")
    (folder / "charset.eml").write_bytes(b"Content-Type: text/plain; charset=nonsense\n\nGr\xfc\xdfe")
    assert read("charset.eml") == [(None, "\n\nGrüße")]


@pytest.mark.parametrize(
    "name, fault",
    [
        ("corrupt.pdf", "no PDF that can be read"),
        ("locked.pdf", "encrypted, and asks for a password"),
        ("sealed.pdf", "encrypted, and asks for a password"),
        ("signs.txt", "no text in it"),
        ("torn.html", "no HTML that can be read"),
        ("bytes.txt", "no text, nor a kind of file"),
        ("scan.pdf", "is it a scan"),
        ("photo.jpg", "no text, nor a kind of file"),
        ("empty.md", "no text in it"),
        ("huge.log", "300 MB, more than the 50 MB"),
    ],
)
def test_a_file_that_gives_no_text_says_why(folder, name, fault):
    with pytest.raises(ValueError, match=fault):
        documents.texts(folder / name)


@pytest.fixture
def answered(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ask", *map(str, arguments)])
        status = 0
        try:
            ask.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_a_folder_is_asked_and_each_file_that_cannot_be_read_is_a_line(folder, answered):
    status, printed, complaints = answered("Who keeps the lighthouse?", folder, "--top_k", 1)
    assert status == 0 and printed.splitlines()[0] == "Anselm Brodie"
    assert f"{folder / 'two.pdf'}, page 2: The lighthouse is kept by Anselm Brodie." in printed
    lines = [line for line in complaints.splitlines() if line and not line.startswith(("Loading", "Reading"))]  # bars
    names = ["bytes.txt", "corrupt.pdf", "empty.md", "huge.log", "locked.pdf", "photo.jpg", "scan.pdf"]
    names += ["sealed.pdf", "signs.txt", "torn.html"]
    assert [line.split(":")[0] for line in lines] == [str(folder / name) for name in names]

    status, printed, _ = answered("Where was the ship Aurora built?", folder / "a b é.txt", "--jsonl", "--top_k", 1)
    answer = json.loads(printed)
    text = (folder / "a b é.txt").read_text("utf-8")
    assert answer["answer"] == text[answer["start"] : answer["end"]] == "Turku" and answer["page"] is None
    assert answer["line"] == "The ship Aurora was built in Turku in 1912." and 0 <= answer["answerable"] <= 1


def test_what_the_files_do_not_say_is_said(folder, answered, monkeypatch):
    class Silent:
        def __call__(self, examples, **_):
            return [{"answer": "", "answerable": 0.1, "start": 0, "end": 0} for _ in examples]

    monkeypatch.setattr(ask, "pipeline", lambda *_, **__: Silent())
    assert answered("Who?", folder)[:2] == (1, "Not in these files.\n")
    assert answered("Who?", folder, "--jsonl")[:2] == (1, "")
    assert answered("Who?", folder / "scan.pdf", folder / "missing.txt")[0] == 2


def test_texts_are_read_as_they_are_asked_for(tmp_path, monkeypatch):
    """Of many files few are held, and the surest answers come out of any of them."""
    monkeypatch.setattr(ask, "TOGETHER", 4)
    read = []

    def found():
        for i in range(50):
            read.append(i)
            yield f"{i}.txt", None, f"number {i}"

    def qa(examples, **_):
        assert len(examples) <= 4 and len(read) - int(examples[0]["context"].split()[1]) <= 4
        return [{"answer": "number", "start": 0, "end": 6, "answerable": 0.5}] * len(examples)

    assert len(list(ask.answers(qa, "Which?", found()))) == 50


@pytest.mark.parametrize(
    "text, answer, line",
    [
        ("one\ntwo three\nfour", "three", "two three"),
        ("three", "three", "three"),
        (
            "a" * 30 + " " + "word " * 40 + "answer here" + " word" * 40,
            "answer",
            "word " * 9 + "answer here" + " word" * 8,
        ),
        ("one\ntwo\nthree four", "two\nthree", "two three four"),
    ],
)
def test_the_line_around_an_answer(text, answer, line):
    start = text.index(answer)
    assert ask.line_around(text, start, start + len(answer)) == line.strip()
