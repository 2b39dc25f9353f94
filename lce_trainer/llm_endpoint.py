from lce_trainer.config import LLMConfig
class EndpointLLM:
    pass
