"""MLflow: the model saved as a pyfunc, and loaded by another process, as docs/clients.md says.

It was run with mlflow-skinny 3.17.2 and torch 2.13.0, on transformers 5.23.0 and 4.57.6, and printed on both:

    {'score': 0.8448806551062876, 'start': 34, 'end': 40, 'answer': 'Berlin'}
    {'score': 0.6432834734830556, 'start': 18, 'end': 21, 'answer': 'lid'}

the two as one list, of the other process, and the names of what was saved: the weights, the code and the tokenizer,
nothing else. With the same versions, what mlflow.transformers.save_model saved loaded on 4.57.6, and on 5.23.0 was a
KeyError.
"""

import subprocess
import sys
from pathlib import Path

import mlflow
import pandas
from document import ASKED, blocks, enter_clone, run

enter_clone()
model, save_and_load = blocks("MLflow")
Path("answerer.py").write_text(model, encoding="utf-8")
frame = pandas.DataFrame([ASKED, {"question": "What does it lack?", "context": "The kettle has no lid."}])
for answer in run(save_and_load, mlflow=mlflow, frame=frame)["answers"]:
    print(answer)
again = "import mlflow, pandas, sys\nprint(mlflow.pyfunc.load_model('answerer').predict(pandas.read_json(sys.stdin)))"
command = [sys.executable, "-c", again]
print(subprocess.run(command, input=frame.to_json(), text=True, check=True, stdout=subprocess.PIPE).stdout.strip())
kept = sorted(path.name for path in Path("answerer/artifacts/model").iterdir())
print("saved:", *kept)
