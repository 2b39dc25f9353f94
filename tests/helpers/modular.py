"""Modular CrossEncoders, as sentence-transformers itself saves them."""

import torch
from transformers import AutoModel

from helpers.tiny_models import lively, tiny_config, tiny_tokenizer


def save_modular(folder, pooling="cls", activation=None, bias=False, **sizes):
    """A random modular CrossEncoder of Ettin's layout, whose norm has weights and biases that matter."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    torch.manual_seed(1)
    base = folder / "base"
    lively(AutoModel.from_config(tiny_config("modernbert", **sizes))).save_pretrained(base)
    tiny_tokenizer("modernbert").save_pretrained(base)
    transformer = Transformer(str(base))
    width = transformer.get_embedding_dimension()
    modules = [
        transformer,
        Pooling(width, pooling),
        Dense(width, width, bias=bias, activation_function=activation or torch.nn.GELU()),
        LayerNorm(width),
        Dense(width, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    for parameter in modules[3].parameters():
        torch.nn.init.normal_(parameter, mean=0.5)
    model = CrossEncoder(modules=modules, device="cpu")
    model.save_pretrained(str(folder / "modular"), create_model_card=False)
    return folder / "modular"
