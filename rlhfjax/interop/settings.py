"""Settings of a config.json, each read by name and checked; what nobody read and nobody knows is refused."""

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhfjax.errors import ConfigError

_REQUIRED: Any = object()

# What says nothing about the numbers that a decoder computes: types of storage, dropout, generation, labels, history.
_HARMLESS = frozenset(
    re.findall(
        r"\S+",
        """
        torch_dtype dtype transformers_version use_cache cache_implementation attn_implementation _attn_implementation
        _attn_implementation_autoset _name_or_path name_or_path transformers.js_config bos_token_id eos_token_id
        pad_token_id sep_token_id decoder_start_token_id attention_dropout attn_pdrop resid_pdrop embd_pdrop
        summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
        task_specific_params n_ctx n_special predict_special_tokens pretraining_tp reorder_and_upcast_attn
        is_llama_config id2label label2id num_labels problem_type finetuning_task return_dict torchscript use_bfloat16
        chunk_size_feed_forward max_length min_length do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        hidden_dropout classifier_dropout embedding_dropout custom_pipeline custom_pipelines
        encoder_no_repeat_ngram_size num_return_sequences bad_words_ids forced_bos_token_id forced_eos_token_id
        suppress_tokens begin_suppress_tokens prefix tokenizer_class is_decoder gradient_checkpointing unsloth_fixed
        """,
    )
)


class Settings:
    """Checked reading of `values`; every method raises ConfigError with the setting's name.

    Without a default a setting must be there; one that is null is None where it has a default.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self._values, self._where, self._read = values, where, set()

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value, of this type."""
        self._read.add(key)
        value = self._values.get(key, default)
        if value is _REQUIRED or (value is None and default is _REQUIRED):
            raise ConfigError(f"{self._where}: expected a setting {key}, which is not there; is the file complete?")
        number = kind in (int, float)
        wanted = (int, float) if kind is float else kind
        if value is not None and (not isinstance(value, wanted) or (number and isinstance(value, bool))):
            raise ConfigError(f"{self._where}: expected {key} as {kind.__name__}, got {value!r:.80}")
        return float(value) if kind is float and value is not None else value

    def size(self, key: str, default: Any = _REQUIRED, most: int = 2**31 - 1) -> Any:
        """A count above 0."""
        value = self.take(key, int, default)
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{self._where}: expected {key} from 1 to {most:,}, got {value:,}")
        return value

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number above 0."""
        value = self.take(key, float, default)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{self._where}: expected {key} above 0, got {value}")
        return value

    def expect(self, key: str, known: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        """One of the values that are supported."""
        self._read.add(key)
        value = self._values.get(key, default)
        if value not in known:
            got = "none" if value is _REQUIRED else repr(value)[:80]
            raise ConfigError(
                f"{self._where}: expected {key} {' or '.join(map(repr, known))}, got {got}; not supported"
            )
        return value

    def check_all_read(self) -> None:
        """Refuse what is set, was not read, and is not known to be harmless; null, false and empty set nothing."""
        for key in sorted(self._values.keys() - self._read - _HARMLESS):
            if self._values[key]:
                raise ConfigError(
                    f"{self._where}: setting {key} = {self._values[key]!r:.80} is not supported for this architecture; "
                    "the model would compute something else"
                )
