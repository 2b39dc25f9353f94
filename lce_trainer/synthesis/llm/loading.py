"""One door to language models: one that runs here, or one behind a server; the stages know neither."""

from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.local import TransformersLLM
from lce_trainer.synthesis.llm.protocol import LLM, LLMConfig


def load_llm(config: LLMConfig) -> LLM:
    """The model of a recipe's ``llm`` section. Nothing is loaded or asked before its first use."""
    return EndpointLLM(config) if config.endpoint else TransformersLLM(config)
