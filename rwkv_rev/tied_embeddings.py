"""Head and embedding as one tensor: what a folder and a configuration may say of it."""

from typing import Any

from torch import nn

from rwkv_rev.errors import CheckpointError, ConfigError


class TiedEmbeddings:
    """Tying and saving as transformers does, but for what it does otherwise than it was told."""

    _tied_weights_keys = {"head.weight": "model.embeddings.weight"}  # noqa: RUF012

    config: Any
    head: nn.Module
    all_tied_weights_keys: dict[str, str]

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Make one tensor of head and embedding where ``config.tie_word_embeddings`` says so.

        Args:
            missing_keys: while a folder is loaded, the tensors that it lacks.
            recompute_mapping: ask the configuration anew.

        Raises:
            CheckpointError: if the folder has both, with other values, which transformers would leave apart.
        """
        to_tie = set(self.all_tied_weights_keys)
        super().tie_weights(missing_keys, recompute_mapping)  # type: ignore[misc]
        if missing_keys is not None and to_tie - set(self.all_tied_weights_keys):
            raise CheckpointError(
                "tie_word_embeddings=True, but the stored head and embedding differ: load it with "
                "tie_word_embeddings=False; to go on with the embedding for both, then set "
                "model.config.tie_word_embeddings = True and call model.tie_weights()"
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers does.

        Raises:
            ConfigError: for a head that is the embedding by assignment alone: the folder would have none.
        """
        own = getattr(self.head, "weight", None)
        embedding = self.get_input_embeddings()  # type: ignore[attr-defined]
        shared = own is not None and own is getattr(embedding, "weight", None)
        if shared and not self.config.tie_word_embeddings:
            raise ConfigError(
                "the head's weight is the embedding's, which the configuration does not say, and a folder would be "
                "saved without a head: set model.config.tie_word_embeddings = True"
            )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
