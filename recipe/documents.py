"""Text out of files: plain text, HTML, PDF page by page, e-mails."""

import email
import email.policy
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.exceptions import ParserRejectedMarkup
from pypdf import PdfReader
from pypdf.errors import PyPdfError

MOST_BYTES = 50_000_000
HEADERS = ("From", "To", "Cc", "Date", "Subject")
MARKUP = (".html", ".htm", ".xhtml")
NO_TEXT = "no text, nor a kind of file that text is taken out of"


def texts(path):
    """The texts of a file, a `list` of (page, text): pages from 1 of a PDF, `None` of what has none. Those without a
    letter or digit are left out.

    Raises:
        ValueError: it is too large, encrypted or damaged, no text, or has none in it.
        OSError: it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{size / 1e6:.0f} MB, more than the {MOST_BYTES / 1e6:.0f} MB that are read of a file")
    suffix = path.suffix.lower()
    if suffix == ".pdf":
        found = pages(path)
    elif suffix == ".eml":
        found = [(None, of_email(path.read_bytes()))]
    else:
        found = [(None, of_markup(path.read_bytes()) if suffix in MARKUP else decoded(path.read_bytes()))]
    # Halves of a character, which a damaged file may give, are none. Nor is there text without a letter or digit: of
    # some PDFs' fonts nobody knows what their signs mean.
    found = [(page, text.encode("utf-8", "replace").decode()) for page, text in found if any(map(str.isalnum, text))]
    if not found:
        raise ValueError("no text in it" + (": is it a scan?" if suffix == ".pdf" else ""))
    return found


def pages(path):
    """A PDF's pages, a `list` of (number from 1, text)."""
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it is encrypted, and asks for a password")
        return [(number, page.extract_text()) for number, page in enumerate(reader.pages, 1)]
    except (PyPdfError, AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        # pypdf meets some damage with Python's own errors.
        raise ValueError(f"no PDF that can be read: {type(error).__name__}: {error}") from error


def of_email(data):
    """Its main headers, a line each, and its text: the plain one, or what the HTML one says."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    lines = [f"{name}: {message[name]}" for name in HEADERS if message[name]]
    body = message.get_body(("plain", "html"))
    try:
        text = body.get_content() if body else ""
    except LookupError:  # a charset that Python does not know
        text = decoded(body.get_payload(decode=True))
    if body and body.get_content_subtype() == "html":
        text = of_markup(text)
    return "\n".join(lines) + "\n\n" + text


def of_markup(data):
    """What a page of HTML, `bytes` or `str`, shows, a line for each piece of text."""
    try:
        soup = BeautifulSoup(data, "html.parser")
    except ParserRejectedMarkup as error:
        raise ValueError("no HTML that can be read") from error
    for tag in soup(["script", "style", "noscript", "template"]):
        tag.decompose()
    blocks = soup.find_all(["p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "title"])
    for block in blocks:  # lines end where blocks do, and not within a sentence that has a link
        block.append("\n")
    return "\n".join(" ".join(line.split()) for line in soup.get_text().splitlines() if line.strip())


def decoded(data):
    """Plain text: UTF-16 by its mark, UTF-8, or else Windows-1252, if of that code at most one character in twenty is a
    control character."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    if b"\0" in data[:8192]:
        raise ValueError(NO_TEXT)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    if sum(not (each.isprintable() or each.isspace()) for each in text) > len(text) / 20:
        raise ValueError(NO_TEXT)
    return text
