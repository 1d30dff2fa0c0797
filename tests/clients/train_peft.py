"""PEFT: LoRA on the weights as floats, trained, merged and saved, as docs/clients.md says.

It was run with peft 0.21.2 and torch 2.13.0, on transformers 5.23.0 and 4.57.6, and printed on 5.23.0 (on 4.57.6,
1.4e-06 for 1.2e-06):

    trainable params: 74,498 || all params: 22,805,500 || trainable%: 0.3267
    adapter loaded, differs by at most tensor(0.)
    merged and loaded, differs by at most tensor(1.1921e-06)
    Berlin
    with task_type, before any training, differs by tensor(3.4333)
"""

import torch
from document import ASKED, blocks, enter_clone, run
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

enter_clone()
make, merge = blocks("PEFT")
names = run(make)
model = names["model"]
model.print_trainable_parameters()
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("What does it lack?", "The kettle has no lid.", return_tensors="pt")
span = {"start_positions": torch.tensor([10]), "end_positions": torch.tensor([11])}


def start_logits(model):
    with torch.inference_mode():
        return model.eval()(**inputs).start_logits


optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-3)
losses = []
for _ in range(5):
    loss = model.train()(**inputs, **span, length_config="fast").loss
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0]
trained = start_logits(model)
model.save_pretrained("adapter")
base = AutoModelForQuestionAnswering.from_pretrained(".", trust_remote_code=True).dequantize()
print(
    "adapter loaded, differs by at most",
    (start_logits(PeftModel.from_pretrained(base, "adapter")) - trained).abs().max(),
)
run(merge, model=model, tokenizer=tokenizer)
qa = pipeline("question-answering", model="merged", trust_remote_code=True)
print("merged and loaded, differs by at most", (start_logits(qa.model) - trained).abs().max())
print(qa(**ASKED, length_config="fast")["answer"])

base = AutoModelForQuestionAnswering.from_pretrained(".", trust_remote_code=True).dequantize()
before = start_logits(base)
dropping = get_peft_model(base, LoraConfig(task_type="QUESTION_ANS", target_modules=["query", "value"]))
print("with task_type, before any training, differs by", (start_logits(dropping) - before).abs().max())
