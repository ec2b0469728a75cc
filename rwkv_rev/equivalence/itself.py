"""A model that has no other original (a fine-tuned one, say) as its own: what ``export`` would write, not written.

Its values are its own, so there is nothing to compare them with; but the original implementations run them, and must
compute what the model computes. Of an architecture that nobody else implements there is the plain loop alone.
"""

from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.names import tensor_table
from rwkv_rev.equivalence.original import Original, ReadTensors, known_to_transformers


def as_original(model: ConvertedModel) -> Original:
    """The open model under the names of the other layouts; readable as long as ``model`` is open."""
    config = model.config

    def renamed(layout: str | None = None) -> ReadTensors:
        return ReadTensors.in_layout(tensor_table(config, layout), model.tensor)

    return Original(
        tensors=renamed(),
        label=f"its own values ({model.directory})",
        config=config,
        tensors_are_own=True,
        group_norm_epsilon=config.group_norm_epsilon,
        layer_norm_epsilon=config.layer_norm_epsilon,
        transformers_tensors=renamed("transformers") if known_to_transformers(config) else None,
        own_tensors=ReadTensors([row.name for row in tensor_table(config)], model.tensor),
    )
