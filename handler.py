"""Serves the model from a Hub Inference Endpoint, which imports this file and calls [`EndpointHandler`]."""

from transformers import pipeline

EXPECTED = '{"inputs": {"question": "...", "context": "..."}, "parameters": {...}}, or a list of such inputs'


class EndpointHandler:
    """Answers the bodies of requests: `{"inputs": {"question": str, "context": str}, "parameters": {...}}`.

    `inputs` may be a list of them; `parameters`, which may be left out, are arguments of the pipeline.

    Args:
        path (`str`): folder of the repository.
    """

    def __init__(self, path=""):
        self.pipeline = pipeline("question-answering", model=path or ".", trust_remote_code=True)

    def __call__(self, data):
        """
        Args:
            data (`dict`): the body of a request, as JSON gives it.

        Returns:
            the pipeline's answer, a dict with score, start, end and answer (and, if `return_answerable` asks for it,
            answerable); a list of them for several inputs or `top_k` answers, a list of lists for both.

        Raises:
            ValueError: a body of another form, or an argument that the pipeline does not take, naming it.
        """
        inputs = data.get("inputs") if isinstance(data, dict) else None
        examples = inputs if isinstance(inputs, list) else [inputs]
        if not examples or not all(
            isinstance(example, dict) and {"question", "context"} <= example.keys() for example in examples
        ):
            raise ValueError(f"inputs is {inputs!r}, expected {EXPECTED}")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters is {parameters!r}, expected an object")
        unknown = sorted(parameters.keys() - set(self.pipeline.PARAMETERS))
        if unknown:
            raise ValueError(f"parameters has {unknown[0]!r}, expected some of {', '.join(self.pipeline.PARAMETERS)}")
        for example in examples:
            for name in ("question", "context"):
                if not isinstance(example[name], str):
                    raise ValueError(f"{name} is {example[name]!r}, expected a text")
        return self.pipeline(inputs, **parameters)
