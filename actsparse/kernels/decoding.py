"""Greedy decoding by a certified head, for ``generate`` of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actsparse.kernels.head import CertifiedHead


class CertifiedDecoding:
    """Greedy decoding that multiplies by the head's rows that may win alone.

    ``model.generate(ids, custom_generate=CertifiedDecoding(head))`` decodes as greedy search does.
    No logits are made, so what would see them is refused: logits processors, sampling, beams, and
    outputs with scores.

    Args:
        head: the model's own.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    >>> model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2]])
    >>> decoding = CertifiedDecoding(CertifiedHead.of(model, ids))
    >>> how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    >>> one = model.generate(ids, custom_generate=decoding, **how)
    >>> torch.equal(one, model.generate(ids, **how))
    True
    """

    def __init__(self, head: CertifiedHead) -> None:
        self.head = head

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kept: Any,
    ) -> Tensor:
        """Decode, as :meth:`generate` of transformers calls it.

        Args:
            model: a causal language model.
            input_ids: the prompts [B, T], filled up on the left.
            logits_processor: none.
            stopping_criteria: end a sequence.
            generation_config: greedy.
            synced_gpus: not supported.
            streamer: gets tokens as they come.
            kept: what the model keeps from token to token.

        Returns:
            Prompts and what follows them [B, T + new].

        Raises:
            ValueError: something needs logits, or the model is no decoder alone.
        """
        _check(model, self.head, logits_processor, generation_config, synced_gpus)
        going, length = torch.ones(len(input_ids), dtype=torch.bool), None
        pad = generation_config._pad_token_tensor
        while bool(going.any()):
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=length, is_first_iteration=length is None, **kept
            )
            inputs.pop("logits_to_keep", None)
            outputs = model.base_model(**inputs, return_dict=True)
            kept = model._update_model_kwargs_for_generation(outputs, kept)
            _, tokens = self.head.topk(outputs.last_hidden_state[:, -1])
            tokens = tokens[:, 0] if pad is None else torch.where(going, tokens[:, 0], pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            if streamer is not None:
                streamer.put(tokens)
            going = going & ~stopping_criteria(input_ids, None)
            length = 1 if kept.get("use_cache") else None
        if streamer is not None:
            streamer.end()
        return input_ids


def _check(model: Any, head: CertifiedHead, processors: Any, config: Any, synced: bool) -> None:
    own = model.get_output_embeddings()
    if own is None or own.weight.data_ptr() != head.weight.data_ptr():
        raise ValueError(f"the head is not that of this {type(model).__name__}")
    if processors:
        names = ", ".join(type(each).__name__ for each in processors)
        raise ValueError(f"{names} needs all logits: leave custom_generate= away")
    wants = ("do_sample", "return_dict_in_generate", "output_scores", "output_logits")
    for name in wants:
        if getattr(config, name, None):
            raise ValueError(f"{name}=True: certified decoding is greedy and returns tokens alone")
    if (config.num_beams or 1) > 1 or synced or model.config.is_encoder_decoder:
        raise ValueError("certified decoding takes a decoder in one process, without beams")
