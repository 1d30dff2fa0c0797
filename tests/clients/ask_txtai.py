"""txtai's questions pipeline with the model, alone and in its RAG, as docs/clients.md says.

It was run with txtai 9.14.0, transformers 5.23.0 and torch 2.13.0, and printed:

    ['Berlin', None, None]
    far beyond 512 tokens: ['Berlin']
    no answer: [None]
    [('home', 'Berlin'), ('lack', 'no lid')]
    txtai's own: ['Berlin'] fast
    txtai's own, no answer: TypeError("'NoneType' object cannot be interpreted as an integer")
    txtai's own, beyond 512 tokens: [None]
"""

from document import ASKED, blocks, enter_clone, run
from txtai import RAG, Embeddings
from txtai.pipeline import Questions

enter_clone()
Answers = run(*blocks("txtai"))["Answers"]
answers = Answers(".", length_config="fast", handle_impossible_answer=True)
question, context = ASKED.values()
print(answers([question, question, ""], [context, "", context]))
print("far beyond 512 tokens:", answers([question], ["Nothing happens here. " * 300 + context]))
print("no answer:", answers([question], [context], no_answer_threshold=1e6))

embeddings = Embeddings(keyword=True, content=True)
embeddings.index([context, "The kettle boils a litre in two minutes, but it has no lid."])
rag = RAG(embeddings, answers)
print(rag([("home", "live Berlin", question, False), ("lack", "kettle lid", "What does the kettle lack?", False)]))

own = Questions(".", gpu=False, trust_remote_code=True, length_config="fast")
print("txtai's own:", own([question], [context]), own.model.config.length_config)
try:
    own(["How many moons has Jupiter?"], ["A"])
except TypeError as error:
    print("txtai's own, no answer:", repr(error))
print("txtai's own, beyond 512 tokens:", own([question], ["Nothing happens here. " * 300 + context]))
