"""Makes the encoder for a trainer's rows."""

from __future__ import annotations

from lowdft.config.sections import ModelSection
from lowdft.config.training import DFTConfig
from lowdft.data.encode import Encoder
from lowdft.models.base import Source, context_length, generation_end_ids


def encoder_for(model, tokenizer, args: DFTConfig) -> Encoder:
    """The encoder for a trainer's rows, with the lengths of `args`, the model's context length and its end tokens.

    Args:
        model: a transformers model, or the name of one (which is not loaded).
        tokenizer: None if the rows are ids.
    """
    if isinstance(model, str):
        source = Source(model, None, model, is_local=False)
        try:
            context, ends = context_length(source, ModelSection(model)), generation_end_ids(source)
        except OSError:  # no such model; loading it reports that after the rows were checked
            context, ends = None, []
    else:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = generation_end_ids(model)
    return Encoder(tokenizer, args.max_length, args.max_prompt_length, context, ends)
