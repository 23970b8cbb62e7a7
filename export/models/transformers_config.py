"""config.json of a transformers text encoder: its keys accounted for, and completed by the defaults of its class.

transformers takes any key without a word. One that the class does not read may be what makes the model another than
the class computes, so that it is known to change nothing, or refused by name.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from export.documents import shown
from export.errors import ModelError
from export.models.config import MOST_SHOWN, REFUSALS, bounded, refused
from export.models.families import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
    "cache_implementation": "how a generating model keeps what it computed",
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
# The same of one class alone.
HARMLESS_OF = {
    "Gemma2Model": {"hidden_act": "hidden_activation is read", "sliding_window_size": "sliding_window is read"},
}
# Keys that older files have for a class with rope_parameters, which transformers reads into these.
OLDER_ROPE = ("rope_theta", "rope_scaling")
# Of a model that reads pictures, too: the table of what reads text, and what prompts of text alone never reach.
TEXT_PART = "text_config"
OF_PICTURES = (
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "vision_token_id",
)  # fmt: skip
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
    or values that it refuses or that ask for what it does not compute."""
    import transformers

    kind = getattr(transformers, class_name).config_class
    defaults = kind().to_dict()
    for key, value in MUST_BE.items():
        if config.get(key, value) != value:
            raise ModelError(
                f"{path}: {key} is {shown(config[key])}; {class_name} is compiled with {shown(value)} alone"
            )
    _refuse_strange(config, class_name, path, defaults)
    # As the class reads the whole: what it makes of a key that is not stated may depend on others.
    stated = config_object(config, class_name, path).to_dict()
    return {**{key: stated[key] for key in kind.__annotations__ if key in stated}, **config}


def text_part(config: Config, class_name: str, path: Path) -> Config:
    """Of a model that reads pictures, too, the configuration of what reads text, as transformers takes it: text_config,
    where there is one, else the keys of the whole. class_name: of the part. Raises ModelError for numbers beyond their
    bounds, and for keys of the whole that are not known."""
    import transformers

    whole = {key: value for key, value in config.items() if key not in (*OF_PICTURES, TEXT_PART)}
    if TEXT_PART not in config:
        return whole
    _refuse_strange(whole, class_name, path, getattr(transformers, class_name).config_class().to_dict())
    part = bounded(config[TEXT_PART], f"{path}: {TEXT_PART}")
    return {**part, **{key: config[key] for key in ("_class_name", "architectures") if key in config}}


def _refuse_strange(config: Config, class_name: str, path: Path, defaults: Config) -> None:
    """Raise ModelError naming the keys that neither the class reads, whose `defaults` are given, nor are harmless."""
    harmless = {**HARMLESS, **HARMLESS_OF.get(class_name, {})}
    read = {*defaults, *MUST_BE, "_class_name", *(OLDER_ROPE if "rope_parameters" in defaults else ())}
    strange = [
        f"{shown(key)}: {shown(value)}"
        for key, value in config.items()
        if key not in read and key not in harmless and value is not None
    ]
    if strange:
        more = f" and {len(strange) - MOST_SHOWN} more" if len(strange) > MOST_SHOWN else ""
        raise ModelError(
            f"{path}: {class_name} does not know {', '.join(strange[:MOST_SHOWN])}{more}; if the model is the same "
            "without, take it out of the file, else it is a model that this class does not compute"
        )
    for key in (config.keys() & harmless.keys()) - read:
        logger.debug("%s: %s is not read: %s", path, key, harmless[key])


def config_object(config: Config, class_name: str, path: Path) -> PretrainedConfig:
    """The configuration as the class of transformers reads it. Raises ModelError where it refuses it."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    kind = getattr(transformers, class_name).config_class
    try:
        read: PretrainedConfig = kind.from_dict({key: value for key, value in config.items() if key != "_class_name"})
    except (*REFUSALS, StrictDataclassError) as error:
        raise refused(error, class_name, path) from error
    return read
