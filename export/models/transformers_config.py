"""config.json of a transformers text encoder: its keys accounted for, and completed by the defaults of its class.

transformers takes any key without a word. One that the class does not read may be what makes the model another than
the class computes, so that it is known to change nothing, or refused by name.
"""

from __future__ import annotations

import logging
from pathlib import Path

from export.documents import shown
from export.errors import ModelError
from export.models.config import MOST_SHOWN
from export.models.families import Config

logger = logging.getLogger(__name__)
OF_THE_POOLER = "of BERT's pooler, which no pipeline reads"
# Keys of no encoder, and what they are about.
HARMLESS = {
    "architectures": "the class, which is read",
    "model_type": "the class, which is read",
    "dtype": "the type that weights were saved in, which their file states",
    "torch_dtype": "the type that weights were saved in, which their file states",
    "transformers_version": "a note on its origin",
    "_name_or_path": "a note on its origin",
    "task_specific_params": "how the whole model is asked for a task",
    "output_past": "what a decoder returns",
    "n_positions": "a length that was trained on; positions are relative",
    "tokenizer_class": "how text becomes ids",
    "tie_word_embeddings": "of a decoder",
    "scale_decoder_outputs": "of a decoder",
    "decoder_start_token_id": "of a decoder",
    "dropout": "of training",
    "gradient_checkpointing": "of training",
    "pooler_fc_size": OF_THE_POOLER,
    "pooler_num_attention_heads": OF_THE_POOLER,
    "pooler_num_fc_layers": OF_THE_POOLER,
    "pooler_size_per_head": OF_THE_POOLER,
    "pooler_type": OF_THE_POOLER,
}
# Their values are read by nobody, but these would ask for another computation.
MUST_BE: Config = {
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "position_embedding_type": "absolute",
    "directionality": "bidi",
}


def completed(config: Config, class_name: str, path: Path) -> Config:
    """The configuration with what it leaves to the class. Raises ModelError naming keys that the class does not read,
    or values that ask for what it does not compute."""
    import transformers

    kind = getattr(transformers, class_name).config_class
    defaults = kind().to_dict()
    for key, value in MUST_BE.items():
        if config.get(key, value) != value:
            raise ModelError(
                f"{path}: {key} is {shown(config[key])}; {class_name} is compiled with {shown(value)} alone"
            )
    strange = [
        f"{shown(key)}: {shown(value)}"
        for key, value in config.items()
        if key not in defaults
        and key not in HARMLESS
        and key not in MUST_BE
        and key != "_class_name"
        and value is not None
    ]
    if strange:
        more = f" and {len(strange) - MOST_SHOWN} more" if len(strange) > MOST_SHOWN else ""
        raise ModelError(
            f"{path}: {class_name} does not know {', '.join(strange[:MOST_SHOWN])}{more}; if the model is the same "
            "without, take it out of the file, else it is a model that this class does not compute"
        )
    for key in config.keys() & HARMLESS.keys():
        logger.debug("%s: %s is not read: %s", path, key, HARMLESS[key])
    own = {key: defaults[key] for key in kind.__annotations__ if key in defaults}
    return {**own, **config}
