"""Haystack's reader with the model, on 2 and 3, as docs/clients.md says: its answers, and that the token types arrive.

It was run with haystack-ai 2.31.0 on transformers 5.23.0 and 4.57.6, and with haystack-ai 3.4.1 and
transformers-haystack 2.0.0 on 5.23.0, torch 2.13.0; without a terminal, and once answering y. All printed (on 5, after
the tokenizer's question whether to run the code):

    Where do I live? 'Berlin' ExtractedAnswer.Span(start=34, end=40)
    What does the kettle lack? 'it has no lid' ExtractedAnswer.Span(start=104, end=117)
    length_config fast, token types as the tokenizer's
"""

import re

from document import ASKED, ROOT, blocks, enter_clone, run
from haystack import Document, version

(code,) = blocks("Haystack")
if int(version.__version__.split(".")[0]) >= 3:
    (first,) = re.findall(
        "`(from haystack_integrations.*)`", (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    )
    code = "\n".join([first, *code.splitlines()[1:]])
enter_clone()
reader = run(code)["reader"]
seen = []
reader.model.bert.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args))
documents = [
    Document(content=ASKED["context"]),
    Document(content="The kettle boils a litre in two minutes, but it has no lid." * 9),
]
for query in (ASKED["question"], "What does the kettle lack?"):
    best = reader.run(query=query, documents=documents, top_k=1, no_answer=False)["answers"][0]
    print(f"{query} {best.data!r} {best.document_offset}")
    texts = [document.content for document in documents]
    expected = reader.tokenizer([query] * 2, texts, padding=True, return_tensors="pt")
    real = expected.attention_mask.bool()
    (token_types,) = [each for each in seen[-1] if each is not None and each.max() == 1 and each.min() == 0]
    assert (token_types[real] == expected.token_type_ids[real]).all()
print(f"length_config {reader.model.config.length_config}, token types as the tokenizer's")
