"""What people could use instead, from the same weights: transformers' own class, ONNX Runtime, OpenVINO.

Every peer becomes a callable that takes a dict of int64 (batch, sequence), as recipe.benchmark times it. The runtimes
are those of requirements-benchmark.txt.
"""

from pathlib import Path

import torch
from transformers import BertForQuestionAnswering

from recipe.export import transformers_config
from recipe.results import cpu_has


def transformers_twin(model):
    """transformers' own `BertForQuestionAnswering` of a float `model`, without its scorers."""
    twin = BertForQuestionAnswering(transformers_config(model.config)).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".scorer." not in name}
    twin.load_state_dict(weights)
    return twin


def onnx_file(twin, folder):
    """`twin` as an ONNX graph with dynamic batch and sequence; returns its path."""
    path = Path(folder) / "model.onnx"
    inputs = (torch.ones(2, 16, dtype=torch.long),) * 3
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "sequence"} for name in [*names, "start_logits", "end_logits"]}

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twin = twin

        def forward(self, input_ids, attention_mask, token_type_ids):
            outputs = self.twin(input_ids, attention_mask, token_type_ids)
            return outputs.start_logits, outputs.end_logits

    torch.onnx.export(
        Logits().eval(),  # export leaves a module in the mode that it found
        inputs,
        path,
        input_names=names,
        output_names=["start_logits", "end_logits"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    return path


def quantize_onnx_dynamic(path, config):
    """ONNX Runtime's int8 graph whose activations' scales are found at each call, of the float one at `path`, fused for
    BERT by ONNX Runtime's own optimiser; returns its path.

    Args:
        config: the model's.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    fused, quantized = path.with_name("fused.onnx"), path.with_name("dynamic.onnx")
    optimize_model(
        str(path), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    ).save_model_to_file(str(fused))
    fallback = {"DefaultTensorType": TensorProto.FLOAT}  # the fused nodes are none of ONNX's, whose types it knows
    quantize_dynamic(fused, quantized, weight_type=QuantType.QInt8, per_channel=True, extra_options=fallback)
    return quantized


def quantize_onnx_static(path, calibration):
    """ONNX Runtime's int8 graph with scales found on `calibration`, a `list` of inputs, of the float one at `path`;
    returns its path."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(calibration)

        def get_next(self):
            inputs = next(self.rest, None)
            return inputs and {name: tensor.numpy() for name, tensor in inputs.items()}

    prepared, quantized = path.with_name("prepared.onnx"), path.with_name("static.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        quantized,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        reduce_range=not cpu_has("avx512_vnni", "avx_vnni"),  # else neighbouring products overflow 16 bits
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


def onnx_runtime_row(path, threads):
    """The ONNX graph at `path` in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def quantize_openvino(path, calibration):
    """OpenVINO's own int8 graph of the float ONNX one at `path`; returns its path."""
    import nncf
    import openvino

    quantized = path.with_name("openvino.xml")
    samples = nncf.Dataset([{name: tensor.numpy() for name, tensor in inputs.items()} for inputs in calibration])
    graph = nncf.quantize(openvino.convert_model(path), samples, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(graph, quantized)
    return quantized


def openvino_row(path, threads):
    """The graph at `path` in OpenVINO."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(path, "CPU", hints)
    return lambda inputs: compiled({name: tensor.numpy() for name, tensor in inputs.items()})


def torch_row(model, **arguments):
    """`model`, a torch module, called with `arguments` beside the inputs."""

    def run(inputs):
        with torch.inference_mode():
            return model(**inputs, **arguments)

    return run
