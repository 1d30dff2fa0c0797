"""Optimum's classes for ONNX Runtime and OpenVINO on what recipe.export writes, as docs/clients.md says.

It was run with optimum 2.1.0, optimum-onnx 0.1.0, optimum-intel 1.27.0, openvino 2026.4.1, onnxruntime 1.32.0,
transformers 4.57.6 and torch 2.13.0, and printed:

    qa ORTModelForQuestionAnswering Berlin 0.848
    qa_in_openvino OVModelForQuestionAnswering Berlin 0.848
"""

import os
import subprocess
import sys

from document import ASKED, blocks, enter_clone, run

enter_clone()
(export,) = blocks("Optimum", "sh")
programs = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
subprocess.run(["sh", "-e", "-c", export], check=True, env=os.environ | {"PATH": programs}, stdout=subprocess.DEVNULL)
(load,) = blocks("Optimum")
names = run(load)
for name in ("qa", "qa_in_openvino"):
    qa = names[name]
    answer = qa(**ASKED)
    print(name, type(qa.model).__name__, answer["answer"], round(answer["score"], 3))
