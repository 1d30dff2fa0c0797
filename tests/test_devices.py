"""Devices and dtypes other than the model's own: the caller's defaults, accelerate's offloading, layers far apart."""

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from conftest import ROOT, right_padded, tiny_config, trains
from qualaminilm import kernels_qualaminilm, quantization_qualaminilm
from qualaminilm.kernels_qualaminilm import FloatKernel
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.quantization_qualaminilm import QuantizedLinear
from recipe.quantize import quantize

STORED = ("float", "int8")
SIGNIFICANCES = ("attention", "learned")
LENGTH_CONFIGS = ("full", [0.8, 0.5, 0.3])


def tiny_model(stored, significance, **sizes):
    torch.manual_seed(0)
    model = QuaLAMiniLMForQuestionAnswering(tiny_config(significance=significance, type_vocab_size=2, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if stored == "float":
        return model
    rows = [{"input_ids": ids, "token_type_ids": [0] * 30} for ids in torch.randint(3, 60, (8, 30)).tolist()]
    return quantize(model, rows)


def inputs(with_ids=True):
    input_ids, attention_mask = right_padded(tiny_config(), [13, 6])
    called = {"input_ids": input_ids, "attention_mask": attention_mask}
    if with_ids:
        called["token_type_ids"] = (torch.arange(13) > 4).long().expand(2, -1)
        called["position_ids"] = torch.arange(20, 33).expand(2, -1)
    return called


def logits(model, length_config, **called):
    with torch.no_grad():
        outputs = model(**(called or inputs()), length_config=length_config)
    return torch.stack((outputs.start_logits, outputs.end_logits))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("significance", SIGNIFICANCES)
@pytest.mark.parametrize("stored", STORED)
def test_the_caller_s_defaults_change_nothing(stored, significance):
    model = tiny_model(stored, significance)
    called = [inputs(False), inputs(), {"inputs_embeds": torch.randn(2, 13, 16)}]
    for length_config in LENGTH_CONFIGS:
        expected = [logits(model, length_config, **each) for each in called]
        for defaults in DEFAULTS.values():
            first_called_there = copy.deepcopy(model)
            with defaults():
                found = [logits(first_called_there, length_config, **each) for each in called]
            for one, other in zip(found, expected):
                assert one.device == other.device and torch.equal(one, other)


@pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="torch without oneDNN")
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_the_caller_s_defaults_decide_no_kernel(defaults):
    """Neither the one that is made under them, nor any later one."""
    layers = [QuantizedLinear(8, 4) for _ in range(2)]
    kinds = {type(layer.kernel()) for layer in layers}
    assert FloatKernel not in kinds
    kernels_qualaminilm.sums_exactly.cache_clear()
    made_there, later = copy.deepcopy(layers)
    with DEFAULTS[defaults]():
        made_there.kernel()
        if defaults == "meta":
            with pytest.raises(ValueError, match="int8 weights are on the meta device"):
                QuantizedLinear(8, 4).kernel()
    assert {type(layer.kernel()) for layer in (made_there, later)} == kinds


def cpu_offload(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model)


def cpu_offload_with_buffers(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, offload_buffers=True)


def disk_offload(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder, execution_device=torch.device("cpu"), offload_buffers=True)


def dispatch_over_cpu_and_disk(model, folder):
    from accelerate import dispatch_model

    device_map = {
        "bert.embeddings": "disk",
        "bert.encoder.layer.0": "cpu",
        "bert.encoder.layer.1": "disk",
        "bert.encoder.layer.2": "cpu",
        "qa_outputs": "disk",
    }
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, offload_buffers=True)


OFFLOADS = (cpu_offload, cpu_offload_with_buffers, disk_offload, dispatch_over_cpu_and_disk)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("significance", SIGNIFICANCES)
@pytest.mark.parametrize("stored", STORED)
def test_offloaded_by_accelerate_it_answers_alike(stored, significance, offload, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    # What is called layer by layer hands on float32; and only ReLU is computed alike with and without its neighbour.
    monkeypatch.setattr(quantization_qualaminilm, "attention_dtype", lambda *_: torch.float32)
    model = tiny_model(stored, significance, hidden_act="relu")
    expected = {
        (with_ids, str(length_config)): logits(model, length_config, **inputs(with_ids))
        for with_ids in (False, True)
        for length_config in LENGTH_CONFIGS
    }
    model = offload(model, tmp_path)
    for _ in range(2):
        for with_ids in (False, True):
            for length_config in LENGTH_CONFIGS:
                found = logits(model, length_config, **inputs(with_ids))
                torch.testing.assert_close(found, expected[with_ids, str(length_config)], atol=1e-5, rtol=0)


class Places(TorchFunctionMode):
    """Lets tensors say that they are on a device that this machine lacks, and refuse to meet those of another."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.device.__get__:
            return place_of(args[0])
        if function is torch.Tensor.to:
            wanted = [each for each in args[1:] if isinstance(each, (torch.device, str))]
            rest = [each for each in args[1:] if each not in wanted]
            result = args[0].clone() if not rest else function(args[0], *rest, **kwargs)
            return put(result, wanted[0] if wanted else place_of(args[0]))
        given = [each for each in flat((args, list(kwargs.values()))) if isinstance(each, torch.Tensor)]
        # As in torch: a number may come from the CPU to any device.
        places = {place_of(each) for each in given if each.dim() or place_of(each).type != "cpu"}
        if len(places) > 1:
            raise RuntimeError(f"{function} of tensors on {sorted(map(str, places))}")
        place = kwargs.pop("device", None) or (places.pop() if places else torch.device("cpu"))
        result = function(*args, **kwargs)
        for each in flat(result):
            if isinstance(each, torch.Tensor):
                put(each, place)
        return result


def flat(value):
    return [each for part in value for each in flat(part)] if isinstance(value, (tuple, list)) else [value]


def place_of(tensor):
    return vars(tensor).get("place", torch.device("cpu"))


def put(tensor, device):
    tensor.place = torch.device(device)
    return tensor


def place(module, device):
    """As accelerate does where a model is dispatched over several devices."""

    def move(_, args, kwargs):
        def moved(value):
            if isinstance(value, (tuple, list)):
                return type(value)(map(moved, value))
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return moved(args), {name: moved(value) for name, value in kwargs.items()}

    for each in module.modules():
        each.register_forward_pre_hook(move, with_kwargs=True)
    for tensor in (*module.parameters(), *module.buffers()):
        put(tensor, device)


SPLITS = {
    "in order": ("cuda:0", ["cuda:0", "cuda:1", "cuda:1"], "cuda:1"),
    "back and forth": ("cuda:1", ["cuda:0", "cuda:1", "cuda:0"], "cuda:2"),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("significance", SIGNIFICANCES)
@pytest.mark.parametrize("stored", STORED)
def test_layers_on_several_devices_answer_as_on_one(stored, significance, split, monkeypatch):
    # On one device too what a GPU takes.
    monkeypatch.setattr(kernels_qualaminilm, "runs_on_onednn", lambda weight: False)
    monkeypatch.setattr(quantization_qualaminilm, "attention_dtype", lambda *_: torch.float32)
    model = tiny_model(stored, significance, hidden_act="relu")
    labels = {"start_positions": torch.tensor([3, 2]), "end_positions": torch.tensor([7, 4])}
    with_gap = inputs()
    with_gap["attention_mask"] = with_gap["attention_mask"].clone()
    with_gap["attention_mask"][0, 4:6] = 0
    whole = {"input_ids": inputs()["input_ids"]}
    calls = [
        each | labels | {"length_config": length_config, "output_kept_tokens": True, "output_hidden_states": states}
        for each in (inputs(False), with_gap, whole)
        for length_config in LENGTH_CONFIGS
        for states in (False, True)
    ]
    with torch.no_grad():
        on_one = copy.deepcopy(model)
        expected = [on_one(**call) for call in calls]
        on_embeddings, on_layers, on_head = SPLITS[split]
        place(model.bert.embeddings, on_embeddings)
        for layer, device in zip(model.bert.encoder.layer, on_layers):
            place(layer, device)
        place(model.qa_outputs, on_head)
        with Places():
            found = [model(**call) for call in calls]
            assert {place_of(each.start_logits) for each in found} == {torch.device(on_head)}
    for one, other in zip(found, expected):
        for name in ("loss", "start_logits", "end_logits"):
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5)
        for states, expected_states in zip(one.hidden_states or (), other.hidden_states or ()):
            torch.testing.assert_close(states, expected_states, atol=1e-5, rtol=1e-5)
        for kept, expected_kept in zip(one.kept_tokens, other.kept_tokens, strict=True):
            assert torch.equal(kept, expected_kept)


def test_the_stand_in_for_devices_refuses_what_torch_does():
    with Places():
        one, other = torch.ones(2, device="cuda:0"), torch.ones(2).to("cuda:1")
        assert (one.device.index, other.device.index, (one[:1] * 2).device.index) == (0, 1, 0)
        assert (one * torch.tensor(2.0)).device.index == 0
        with pytest.raises(RuntimeError, match=r"of tensors on \['cuda:0', 'cuda:1'\]"):
            one + other
        with pytest.raises(RuntimeError, match="of tensors on"):
            one[torch.tensor([0])].scatter(0, torch.zeros(1, dtype=torch.long, device="cuda:1"), one)


TRAINING = """
import os, socket, sys
import datasets
import torch
from transformers import Trainer
from conftest import right_padded, tiny_config
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.training import SpanTrainer, SpanTrainingArguments

def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0] if name != "length"}

def train(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    input_ids, mask = right_padded(tiny_config(), [9, 5] * 4)
    inputs = {"input_ids": input_ids.tolist(), "attention_mask": mask.tolist(), "length": [9] * 8}
    spans = torch.nn.functional.one_hot(torch.tensor([[2, 3]] * 8), 9).float()
    for trainer_class, length_config, labels in (
        (SpanTrainer, "full", {"targets": spans.tolist(), "question_length": [1] * 8}),
        (Trainer, [0.9, 0.5, 0.3], {"start_positions": [2] * 8, "end_positions": [3] * 8}),
    ):
        weights = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = tiny_config(significance="learned", length_config=length_config, **without)
            model = QuaLAMiniLMForQuestionAnswering(config)
            before = model.qa_outputs.weight.detach().clone()
            training = SpanTrainingArguments(
                output_dir=folder, max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=checkpointing,
                save_strategy="no", bf16=False, use_cpu=True, ddp_backend="gloo", disable_tqdm=True,
            )
            rows = datasets.Dataset.from_dict(inputs | labels)
            trainer_class(model, training, train_dataset=rows, data_collator=collate).train()
            assert not torch.equal(model.qa_outputs.weight, before)
            weights.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
        torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-5)
        of_both = [torch.empty_like(weights[0]) for _ in range(2)]
        torch.distributed.all_gather(of_both, weights[0])
        assert torch.equal(*of_both)
    if rank == 0:
        print("trained alike")

if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(train, (sys.argv[1],), nprocs=2, start_method="fork")
"""


@trains
def test_two_processes_train_with_gradient_checkpointing_as_without(tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert "trained alike" in done.stdout, done.stderr
